"""Retrieval in the prompt: before a persona is asked, its own training examples that are most like the question.

Only the split `train` is looked at, and never the example that is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymerge.models.answers import encode_prompts
from raymerge.models.base import BaseModel
from raymerge.personas import Example, Turn, render_prompt
from raymerge.routing.embeddings import Encoder, encode
from raymerge.runtime.tasks import Retrieval


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts. examples: how many they hold together. dropped: how many the context had no room for."""

    texts: Sequence[str]
    examples: int = 0
    dropped: int = 0


def nearest(
    known: Mapping[str, Sequence[Example]], rows: Sequence[Example], count: int, encoder: Encoder
) -> list[tuple[Example, ...]]:
    """For each row the examples of its persona with the most similar prompts, the most similar last.

    known: the training examples of each persona; a persona without any gets none. Similarity is the cosine of the
    encoder's embeddings; of equals the earlier one counts as more similar. Fewer than `count` where there are fewer.
    """
    texts = sorted({e.prompt for e in rows} | {e.prompt for examples in known.values() for e in examples})
    place = {text: number for number, text in enumerate(texts)}
    vectors = encode(encoder, texts).astype(np.float64)
    of_persona = {name: vectors[[place[e.prompt] for e in examples]] for name, examples in known.items() if examples}
    found: list[tuple[Example, ...]] = []
    for row in rows:
        if row.persona not in of_persona:
            found.append(())
            continue
        cosines = (of_persona[row.persona] * vectors[place[row.prompt]]).sum(1)
        order = [known[row.persona][i] for i in np.argsort(-cosines, kind="stable")]
        others = [e for e in order if e.content != row.content]
        found.append(tuple(reversed(others[:count])))
    return found


def render_with_examples(
    row: Example, examples: Sequence[Example], form: str, prompt_format: str, tokenizer: Any = None
) -> str:
    """A row's prompt with examples before it, each rendered by `form`; with prompt_format `chat` as turns, which come
    after a system's and bring none of their own. Without examples it is the plain prompt."""
    if not examples:
        return render_prompt(row.asked, prompt_format, tokenizer)
    if prompt_format == "chat":
        asked = _turns(row)
        systems = [turn for turn in asked if turn.role == "system"]
        turns = [turn for e in examples for turn in [*_without_systems(_turns(e)), Turn("assistant", e.response)]]
        return render_prompt([*systems, *turns, *_without_systems(asked)], prompt_format, tokenizer)
    text = render_prompt(row.asked, prompt_format, tokenizer)
    before = "".join(_filled(form, e) for e in examples)
    opening = getattr(tokenizer, "bos_token", None) or ""
    if opening and text.startswith(opening):
        return opening + before + text.removeprefix(opening)
    return before + text


def fit(
    rows: Sequence[Example],
    found: Sequence[Sequence[Example]],
    retrieval: Retrieval,
    prompt_format: str,
    base: BaseModel,
    room: int | None,
) -> Prompts:
    """Prompts of rows with what was found for each, without the least similar examples where the context is full.

    room: tokens that a prompt may have; None is no limit. A prompt that is too long by itself gets no example.
    """
    held = [list(examples) for examples in found]
    texts = [""] * len(rows)
    open_rows = list(range(len(rows)))
    dropped = 0
    while open_rows:
        for i in open_rows:
            texts[i] = render_with_examples(rows[i], held[i], retrieval.format, prompt_format, base.tokenizer)
        lengths = [len(tokens) for tokens in encode_prompts(base, [texts[i] for i in open_rows])]
        open_rows = [i for i, n in zip(open_rows, lengths, strict=True) if room is not None and n > room and held[i]]
        for i in open_rows:
            del held[i][0]
        dropped += len(open_rows)
    return Prompts(texts, sum(len(examples) for examples in held), dropped)


def _turns(example: Example) -> tuple[Turn, ...]:
    return example.turns or (Turn("user", example.prompt),)


def _without_systems(turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.role != "system"]


def _filled(form: str, example: Example) -> str:
    texts = {"{prompt}": example.prompt, "{response}": example.response}
    return re.sub(r"\{prompt\}|\{response\}", lambda found: texts[found[0]], form)  # once: texts may hold braces
