"""What the base and own adapters say for themselves: one item on a model worker, and what its figures mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from raymerge.evaluation.wording import cut, short
from raymerge.personas import Personas
from raymerge.pipelines.checking import operations
from raymerge.pipelines.checking.estimate import CPU_THREAD, GPU, Speeds
from raymerge.pipelines.checking.finding import Finding, Section, counted, listed
from raymerge.pipelines.checking.operations import Layers, padded, rows_of
from raymerge.pipelines.job import carry_out
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.trials import spread
from raymerge.runtime.scheduler import Item, Outcome
from raymerge.runtime.tasks import CheckTask

PERSONAS = 10  # whose own adapters are asked
_MOST = 0.8  # share of personas that must agree
_CLEARLY = 0.05  # share by which another form's loss must be lower
_FORMAT = "set generation.prompt_format to the form they were trained with, or base_model to their base"


def ask_model(opened: Opened, personas: Personas, *, local: bool) -> tuple[dict[str, Any] | None, str | None]:
    """What the worker answers; or why it could not."""
    with_adapter = [name for name in opened.trainable if name in set(opened.adapters)]
    names = spread(with_adapter or list(opened.trainable), PERSONAS)
    task = CheckTask(
        personas=personas.source,
        names=tuple(names),
        adapters=tuple((name, opened.project.adapter_location(name)) for name in names if with_adapter),
        generation=opened.project.generation.model_dump(mode="json"),
        training=opened.project.training.of("persona").model_dump(mode="json"),
    )
    kept: list[Outcome] = []

    def keep(outcome: Outcome) -> Sequence[Item]:
        kept.append(outcome)
        return ()

    carry_out(opened, [Item("check/model", "model", "check", task)], follow=keep, local=local, title="check")
    result = kept[0].result if kept else None
    return (None, kept[0].error if kept else "no worker answered") if result is None else (dict(result), None)


def check_model(found: Mapping[str, Any] | None, error: str | None) -> Section:
    """What is to be said of a worker's answer."""
    if found is None:
        why = (error or "").splitlines()[0] if error else "no answer"
        return Section("model", (Finding("bad", f"the base cannot be asked: {why}", "mend that first"),))
    findings = [*_fits(found["failed"]), *_losses(found), *_forms(found["forms"]), *_endings(found["answers"])]
    facts = {key: found[key] for key in ("base", "own", "failed", "forms", "answers", "speed")}
    return Section("model", tuple(findings), tuple(_said(found["answers"])), facts)


def _fits(failed: Mapping[str, str]) -> Iterator[Finding]:
    for why in sorted(set(failed.values())):
        names = [name for name, own in failed.items() if own == why]
        yield Finding("bad", f"cannot be used: {listed(names)}: {why.removeprefix(f'{names[0]}: ')}", _FORMAT)


def _losses(found: Mapping[str, Any]) -> Iterator[Finding]:
    """Own adapters against the base, on the answers that they were trained on."""
    base, own = found["base"], found["own"]
    if not own:
        text = f"the base's loss on training answers: {_mean(base):.2f} nats a token; no adapter to compare"
        yield Finding("ok", text)
        return
    better = [name for name, loss in own.items() if loss < base[name]]
    ours, theirs = _mean(own), _mean(base, list(own))
    text = f"own adapters on their own training answers: {ours:.2f} nats a token, the base {theirs:.2f}"
    if ours >= theirs or len(better) < len(own) / 2:
        text += f"; {len(better)} of {len(own)} beat it: prompts had another form in training, or it is another base"
        yield Finding("bad", text, _FORMAT)
    elif len(better) < len(own):
        worse = [name for name in own if name not in better]
        yield Finding("warn", f"{text}; worse than the base: {listed(worse)}", "look at these: they may be untrained")
    else:
        yield Finding("ok", f"{text}; all {len(own)} beat it" if len(own) > 1 else text)


def _forms(forms: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Whether the adapters were trained with another form of prompts: there their loss is lower, and so clearly that
    the base's own liking for the form does not explain it."""
    if len(forms) < 2:
        return
    given, others = forms[0], forms[1:]
    names = list(given["own"])
    best = min(others, key=lambda form: _mean(form["own"]))
    gain = _mean(given["base"], names) - _mean(given["own"])
    more = _mean(best["base"], names) - _mean(best["own"])
    agree = sum(best["own"][name] < given["own"][name] for name in names) / max(len(names), 1)
    if _mean(best["own"]) < (1 - _CLEARLY) * _mean(given["own"]) and more > gain and agree >= _MOST:
        text = (
            f"own adapters do better on prompts in the form {best['form']!r}: {_mean(best['own']):.2f} nats a token, "
            f"{_mean(given['own']):.2f} in the project's {given['form']!r}: that is not how they were trained"
        )
        todo = f"set generation.prompt_format as in their training; of those tried {best['form']!r} is nearest"
        yield Finding("bad", text, todo)


def _mean(losses: Mapping[str, float], names: Sequence[str] | None = None) -> float:
    return float(np.mean([losses[name] for name in (names if names is not None else losses)]))


def _endings(answers: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Whether answers end by themselves, and are there at all."""
    own = [answer["own"] for answer in answers if answer["own"] is not None]
    said = own or [answer["base"] for answer in answers]
    who = "own adapters'" if own else "the base's"
    ended = sum(bool(answer["ended"]) for answer in said)
    empty = sum(not answer["text"] for answer in said)
    if empty == len(said) and said:
        todo = "does the answer begin with an end token, or with a text of generation.stop?"
        yield Finding("warn", f"all of {who} answers are empty", todo)
    elif said and not ended:
        text = f"none of {who} {counted(len(said), 'answer')} ends by itself"
        yield Finding("warn", text, "give generation.stop, or more max_new_tokens") if own else Finding("ok", text)
    elif said:
        yield Finding("ok", f"{ended} of {who} {counted(len(said), 'answer')} end by themselves")


def _said(answers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for answer in answers:
        yield f"{short(answer['persona'], 20)} said {cut(answer['reference'], 40)!r}"
        for who in ("base", "own"):
            if answer[who] is not None:
                yield f"  {who}: {cut(answer[who]['text'], 50)!r}"


def speeds_of(speed: Mapping[str, Any], layers: Layers, adapted: int) -> Speeds:
    """Operations per second of a model worker, from a few real steps. adapted: numbers in the factors of an adapter."""
    train, answer = speed["train"], speed["answer"]
    prompts, answers = (np.array([pair[i] for pair in train["rows"]], np.int64) for i in (0, 1))
    widths = padded(prompts + answers, np.array(train["owners"], np.int64), train["batch"], together=False)
    trained = operations.training_operations(layers, adapted, rows_of(widths, answers))
    lengths = np.array(answer["prompts"], np.int64)
    widest = padded(lengths, np.zeros_like(lengths), len(lengths), together=True)
    answered = operations.answering_operations(layers, 0, widest, np.full_like(lengths, answer["new"]))
    encoder = GPU if speed["device"] == "cuda" else CPU_THREAD
    return Speeds(trained / train["seconds"], answered / answer["seconds"], encoder, source="calibrated")
