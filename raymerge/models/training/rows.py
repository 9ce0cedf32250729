"""Rows as tokens, the order in which an adapter takes them, and how the rows of many adapters meet in a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymerge.errors import ModelError
from raymerge.models.answers import encode_rows
from raymerge.models.base import BaseModel
from raymerge.models.training.settings import TrainingSettings

Ints = NDArray[np.int64]

# What a batch of its own costs, in tokens: below this, padding is cheaper than a further pass through the model.
_PASS = {"cpu": 128, "cuda": 2048}

# Tokens of one step, without padding: enough to keep the products large, few enough to stay in the caches of a CPU.
_TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True, eq=False)
class Encoded:
    """One adapter's rows, sorted by length.

    ids: int64 (rows, longest), padded on the right. prompts, lengths: int64 (rows,), tokens of the prompt and of all.
    """

    ids: Ints
    prompts: Ints
    lengths: Ints

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def answers(self) -> Ints:
        """Answer tokens of each row, int64 (rows,)."""
        return self.lengths - self.prompts


@dataclass(frozen=True, eq=False)
class Taken:
    """What one adapter takes of its rows: `ranks`, int64 (n,), ascending."""

    rows: Encoded
    ranks: Ints

    @property
    def answer_tokens(self) -> int:
        """Answer tokens of the rows it takes."""
        return int(self.rows.answers[self.ranks].sum())


@dataclass(frozen=True)
class Limits:
    """What is computed at once, at most: rows of one adapter, and adapters. None is no limit."""

    rows: int | None = None
    slots: int | None = None


@dataclass(frozen=True, eq=False)
class Portion:
    """Rows that go through the model at once: of each slot equally many, slot after slot.

    slots: the slots, in the order of their rows. numbers: int64 (slots, rows), each row's place in its adapter's step.
    ids: int64 (slots * rows, width). places, targets: int64 (n,), flat indices of what predicts an answer token, and
    the token. tokens: without padding.
    """

    slots: tuple[int, ...]
    numbers: Tensor
    ids: Tensor
    places: Tensor
    targets: Tensor
    tokens: int


def encode(base: BaseModel, rows: Sequence[tuple[str, str]], settings: TrainingSettings, name: str) -> Encoded:
    """An adapter's rows as tokens, each answer closed with the end token.

    name: how errors begin. Raises ModelError, naming the row, if an answer is empty, or a row is longer than
    `max_length` (or what the base knows) and `truncate` is not set.
    """
    for number, (_, answer) in enumerate(rows):
        if not answer.strip():
            raise ModelError(
                f"{name}: row {number}: the answer is empty.\nThere is nothing to learn from it: remove it."
            )
    limit = row_limit(base.max_length, settings.max_length)
    prompts, answers = [prompt for prompt, _ in rows], [answer for _, answer in rows]
    try:
        found = encode_rows(base, prompts, answers, end=True, limit=limit, truncate=settings.truncate)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    for number, row in enumerate(found):
        if limit is not None and len(row) > limit:
            source = "training.max_length" if limit == settings.max_length else "what the base model knows"
            raise ModelError(
                f"{name}: row {number} has {len(row)} tokens, the limit is {limit}: set training.truncate, or shorten "
                f"it.\nThe limit is {source}. Rows are cut at the start of the prompt first."
            )
    found = sorted(found, key=len)
    ids = np.full((len(found), len(found[-1])), base.pad_id)
    for number, row in enumerate(found):
        ids[number, : len(row)] = row.prompt + row.answer
    return Encoded(ids, np.array([len(row.prompt) for row in found]), np.array([len(row) for row in found]))


def row_limit(known: int | None, wanted: int | None) -> int | None:
    """Most tokens of a row: the smaller of what the base knows and what is wanted; None is no limit."""
    return min((limit for limit in (known, wanted) if limit is not None), default=None)


def batch_order(rows: int, settings: TrainingSettings) -> list[Tensor]:
    """Which rows each step takes, by their rank in length: int64 (batch,) for each step of a whole training.

    Rows of similar length meet, so that little is padding; a jitter of the ranks changes the company from epoch to
    epoch, and the batches come in random order. All of it depends on (rows, seed, epoch) alone: adapters of equally
    many rows walk in step, and each as if it were alone.
    """
    epochs = (epoch_order(rows, epoch, settings.batch_size, settings.seed) for epoch in range(settings.epochs))
    return [torch.from_numpy(batch) for epoch in epochs for batch in epoch]


@lru_cache(maxsize=256)
def epoch_order(rows: int, epoch: int, batch_size: int, seed: int) -> tuple[Ints, ...]:
    """The batches of one epoch, as in `batch_order`."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch, rows]))
    jittered = np.argsort(np.arange(rows) + generator.uniform(0, batch_size, rows), kind="stable")
    count = math.ceil(rows / batch_size)
    batches = np.array_split(jittered, count)
    return tuple(np.sort(batches[i]) for i in generator.permutation(count))


