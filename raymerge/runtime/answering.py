"""What evaluation and tuning share: what is asked, how the prompts begin, and who answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge.models.base import BaseModel
from raymerge.models.generation import Attached, Choice, GenerationSettings, generate, score_references
from raymerge.models.multilora import MultiLora
from raymerge.models.prefix import Prefixes
from raymerge.personas import Example, read_personas, render_prompt
from raymerge.runtime.retrieval import Prompts, fit, nearest
from raymerge.runtime.sources import Answerer, Resident
from raymerge.runtime.tasks import Asking


@dataclass(frozen=True)
class Questions:
    """The examples that a task has answered. known: each persona's training examples, where retrieval looks for them.

    dtype: of the base on this worker.
    """

    task: Asking
    examples: Mapping[str, Sequence[Example]]
    known: Mapping[str, Sequence[Example]]
    dtype: str

    @cached_property
    def key(self) -> dict[str, Any]:
        """What decides the answers beside their sources, for digests."""
        task = self.task
        key = {
            "examples": {p: [e.content for e in rows] for p, rows in self.examples.items()},
            "generation": dict(task.generation),
            "similarity_model": task.similarity_model,
            "batch_size": task.batch_size,
            "base": task.base_digest,
            "dtype": self.dtype,
        }
        if task.retrieval is not None:
            settings = [task.retrieval.examples, task.retrieval.format, task.retrieval.model]
            key["retrieval"] = [settings, {p: [e.content for e in rows] for p, rows in self.known.items()}]
        return key


def gather_questions(task: Asking, personas: Iterable[str], dtype: str) -> Questions:
    """The examples of some personas that a task looks at. Raises PersonaError for an unknown persona."""
    everybody = read_personas(task.personas)
    names = list(personas)
    examples = {name: everybody.examples(name, task.split)[: task.most] for name in names}
    known = {name: everybody.examples(name, "train") for name in names} if task.retrieval is not None else {}
    return Questions(task, examples, known, dtype)


def numbered(rows: Sequence[Example]) -> list[int]:
    """The number of each row among those of its persona."""
    counted: Counter[str] = Counter()
    numbers = []
    for row in rows:
        numbers.append(counted[row.persona])
        counted[row.persona] += 1
    return numbers


class Prompter:
    """Renders the prompts of rows. What retrieval finds for them is looked for once."""

    def __init__(self, questions: Questions, rows: Sequence[Example], worker: Any) -> None:
        self.task = questions.task
        self.rows = rows
        self.base: BaseModel = worker.base
        retrieval = self.task.retrieval
        self.found: list[tuple[Example, ...]] = []
        if retrieval is not None:
            self.found = nearest(questions.known, rows, retrieval.examples, worker.encoder(retrieval.model))

    def prompts(self, rows: Sequence[int], taken: int = 0) -> Prompts:
        """The prompts of some rows, by number. taken: places of the context that a prefix has."""
        form, retrieval = self.task.generation["prompt_format"], self.task.retrieval
        chosen = [self.rows[i] for i in rows]
        if retrieval is None:
            return Prompts([render_prompt(e.asked, form, self.base.tokenizer) for e in chosen])
        limit = self.base.max_length
        room = None if limit is None else limit - self.task.generation["max_new_tokens"] - taken
        return fit(chosen, [self.found[i] for i in rows], retrieval, form, self.base, room)


def answer(
    task: Asking,
    base: BaseModel,
    resident: Resident,
    answerers: Sequence[Answerer],
    prompts: Sequence[str],
    references: Sequence[str] | None = None,
) -> tuple[list[str], NDArray[np.float64]]:
    """Each prompt's answer by its answerer; and what each reference costs, in nats per token, where they are given.

    Rows with a prefix and rows with adapters are answered apart.
    """
    answers = [""] * len(prompts)
    nats = np.zeros(len(prompts), dtype=np.float64)
    settings = GenerationSettings(max_new_tokens=task.generation["max_new_tokens"], stop=tuple(task.generation["stop"]))
    parts: dict[bool, list[int]] = {}
    for number, one in enumerate(answerers):
        parts.setdefault(one.prefix is not None, []).append(number)
    for part in parts.values():
        texts = [prompts[i] for i in part]
        with _attached(base, resident, [answerers[i] for i in part]) as (attached, chosen):
            for i, text in zip(part, generate(base, attached, texts, chosen, settings, task.batch_size), strict=True):
                answers[i] = text
            if references is not None:
                wanted = [references[i] for i in part]
                nats[part] = score_references(base, attached, texts, wanted, chosen, task.batch_size)
    return answers, nats


@contextmanager
def _attached(base: BaseModel, resident: Resident, answerers: Sequence[Answerer]) -> Iterator[tuple[Attached, Choice]]:
    """What is resident on the model, and what of it answers for each row: all of them have a prefix, or none has."""
    prefixes = [one.prefix for one in answerers if one.prefix is not None]
    attached: MultiLora | Prefixes
    if prefixes:
        attached = Prefixes(base.model)
        attached.load([prefix.embeddings for prefix in resident.prefixes])
    elif resident.adapters:
        attached = MultiLora(base.model)
        attached.load(resident.adapters)
    else:
        yield None, None
        return
    try:
        yield attached, prefixes or resident.choose(answerers)
    finally:
        attached.detach()
