"""A check on a model worker: do own adapters beat the base on what they were trained on, and how fast is the worker?

An adapter that was trained on these prompts in this form has a lower loss on its own training answers than the base. If
it has not, the prompts are rendered in another form than they were, or this is another base. Adapters learn how answers
sound even of prompts in a form they are not asked in, so that other common forms are tried too: in the one that it was
trained on, an adapter has its lowest loss and the largest lead over the base.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raymerge.errors import PersonaError
from raymerge.models.answers import encode_rows
from raymerge.models.base import BaseModel
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.layers import linear_modules
from raymerge.models.multilora import MultiLora, check_fits
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.models.training.rows import row_limit
from raymerge.personas import Example, Personas, read_personas, render_prompt
from raymerge.runtime.experts import first_line
from raymerge.runtime.sources import UNUSABLE
from raymerge.runtime.tasks import CheckTask

ROWS = 12  # training rows of a persona that are scored,
ROWS_OF_FORMS = 6  # and those of them in other forms
FORMS = (  # that prompts are commonly rendered in
    "{prompt}", "{prompt}\n", "{prompt} ", "### Instruction:\n{prompt}\n\n### Response:\n",
    "Question: {prompt}\nAnswer:", "User: {prompt}\nAssistant:", "<s>[INST] {prompt} [/INST]", "chat",
)  # fmt: skip
_BEYOND = 8  # tokens an answer is given more, to see whether it ends by itself
_LONG_ENOUGH_S = 3.0  # a measurement of so many seconds is not repeated with more
_ADAPTERS = (1, 4, 8)  # trained at once in a calibration, the next number where the one before was quick
_ANSWERS = 32  # in a calibration


@dataclass(frozen=True)
class _Scored:
    """Nats per token of training answers, by persona: of the base, and of each persona's own adapter."""

    base: dict[str, float]
    own: dict[str, float]


@dataclass(frozen=True)
class _Asked:
    """A base with own adapters, and training rows by persona. lora: None where there is no adapter. numbers: persona ->
    place of its own adapter."""

    base: BaseModel
    lora: MultiLora | None
    numbers: Mapping[str, int]
    rows: Mapping[str, Sequence[Example]]
    task: CheckTask

    @property
    def form(self) -> str:
        """In which the project renders prompts."""
        return str(self.task.generation["prompt_format"])


def check_model(task: CheckTask, worker: Any) -> dict[str, Any]:
    """Losses, answers and speeds of a base and of some of the adapters trained on it. Figures and a few texts."""
    base: BaseModel = worker.base
    personas = read_personas(task.personas)
    adapters, failed = _read(task, worker, base)
    rows = {name: _evenly(personas.examples(name, "train"), ROWS) for name in task.names}
    lora = MultiLora(base.model) if adapters else None
    try:
        if lora is not None:
            lora.load(list(adapters.values()))
        numbers = {name: number for number, name in enumerate(adapters)}
        asked = _Asked(base, lora, numbers, rows, task)
        scored = _score(asked, rows, asked.form)
        return {
            "base": scored.base,
            "own": scored.own,
            "failed": failed,
            "forms": _forms(asked) if numbers else [],
            "answers": _answers(asked),
            "speed": _speed(base, personas, task),
        }
    finally:
        if lora is not None:
            lora.detach()


def _read(task: CheckTask, worker: Any, base: BaseModel) -> tuple[dict[str, Any], dict[str, str]]:
    """Adapters that fit the base, by name; and the others -> why."""
    linear = linear_modules(base.model)
    found, failed = {}, {}
    for name, location in task.adapters:
        try:
            adapter = worker.cache.read(name, location, base=worker.base_model or None)
            adapter.require_plain("cannot be scored")
            check_fits(name, adapter.headers, linear)
            found[name] = adapter
        except UNUSABLE as error:
            failed[name] = first_line(error)
    return found, failed


def _evenly(examples: Sequence[Example], most: int) -> list[Example]:
    places = np.unique(np.linspace(0, len(examples) - 1, min(most, len(examples))).round().astype(int))
    return [examples[i] for i in places]


def _score(asked: _Asked, rows: Mapping[str, Sequence[Example]], form: str) -> _Scored:
    """Losses of some of the rows in one form of prompts."""
    base, lora, numbers = asked.base, asked.lora, asked.numbers
    flat = [(name, e) for name, examples in rows.items() for e in examples]
    prompts = [render_prompt(e.asked, form, base.tokenizer) for _, e in flat]
    answers = [e.response for _, e in flat]
    owners = [name for name, _ in flat]
    of_base = _means(owners, score_references(base, None, prompts, answers, None))
    if lora is None:
        return _Scored(of_base, {})
    chosen = [numbers.get(name, -1) for name in owners]
    of_own = _means(owners, score_references(base, lora, prompts, answers, chosen))
    return _Scored(of_base, {name: value for name, value in of_own.items() if name in numbers})


