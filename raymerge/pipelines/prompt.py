"""`raymerge prompt`: the same prompts through the base and several adapters, side by side. No project file, no Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.errors import AdapterError, EvaluationError, ModelError
from raymerge.personas import render_prompt
from raymerge.pipelines.fusion.options import named_sources
from raymerge.pipelines.fusion.request import Source
from raymerge.pipelines.prompting.answers import Answers, Question
from raymerge.pipelines.prompting.file import Prompt, read_prompts

if TYPE_CHECKING:
    from raymerge.adapters import LoraAdapter
    from raymerge.evaluation.capabilities import Contributor, Kind, Respondent, Scores
    from raymerge.models.base import BaseModel
    from raymerge.pipelines.prompting.batch import Progress

BASE = "base"
NO_ENCODER = "none"


def prompt(question: Question, *, as_json: bool = False, out: str | None = None) -> int:
    """Ask, and print the answers and, where there are references, the scores. out: a JSON file for all of it.

    Raises what `ask` raises, and EvaluationError before anything is asked if `out` is no JSON file. Returns the exit
    status.
    """
    target = None if out is None else _target(out)
    found = ask(question)
    data = storage.encode_json(found.to_json())
    if target is not None:
        storage.write_bytes(target, data)
    if as_json:
        print(data.decode(), end="")
        return 0
    from rich.console import Console

    from raymerge.pipelines.prompting.table import answers_and_scores

    console = Console()
    console.print(answers_and_scores(found, console.width))
    if out is not None:
        console.print(f"Wrote {out}", soft_wrap=True, highlight=False, markup=False)
    return 0


def ask(question: Question) -> Answers:
    """The answers of the base and of every adapter, all in one batch, and their scores where there are references.

    Raises EvaluationError, PersonaError and ProjectError for what is asked; AdapterError, MergeError and ModelError for
    who is: all of them before the model answers anything.
    """
    _check_text([*question.prompts, *question.stop, question.prompt_format])
    prompts, notes = _prompts(question)
    sources = _sources(question)
    adapters = [_read(source, question) for source in sources]
    respondents = [_respondent(s, a, question) for s, a in zip(sources, adapters, strict=True)]
    order = sorted(range(len(adapters)), key=lambda i: respondents[i].kind == "fused")
    adapters, respondents = [adapters[i] for i in order], [respondents[i] for i in order]
    if question.with_base:
        respondents.insert(0, _base_alone())
    with _progress() as progress:
        answers, scores = _answered(question, adapters, respondents, prompts, progress)
    notes += _absent(respondents)
    if scores is not None:
        notes += _unstated(scores)
    return Answers(
        question=question,
        prompts=prompts,
        respondents=tuple(respondents),
        locations={source.name: source.written for source in sources},
        answers={r.name: texts for r, texts in zip(respondents, answers, strict=True)},
        scored=tuple(number for number, asked in enumerate(prompts) if asked.reference is not None),
        scores=scores,
        kept=() if scores is None else tuple(scores.kept()),
        notes=(*notes, *_other_bases(question, adapters)),
    )


def _answered(
    question: Question,
    adapters: Sequence[LoraAdapter],
    respondents: Sequence[Respondent],
    prompts: Sequence[Prompt],
    progress: Progress,
) -> tuple[list[list[str]], Scores | None]:
    from raymerge.pipelines.prompting.batch import answer, score
    from raymerge.routing.embeddings import load_encoder

    progress("loading the base", None)
    base = _load(question, adapters)
    encoder: Any = None
    has_references = any(asked.reference is not None for asked in prompts)
    if has_references and question.similarity_model != NO_ENCODER:
        encoder = load_encoder(question.similarity_model, device=str(base.device))
    answers, nll = answer(question, base, adapters, prompts, progress)
    if not has_references:
        return answers, None
    progress("comparing with the references", None)
    return answers, score(respondents, prompts, answers, nll, encoder)


def _target(out: str) -> str:
    location = storage.resolve(os.getcwd(), out)
    is_folder = not storage.is_uri(location) and os.path.isdir(location)
    if is_folder or not location.endswith(".json"):
        raise EvaluationError(f"--out {out}: is no JSON file.\nExpected a file whose name ends in .json.")
    return location


def _prompts(question: Question) -> tuple[tuple[Prompt, ...], list[str]]:
    """What is asked, and a note on what is not."""
    if question.prompts and question.file is not None:
        raise EvaluationError("--prompt and --prompts: give one of them.")
    if question.prompt_format != "chat":
        render_prompt("", question.prompt_format)  # refused before anything is loaded
    if question.file is None:
        if not question.prompts:
            raise EvaluationError("no prompts are given.\nExpected --prompt TEXT, or --prompts FILE.")
        return tuple(Prompt(text) for text in question.prompts), []
    prompts, left_out = read_prompts(storage.resolve(os.getcwd(), question.file))
    others = "1 other is" if left_out == 1 else f"{left_out} others are"
    return prompts, [f"Only examples of split test are asked: {others} left out."] if left_out else []


def _check_text(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text.encode(errors="backslashreplace").decode()
            raise EvaluationError(f"{shown}: is not text in UTF-8.") from error


def _sources(question: Question) -> tuple[Source, ...]:
    sources = named_sources([*question.adapters, *question.fused])
    if not sources:
        raise AdapterError("no adapter is given.\nExpected folders of adapters, or NAME=FOLDER.")
    for source in sources:
        if source.name == BASE and question.with_base:
            raise AdapterError(
                f"{source.written}: the name base stands for the base model.\n"
                f"Give it another: OTHER_NAME={source.location}"
            )
    return sources


def _read(source: Source, question: Question) -> LoraAdapter:
    from raymerge.adapters.base_weights import BaseWeights
    from raymerge.adapters.formats import read_adapter

    location = storage.resolve(os.getcwd(), question.base)
    weights = BaseWeights(location) if storage.exists(location) else None  # for DoRA; not opened before it is needed
    if weights is None and _is_dora(source):
        raise AdapterError(
            f"{source.name}: is DoRA, whose deltas need the base's weights, and --base {question.base} is no folder.\n"
            "Expected --base as a folder or URI with them. Of a name on the hub, give the folder it was downloaded to."
        )
    adapter = read_adapter(source.location, source.name, allow_pickle=question.allow_pickle, base=weights)
    adapter.require_plain("cannot answer in a batch with others")
    return adapter


def _is_dora(source: Source) -> bool:
    """Whether an adapter's file says so; of a pickle, which has no header, the reader finds out."""
    from raymerge.adapters.formats import read_header, weight_files

    is_pickled = weight_files(source.location)[0].endswith(".bin")
    return not is_pickled and read_header(source.location, source.name).settings.dora


