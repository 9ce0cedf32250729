"""Prompts as the model sees them: three of them in full, their lengths, and what is wrong with any."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge.models.answers import encode_rows
from raymerge.models.base import BaseModel
from raymerge.personas import SPLITS, Example, Personas, Split, render_prompt
from raymerge.pipelines.checking.finding import Finding, Section, counted
from raymerge.pipelines.opening import Opened

MOST = 50_000  # rows that are looked at: all where there are no more; else the longest and every n-th of the others
_LONGEST = 5_000
_PORTION = 2_000


@dataclass(frozen=True)
class Rendered:
    """An example as token ids say it, special tokens and end token written out."""

    which: str
    persona: str
    prompt: str
    answer: str
    prompt_tokens: int
    answer_tokens: int

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return dict(self.__dict__)


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of the rows looked at, the end token with the answer. owner: number of the persona among all names.
    weight: how many rows of the file each stands for."""

    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    split: NDArray[np.int64]
    owner: NDArray[np.int64]
    weight: NDArray[np.float64]

    def where(self, chosen: NDArray[np.bool_]) -> Lengths:
        """Those that are chosen."""
        return Lengths(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def of(self, split: Split) -> Lengths:
        """Those of one split."""
        return self.where(self.split == SPLITS.index(split))

    def mean(self, values: NDArray[Any]) -> float:
        """Mean over the rows of the file of what is known of each row looked at; 0 where there is none."""
        return float(np.average(values, weights=self.weight)) if len(values) else 0.0


@dataclass(frozen=True)
class Prompts:
    """What was found, three examples, and the lengths."""

    section: Section
    examples: tuple[Rendered, ...]
    lengths: Lengths


@dataclass(frozen=True, eq=False)
class _Looked:
    examples: Sequence[Example]
    lengths: Lengths
    doubled: Sequence[int]
    everything: bool


def check_prompts(opened: Opened, personas: Personas, base: BaseModel) -> Prompts:
    """Render and tokenise the examples. Raises ProjectError for `chat` where the tokenizer has no template."""
    looked = _look(opened, personas, base)
    findings = [_overview(looked, base)]
    findings += [*_doubled(looked, base), *_too_long(opened, looked, base)]
    shown = tuple(_rendered(opened, base, which, looked.examples[row]) for which, row in _three(looked).items())
    facts = {
        "prompt_format": opened.project.generation.prompt_format,
        "context": base.max_length,
        "rows_looked_at": len(looked.examples),
        "doubled_opening": len(looked.doubled),
        "longest": int((looked.lengths.prompt + looked.lengths.answer).max(initial=0)),
        "examples": [example.to_json() for example in shown],
    }
    return Prompts(Section("prompts", tuple(findings), (), facts), shown, looked.lengths)


def _look(opened: Opened, personas: Personas, base: BaseModel) -> _Looked:
    everybody = [e for name in personas.names for e in personas.examples(name)]
    chosen, weight = _chosen([len(e.prompt.encode()) + len(e.response.encode()) for e in everybody])
    examples = [everybody[i] for i in chosen]
    prompt, answer, doubled = [], [], []
    for start in range(0, len(examples), _PORTION):
        part = examples[start : start + _PORTION]
        texts = _prompts(opened, base, part)
        rows = encode_rows(base, texts, [e.response for e in part], end=True, limit=sys.maxsize)
        prompt += [len(row.prompt) for row in rows]
        answer += [len(row.answer) for row in rows]
        opening = base.tokenizer.bos_token_id
        doubled += [start + i for i, row in enumerate(rows) if opening is not None and row.prompt[:2] == (opening,) * 2]
    split = np.array([SPLITS.index(e.split) for e in examples], dtype=np.int64)
    places = {name: number for number, name in enumerate(personas.names)}
    owner = np.array([places[e.persona] for e in examples], dtype=np.int64)
    lengths = Lengths(np.array(prompt, np.int64), np.array(answer, np.int64), split, owner, weight)
    return _Looked(examples, lengths, doubled, len(examples) == len(everybody))


def _prompts(opened: Opened, base: BaseModel, examples: Sequence[Example]) -> list[str]:
    written = opened.project.generation.prompt_format
    return [render_prompt(e.asked, written, base.tokenizer) for e in examples]


def _chosen(sizes: Sequence[int]) -> tuple[list[int], NDArray[np.float64]]:
    """Which rows to look at, in order, and how many rows each stands for. sizes: of the rows, in bytes."""
    if len(sizes) <= MOST:
        return list(range(len(sizes))), np.ones(len(sizes))
    order = np.argsort(-np.asarray(sizes), kind="stable")
    rest = order[_LONGEST:]
    spread = rest[:: -(-len(rest) // (MOST - _LONGEST))]
    weights = dict.fromkeys(order[:_LONGEST].tolist(), 1.0) | dict.fromkeys(spread.tolist(), len(rest) / len(spread))
    chosen = sorted(weights)
    return chosen, np.array([weights[i] for i in chosen])


def _three(looked: _Looked) -> dict[str, int]:
    """The first training row, the one of median length and the longest, by their places."""
    rows = np.flatnonzero(looked.lengths.split == 0)
    rows = rows if len(rows) else np.arange(len(looked.examples))
    order = rows[np.argsort((looked.lengths.prompt + looked.lengths.answer)[rows], kind="stable")]
    return {"first": int(rows[0]), "median": int(order[len(order) // 2]), "longest": int(order[-1])}


def _rendered(opened: Opened, base: BaseModel, which: str, example: Example) -> Rendered:
    text = _prompts(opened, base, [example])
    (row,) = encode_rows(base, text, [example.response], end=True, limit=sys.maxsize)
    prompt, answer = (base.tokenizer.decode(list(part), skip_special_tokens=False) for part in (row.prompt, row.answer))
    return Rendered(which, example.persona, prompt, answer, len(row.prompt), len(row.answer))


def _overview(looked: _Looked, base: BaseModel) -> Finding:
    lengths = looked.lengths
    many = "" if looked.everything else f" (of {len(looked.examples):,} rows looked at, the longest among them)"
    total = lengths.prompt + lengths.answer
    context = f"{base.max_length:,}" if base.max_length else "without limit"
    text = (
        f"tokens: prompt {lengths.mean(lengths.prompt):.0f}, answer {lengths.mean(lengths.answer):.0f} on average, "
        f"longest row {int(total.max()):,}{many}; context {context}"
    )
    return Finding("ok", text)


def _doubled(looked: _Looked, base: BaseModel) -> Iterator[Finding]:
    if looked.doubled:
        opening = base.tokenizer.bos_token
        text = f"{counted(len(looked.doubled), 'prompt')} begin with {opening}{opening}: the opening token is doubled"
        yield Finding("bad", text, f"take {opening} out of prompt_format, or what stands before it there")


def _too_long(opened: Opened, looked: _Looked, base: BaseModel) -> Iterator[Finding]:
    """Training rows that do not fit, and prompts that leave no room for an answer."""
    training, lengths = opened.project.training, looked.lengths
    limit = min((most for most in (training.max_length, base.max_length) if most is not None), default=None)
    total = lengths.prompt + lengths.answer
    least = "" if looked.everything else "at least "
    if limit is not None:
        over = np.flatnonzero((total > limit) & (lengths.split != SPLITS.index("test")))
        if len(over):
            row = int(over[np.argmax(total[over])])
            where = f"the worst {total[row]:,} tokens, of {looked.examples[row].persona}"
            text = f"{least}{counted(len(over), 'training or validation row')} longer than {limit:,} tokens, {where}"
            if training.truncate:
                yield Finding("warn", text, "training cuts the start of their prompts, since training.truncate is set")
            else:
                yield Finding("bad", text, "training refuses them: leave them out, or set training.truncate")
    if base.max_length is not None:
        room = max(1, base.max_length - opened.project.generation.max_new_tokens)
        over = np.flatnonzero((lengths.prompt > room) & (lengths.split != SPLITS.index("train")))
        if len(over):
            row = int(over[np.argmax(lengths.prompt[over])])
            text = (
                f"{least}{counted(len(over), 'prompt')} to be answered longer than the {room:,} tokens that "
                f"max_new_tokens leaves, the worst {lengths.prompt[row]:,}, of {looked.examples[row].persona}"
            )
            yield Finding("warn", text, "they lose their start; lower generation.max_new_tokens, or shorten them")
