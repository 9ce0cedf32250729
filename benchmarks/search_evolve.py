"""Recipes tried the way of mergekit-evolve, for `benchmarks/search.py`: every candidate is merged to disk and loaded.

For each persona of a candidate mergekit's own `run_merge` (task_arithmetic) writes a model, which transformers loads
and asks, and which is then removed; each process tries whole candidates, as mergekit-evolve's workers do. Where
mergekit is not installed PEFT does it: `add_weighted_adapter` (cat, which is exact), `save_pretrained`, `load`.

Left out in its favour: the start of a process for each evaluation, the merge of every expert into a model of its own
(mergekit does that once, before the first candidate), tokenizers and cards, and reading the scorer's encoder.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymerge.pipelines.searching.scorer import RecipeScorer
    from raymerge.recipes import Recipe

Experts = tuple[tuple[str, float], ...]  # folders of adapters and their weights, with the scale in them
STAGES = ("merge and save", "load", "generate", "score")


@dataclass(frozen=True)
class Asked:
    """What every candidate is asked. by: mergekit or peft. prompts, responses: by persona. scratch: a folder."""

    by: str
    base: str
    encoder: str
    prompts: Mapping[str, Sequence[str]]
    responses: Mapping[str, Sequence[str]]
    new_tokens: int
    batch_size: int
    scratch: str


@dataclass
class Tried:
    """A candidate's similarity in percent, when it began and ended (time.time), and seconds by stage."""

    similarity: float = 0.0
    began: float = 0.0
    ended: float = 0.0
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


def library() -> str:
    """What merges: mergekit where it is installed."""
    return "mergekit" if importlib.util.find_spec("mergekit") else "peft"


def try_candidates(asked: Asked, candidates: Sequence[Mapping[str, Experts]], processes: int) -> list[Tried]:
    """Try candidates (persona -> experts) in so many processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    if asked.by == "mergekit":
        with ProcessPoolExecutor(1, mp_context=context) as alone:
            places = {place for candidate in candidates for row in candidate.values() for place, _ in row}
            alone.submit(_make_models, asked, sorted(places)).result()
    ready = context.Barrier(min(processes, len(candidates)))
    with ProcessPoolExecutor(ready.parties, mp_context=context, initializer=_start, initargs=(asked, ready)) as pool:
        return list(pool.map(_try, candidates))


def asked_of(scorer: RecipeScorer, scratch: str) -> Asked:
    """What ours is asked, for the other."""
    from raymerge.personas import render_prompt

    project, personas = scorer.opened.project, scorer.opened.need_personas("search")
    rows = {name: personas.examples(name, "validation") for name in scorer.names}
    return Asked(
        by=library(),
        base=scorer.opened.need_base("search"),
        encoder=project.evaluation.similarity_model,
        prompts={n: [render_prompt(e.asked, project.generation.prompt_format) for e in rows[n]] for n in rows},
        responses={name: [example.response for example in rows[name]] for name in rows},
        new_tokens=project.generation.max_new_tokens,
        batch_size=project.evaluation.batch_size,
        scratch=scratch,
    )


def experts_of(scorer: RecipeScorer, recipe: Recipe) -> dict[str, Experts]:
    """Who contributes to whom, and how much, with the scale."""
    table, _ = scorer.placed.route(recipe)
    place, scale = scorer.opened.project.adapter_location, float(recipe.scale)  # type: ignore[arg-type]
    rows = {
        persona: tuple((place(name), scale * weight) for name, weight in group.experts)
        for group in table.groups()
        for persona in group.personas
    }
    return {name: rows[name] for name in scorer.names}


_held: dict[str, Any] = {}  # of this process: what it was asked, the encoder and the tokenizer


def _start(asked: Asked, ready: Any) -> None:
    import torch
    import transformers

    from raymerge.models.base import load_base
    from raymerge.routing.embeddings import load_encoder

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    if asked.by == "mergekit":
        import mergekit.merge  # noqa: F401
    _held.update(asked=asked, encoder=load_encoder(asked.encoder, device="cpu"), base=load_base(asked.base))
    ready.wait(600)


def _make_models(asked: Asked, adapters: Sequence[str]) -> None:
    import transformers
    from mergekit.common import ModelReference

    transformers.utils.logging.disable_progress_bar()
    for adapter in adapters:
        ModelReference.parse(f"{asked.base}+{adapter}").merged(_cache(asked))


def _cache(asked: Asked) -> str:
    return str(Path(asked.scratch) / "experts")


def _try(candidate: Mapping[str, Experts]) -> Tried:
    from raymerge.evaluation.metrics import similarity

    asked: Asked = _held["asked"]
    tried = Tried(began=time.time())
    answers: list[str] = []
    for persona, experts in candidate.items():
        folder = tempfile.mkdtemp(dir=asked.scratch)
        clock = time.perf_counter()
        (_merge_by_mergekit if asked.by == "mergekit" else _merge_by_peft)(asked, experts, folder)
        clock = _note(tried, "merge and save", clock)
        model = _load(asked, folder)
        clock = _note(tried, "load", clock)
        answers += _generate(asked, model, asked.prompts[persona])
        _note(tried, "generate", clock)
        shutil.rmtree(folder)
    clock = time.perf_counter()
    references = [text for persona in candidate for text in asked.responses[persona]]
    found = similarity(_held["encoder"], answers, references)
    counts = [len(asked.responses[persona]) for persona in candidate]
    means, start = [], 0
    for count in counts:
        means.append(float(found[start : start + count].mean()))
        start += count
    tried.similarity = 100 * sum(means) / len(means)
    _note(tried, "score", clock)
    tried.ended = time.time()
    return tried


def _note(tried: Tried, stage: str, since: float) -> float:
    now = time.perf_counter()
    tried.stages[stage] += now - since
    return now


def _merge_by_mergekit(asked: Asked, experts: Experts, folder: str) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    listed = [{"model": f"{asked.base}+{place}", "parameters": {"weight": weight}} for place, weight in experts]
    written = {"merge_method": "task_arithmetic", "base_model": asked.base, "dtype": "float32", "models": listed}
    options = MergeOptions(
        lora_merge_cache=_cache(asked), copy_tokenizer=False, write_model_card=False, quiet=True, num_threads=1
    )
    run_merge(MergeConfiguration.model_validate(written), out_path=folder, options=options)


def _merge_by_peft(asked: Asked, experts: Experts, folder: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (first, _), *others = experts
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(asked.base), first, adapter_name="0")
    for number, (place, _) in enumerate(others, 1):
        model.load_adapter(place, str(number))
    names, weights = [str(i) for i in range(len(experts))], [weight for _, weight in experts]
    model.add_weighted_adapter(names, weights, "merged", combination_type="cat")
    model.save_pretrained(folder, selected_adapters=["merged"])


def _load(asked: Asked, folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    if asked.by == "mergekit":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(asked.base)
    return PeftModel.from_pretrained(base, str(Path(folder) / "merged")).eval()


def _generate(asked: Asked, model: Any, prompts: Sequence[str]) -> list[str]:
    import torch

    from raymerge.models.answers import encode_prompts

    base, texts = _held["base"], []
    for start in range(0, len(prompts), asked.batch_size):
        rows = encode_prompts(base, prompts[start : start + asked.batch_size])
        width = max(len(row) for row in rows)
        ids = torch.tensor([[base.pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=asked.new_tokens, do_sample=False,
            pad_token_id=base.pad_id, eos_token_id=list(base.end_ids) or None,
        )  # fmt: skip
        texts += base.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]
