"""Base and adapters answer the same prompts in one batch, every row with its own adapter, and are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from raymerge.evaluation.capabilities import Respondent, Scores
from raymerge.evaluation.metrics import chrf, similarity
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.multilora import MultiLora
from raymerge.personas import render_prompt
from raymerge.pipelines.prompting.answers import Question
from raymerge.pipelines.prompting.file import Prompt

if TYPE_CHECKING:
    from raymerge.adapters import LoraAdapter
    from raymerge.models.base import BaseModel

ALL, OTHER = "all", "other"  # the capability of prompts that name none, where no prompt names one, and else
Progress = Callable[[str, int | None], Callable[[int], None]]
_T = TypeVar("_T")


def answer(
    question: Question,
    base: BaseModel,
    adapters: Sequence[LoraAdapter],
    prompts: Sequence[Prompt],
    progress: Progress,
) -> tuple[list[list[str]], list[list[float]]]:
    """Answers of the base (unless left out) and of each adapter to every prompt, and their nll of every reference.

    progress: called with what begins and its number of rows; returns what is called with rows that are done.
    """
    who = [*([-1] if question.with_base else []), *range(len(adapters))]
    settings = GenerationSettings(question.max_new_tokens, tuple(question.stop))
    texts = [render_prompt(asked.text, question.prompt_format, base.tokenizer) for asked in prompts]
    known = [(text, asked.reference) for text, asked in zip(texts, prompts, strict=True) if asked.reference is not None]
    lora = MultiLora(base.model)
    lora.load(adapters)
    try:
        index = [row for row in who for _ in texts]
        done = progress("answering", len(index))
        answers = generate(base, lora, texts * len(who), index, settings, question.batch_size, done)
        index = [row for row in who for _ in known]
        done = progress("reading the references", len(index))
        asked_for, references = [text for text, _ in known] * len(who), [reference for _, reference in known] * len(who)
        nll = score_references(base, lora, asked_for, references, index, question.batch_size, done)
    finally:
        lora.detach()
    return _cut(answers, len(texts), len(who)), _cut(nll, len(known), len(who))


def score(
    respondents: Sequence[Respondent],
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    nll: Sequence[Sequence[float]],
    encoder: Any,
) -> Scores:
    """Figures of all answers whose prompt has a reference. encoder: a sentence encoder, or None to leave similarity
    out."""
    scored = [number for number, asked in enumerate(prompts) if asked.reference is not None]
    generated = [texts[number] for texts in answers for number in scored]
    references = [prompts[number].reference or "" for number in scored] * len(respondents)
    shape = (len(respondents), len(scored))
    values = {}
    if encoder is not None:
        values["similarity"] = similarity(encoder, generated, references).astype(np.float64).reshape(shape)
    values["chrf"] = chrf(generated, references).astype(np.float64).reshape(shape)
    values["nll"] = np.asarray(nll, dtype=np.float64)
    unnamed = OTHER if any(asked.capability for asked in prompts) else ALL
    return Scores(tuple(respondents), tuple(prompts[number].capability or unnamed for number in scored), values)


def _cut(values: Sequence[_T], length: int, count: int) -> list[list[_T]]:
    return [list(values[i * length : (i + 1) * length]) for i in range(count)]