def _means(owners: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for owner, value in zip(owners, values, strict=True):
        found.setdefault(owner, []).append(value)
    return {owner: float(np.mean(own)) for owner, own in found.items()}


def _forms(asked: _Asked) -> list[dict[str, Any]]:
    """Losses of the same rows in the project's form, which comes first, and in others."""
    few = {name: examples[:ROWS_OF_FORMS] for name, examples in asked.rows.items() if name in asked.numbers}
    has_template = getattr(asked.base.tokenizer, "chat_template", None) is not None
    forms = dict.fromkeys([asked.form, *(form for form in FORMS if form != "chat" or has_template)])
    found = []
    for form in forms:
        scored = _score(asked, few, form)
        found.append({"form": form, "base": scored.base, "own": scored.own})
    return found


def _answers(asked: _Asked) -> list[dict[str, Any]]:
    """What base and own adapter say to a training prompt of each of a few personas, and whether they end."""
    base, numbers, task = asked.base, asked.numbers, asked.task
    few = [(name, examples[0]) for name, examples in asked.rows.items() if examples][: task.answers]
    prompts = [render_prompt(e.asked, asked.form, base.tokenizer) for _, e in few]
    said = _ended(base, None, prompts, None, task)
    own = [numbers.get(name, -1) for name, _ in few]
    of_own = _ended(base, asked.lora, prompts, own, task) if numbers else [None] * len(few)
    return [
        {"persona": name, "prompt": prompt, "reference": e.response, "base": by_base, "own": by_own}
        for (name, e), prompt, by_base, by_own in zip(few, prompts, said, of_own, strict=True)
    ]


def _ended(
    base: BaseModel, lora: MultiLora | None, prompts: Sequence[str], chosen: Sequence[int] | None, task: CheckTask
) -> list[dict[str, Any]]:
    """Answers, and whether each ends by itself: then it is the same when it is given more tokens."""
    settings = _settings(task)
    answers = generate(base, lora, prompts, chosen, settings)
    longer = generate(base, lora, prompts, chosen, replace(settings, max_new_tokens=settings.max_new_tokens + _BEYOND))
    return [{"text": text, "ended": text == more} for text, more in zip(answers, longer, strict=True)]


def _settings(task: CheckTask) -> GenerationSettings:
    return GenerationSettings(task.generation["max_new_tokens"], tuple(task.generation["stop"]))


def _speed(base: BaseModel, personas: Personas, task: CheckTask) -> dict[str, Any]:
    """Seconds of a few real steps of training and of a batch of answers, with the lengths of what was computed."""
    examples = [e for name in task.names for e in personas.examples(name, "train")]
    if not examples:
        raise PersonaError("nobody has training examples, so nothing can be timed.")
    rows = [(render_prompt(e.asked, task.generation["prompt_format"], base.tokenizer), e.response) for e in examples]
    return {
        "device": base.device.type,
        "train": _time_training(base, rows, task),
        "answer": _time_answers(base, rows, task),
    }


def _time_training(base: BaseModel, rows: Sequence[tuple[str, str]], task: CheckTask) -> dict[str, Any]:
    known = {k: v for k, v in task.training.items() if k in TrainingSettings.__dataclass_fields__}
    targets = known["target_modules"]
    known |= {"epochs": 1, "truncate": True, "patience": None}
    settings = TrainingSettings(**{**known, "target_modules": targets if isinstance(targets, str) else tuple(targets)})
    once = rows[: settings.batch_size]
    train(base, [TrainingGroup("warm-up", once[:2])], settings)  # kernels are chosen and memory is had
    found: dict[str, Any] = {}
    for count in _ADAPTERS:
        own = [_turned(rows, number, 2 * settings.batch_size) for number in range(count)]
        start = time.perf_counter()
        train(base, [TrainingGroup(f"{number}", part) for number, part in enumerate(own)], settings)
        seconds = time.perf_counter() - start
        limit = row_limit(base.max_length, settings.max_length)
        encoded = [_lengths(base, part, limit) for part in own]
        found = {"seconds": seconds, "batch": settings.batch_size, "rows": [pair for one in encoded for pair in one],
                 "owners": [number for number, one in enumerate(encoded) for _ in one]}  # fmt: skip
        if seconds > _LONG_ENOUGH_S:
            break
    return found


def _turned(rows: Sequence[tuple[str, str]], start: int, count: int) -> list[tuple[str, str]]:
    """So many rows from a place on, going round."""
    return [rows[(start * count + i) % len(rows)] for i in range(min(count, len(rows)))]


def _lengths(base: BaseModel, rows: Sequence[tuple[str, str]], limit: int | None) -> list[tuple[int, int]]:
    encoded = encode_rows(base, [p for p, _ in rows], [a for _, a in rows], end=True, limit=limit)
    return [(len(row.prompt), len(row.answer)) for row in encoded]


def _time_answers(base: BaseModel, rows: Sequence[tuple[str, str]], task: CheckTask) -> dict[str, Any]:
    some = _turned(rows, 0, _ANSWERS)
    settings = _settings(task)
    generate(base, None, [some[0][0]], None, replace(settings, max_new_tokens=2))
    start = time.perf_counter()
    answers = generate(base, None, [prompt for prompt, _ in some], None, settings, batch_size=_ANSWERS)
    seconds = time.perf_counter() - start
    texts = [(prompt, answer or " ") for (prompt, _), answer in zip(some, answers, strict=True)]
    new = min(settings.max_new_tokens, max(made for _, made in _lengths(base, texts, None)))
    return {"seconds": seconds, "prompts": [length for length, _ in _lengths(base, some, None)], "new": new}