def slots_of(rows: Sequence[Encoded], settings: TrainingSettings, kind: str) -> int:
    """How many adapters train at once: so many as fill a step, and equally many in each turn."""
    if not rows:
        return 0
    steps = sum(math.ceil(len(own) / settings.batch_size) for own in rows)
    share = min(1.0, (settings.micro_batch or settings.batch_size) / settings.batch_size)
    tokens = share * sum(int(own.lengths.sum()) for own in rows) / steps
    fitting = settings.together or max(1, int(_TOKENS.get(kind, _TOKENS["cuda"]) / tokens))
    return math.ceil(len(rows) / math.ceil(len(rows) / fitting))


def plan(taken: Mapping[int, Taken], limits: Limits, kind: str) -> list[list[tuple[int, Ints]]]:
    """Cut what slots take into passes through the model: for each pass, slots with places in what they take.

    kind: of device. An adapter's rows are cut where there are too many. Adapters stand in one pass unless so much of it
    would be padding that a second is cheaper.
    """
    pieces: list[list[tuple[int, Ints]]] = []
    for slot, own in sorted(taken.items(), key=lambda item: item[0]):
        count = math.ceil(len(own.ranks) / (limits.rows or len(own.ranks)))
        for number, places in enumerate(np.array_split(np.arange(len(own.ranks)), count)):
            if number == len(pieces):
                pieces.append([])
            pieces[number].append((slot, places))
    passes = []
    for piece in pieces:
        heights = np.array([len(places) for _, places in piece])
        widths = np.array([_longest(taken[slot], places) for slot, places in piece])
        for part in _cut(heights, widths, limits.slots or len(piece), _PASS.get(kind, _PASS["cuda"])):
            passes.append([piece[i] for i in part])
    return passes


def _cut(heights: Ints, widths: Ints, most: int, overhead: int) -> Iterator[list[int]]:
    """Deal blocks of (height, width) into passes of equal blocks, at the least cost in tokens.

    Sorted by width, neighbours share a pass; which of them is the shortest path over the places to cut at.
    """
    order = np.lexsort((heights, widths))
    count = len(order)
    high, wide = heights[order], widths[order]
    costs = np.zeros(count + 1)
    begins = np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):
        least = max(0, end - most)
        tallest = np.maximum.accumulate(high[least:end][::-1])[::-1]
        total = costs[least:end] + overhead + tallest * wide[end - 1] * np.arange(end - least, 0, -1)
        best = int(np.argmin(total))
        costs[end], begins[end] = total[best], least + best
    end = count
    while end:
        begin = int(begins[end])
        yield sorted(order[begin:end].tolist())
        end = begin


def _longest(own: Taken, places: Ints) -> int:
    return int(own.rows.lengths[own.ranks[places[-1]]])


def portion(taken: Mapping[int, Taken], parts: Sequence[tuple[int, Ints]]) -> Portion:
    """The tensors of one pass of `plan`, on the CPU.

    A slot with fewer rows than another repeats its first one; nothing is predicted there, so it counts for nothing.
    """
    height = max(len(places) for _, places in parts)
    width = max(_longest(taken[slot], places) for slot, places in parts)
    ids = np.empty((len(parts), height, width), dtype=np.int64)
    answer = np.zeros((len(parts), height, width), dtype=bool)
    numbers = np.zeros((len(parts), height), dtype=np.int64)
    columns = np.arange(width)
    tokens = 0
    for place, (slot, places) in enumerate(parts):
        rows, ranks, count = taken[slot].rows, taken[slot].ranks[places], len(places)
        have = min(width, rows.ids.shape[1])
        ids[place, :, have:] = 0
        ids[place, :count, :have] = rows.ids[ranks, :have]
        ids[place, count:] = ids[place, 0]
        lengths, prompts = rows.lengths[ranks, None], rows.prompts[ranks, None]
        answer[place, :count] = (columns >= prompts) & (columns < lengths)
        numbers[place, :count] = places
        tokens += int(lengths.sum())
    flat = np.flatnonzero(answer)
    return Portion(
        slots=tuple(slot for slot, _ in parts),
        numbers=torch.from_numpy(numbers),
        ids=torch.from_numpy(ids.reshape(-1, width)),
        places=torch.from_numpy(flat - 1),
        targets=torch.from_numpy(ids.reshape(-1)[flat]),
        tokens=tokens,
    )