def _load(question: Question, adapters: Sequence[LoraAdapter]) -> BaseModel:
    """The base on its device. Raises ModelError, naming adapter and base, if one does not fit."""
    import torch

    from raymerge.models.base import load_base
    from raymerge.models.layers import linear_modules
    from raymerge.models.multilora import check_fits

    device = question.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(question.base, device=device, dtype=question.dtype)
    render_prompt("", question.prompt_format, base.tokenizer)  # chat needs a template
    linear = linear_modules(base.model)
    for adapter in adapters:
        try:
            check_fits(adapter.name, adapter.headers, linear)
        except ModelError as error:
            own = f"It names {adapter.base_model} as its base." if adapter.base_model else "It names no base."
            raise ModelError(f"{adapter.name}: does not fit the base {question.base}.\n{error}\n{own}") from error
    return base


def _base_alone() -> Respondent:
    from raymerge.evaluation.capabilities import Respondent

    return Respondent(BASE, "base")


def _respondent(source: Source, adapter: LoraAdapter, question: Question) -> Respondent:
    """An adapter in its role: fused if it says so, its manifest does, or the question."""
    from raymerge.adapters.formats import adapter_digest, weight_files
    from raymerge.evaluation.capabilities import Respondent
    from raymerge.manifest import read_manifest

    manifest = read_manifest(storage.parent(weight_files(source.location)[0])) or {}
    contributors = _contributors(manifest.get("experts"))
    is_fused = bool(contributors or adapter.errors) or source.written in question.fused
    kind: Kind = "fused" if is_fused else "expert"
    return Respondent(adapter.name, kind, contributors, adapter_digest(source.location))


def _contributors(experts: Any) -> tuple[Contributor, ...]:
    """What a manifest says of the experts; nothing if raymerge did not write it, whose form may be any."""
    from raymerge.evaluation.capabilities import Contributor

    found = []
    for expert in experts if isinstance(experts, list) else ():
        name, digest = (expert.get("name"), expert.get("digest")) if isinstance(expert, dict) else (None, None)
        if isinstance(name, str):
            found.append(Contributor(name, digest if isinstance(digest, str) else None))
    return tuple(sorted(found, key=lambda contributor: contributor.name))


def _other_bases(question: Question, adapters: Sequence[LoraAdapter]) -> list[str]:
    """Adapters that name another base than the one that answers. Names of one base differ in all but their end."""
    asked = storage.name_of(question.base)
    named = {adapter.name: adapter.base_model for adapter in adapters if adapter.base_model}
    return [
        f"{name} was trained on {base}, as it says; it fits {question.base}."
        for name, base in named.items()
        if storage.name_of(base).lower() != asked.lower()
    ]


def _absent(respondents: Sequence[Respondent]) -> list[str]:
    """Experts that went into a merge and are not asked. What it keeps of them is not told."""
    notes = []
    for merge in respondents:
        lost = [one.name for one in merge.contributors if not any(r.is_one(one) for r in respondents)]
        if lost:
            more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
            plural = "which is" if len(lost) == 1 else "which are"
            notes.append(f"{merge.name} was made of {', '.join(lost[:6])}{more}, {plural} not among the adapters here.")
    return notes


def _unstated(scores: Scores) -> list[str]:
    """Why nothing is said of what a merge keeps, if that is so."""
    merges = [r for r in scores.respondents if r.kind == "fused"]
    experts = list(dict.fromkeys(name for merge in merges for name in scores.experts_of(merge)))
    if not experts:
        return []
    if not any(r.kind == "base" for r in scores.respondents):
        return ["What a merge keeps is measured from the base: leave out --no-base."]
    if not any(name in scores.prompts for name in experts):
        return [f"What a merge keeps of an expert is told where `capability` names it: {', '.join(experts[:6])}."]
    return []


@contextmanager
def _progress() -> Iterator[Progress]:
    """Shows what is being done and how far it is, on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        task = shown.add_task("loading", total=None)

        def begin(what: str, total: int | None) -> Callable[[int], None]:
            shown.reset(task, total=total, description=what)
            return lambda rows: shown.advance(task, rows)

        yield begin
