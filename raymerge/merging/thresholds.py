"""The values at given places of a large matrix if it were sorted, exactly, from tiles of it and without sorting it.

A random sample brackets each value; one pass over the tiles counts what lies above the bracket and collects what lies
in it; the value is picked among those. Where a bracket misses (about once in 10,000), a second pass uses a wider one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FEW = 2**17  # entries that are collected as they are: no bracket is worth its sample
_SIGMAS = 4.0  # half the width of a bracket, in standard deviations of the sample's quantile

Tiles = Callable[[], Iterable[Tensor]]
_Array = npt.NDArray[Any]


def largest(tiles: Tiles, count: int, places: Sequence[int], sample: Tensor | None = None) -> list[float]:
    """The values at some places in descending order; place 1 is the largest.

    tiles: all entries, `count` in all, never negative, float32 or float64, on the CPU or not; called once or twice.
    A tile is not kept, so the next may overwrite it. sample: values of entries drawn independently; without one, or
    for few entries, all are collected, as they are on an accelerator, which sorts faster than it counts.
    """
    if sample is not None and sample.device.type != "cpu":
        values = torch.cat([tile.flatten().clone() for tile in tiles()])
        return [float(values.kthvalue(count + 1 - place).values) for place in places]
    ordered = None if sample is None or count <= FEW else np.sort(sample.numpy())[::-1]
    brackets = [_bracket(ordered, place, count) for place in places]
    _pass(tiles, brackets)
    missed = [bracket for bracket in brackets if not bracket.holds]
    if missed:
        for bracket in missed:
            bracket.widen()
        _pass(tiles, missed)
    return [bracket.value() for bracket in brackets]


@dataclass
class _Bracket:
    """Values from low to high, both within. above: how many are larger than high; reaching: how many are not below
    low; inside: those between, unless low and high are one value."""

    place: int
    low: float
    high: float
    above: int = 0
    reaching: int = 0
    inside: list[_Array] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return self.above < self.place <= self.reaching

    def widen(self) -> None:
        """Open it on the side where the value is."""
        self.low, self.high = (self.high, math.inf) if self.place <= self.above else (0.0, self.low)
        self.above, self.reaching, self.inside = 0, 0, []

    def value(self) -> float:
        if self.low == self.high:
            return self.low
        values = np.concatenate(self.inside)
        index = len(values) - (self.place - self.above)
        values.partition(index)
        return float(values[index])


def _bracket(ordered: _Array | None, place: int, count: int) -> _Bracket:
    if ordered is None:
        return _Bracket(place, 0.0, math.inf)
    share = place / count
    middle = share * len(ordered)
    margin = _SIGMAS * math.sqrt(middle * (1 - share)) + 2
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    high = float(ordered[first]) if first >= 0 else math.inf
    low = float(ordered[last]) if last < len(ordered) else 0.0
    return _Bracket(place, low, high)


def _pass(tiles: Tiles, brackets: Sequence[_Bracket]) -> None:
    masks = np.empty((2, 0), np.bool_)
    for tile in tiles():
        values = tile.cpu().numpy().reshape(-1)
        if masks.shape[1] != values.size:
            masks = np.empty((2, values.size), np.bool_)
        reaching, above = masks
        for bracket in brackets:
            np.greater_equal(values, values.dtype.type(bracket.low), out=reaching)
            np.greater(values, values.dtype.type(bracket.high), out=above)
            bracket.reaching += int(np.count_nonzero(reaching))
            bracket.above += int(np.count_nonzero(above))
            if bracket.low < bracket.high:
                bracket.inside.append(values[np.logical_xor(reaching, above, out=reaching)])
