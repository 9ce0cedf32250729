"""Which entries of an expert's delta are kept: the first half of the sparse methods.

A sparsifier looks at one expert and answers with its cut, which is applied in place to any tile of the delta, or None
where all entries stay. Cuts scale with the delta, so they may be applied to a delta times its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from raymerge.merging.masks import WHOLE, Draw
from raymerge.merging.thresholds import FEW, largest
from raymerge.merging.tiles import Expert, Experts

Cut = Callable[[Tensor, slice], None]
"""Cuts a tile in place. The slice: its rows in the delta."""

Sparsifier = Callable[[Experts, Expert], Cut | None]

_shrink = torch.ops.aten.hardshrink.out


def share_of(density: float, count: int) -> int:
    """How many entries a density keeps: rounded to the nearest, at least one."""
    return min(max(round(density * count), 1), count)


def magnitude(density: float) -> Sparsifier:
    """Keep the largest |entries|, `share_of` all; those equal to the last one of them are kept too."""
    return outliers(density, 0.0)


def outliers(density: float, gamma: float) -> Sparsifier:
    """Drop the share gamma of all entries, the largest; of the others keep the largest, so that `share_of` all remain.

    Where too few would be left, fewer are dropped. Entries as large as the smallest or the largest of those that
    remain are kept too.
    """

    def cut_of(experts: Experts, expert: Expert) -> Cut | None:
        out, into = experts.site.shape
        count = out * into
        kept = share_of(density, count)
        dropped = min(math.floor(gamma * count + 1e-9), count - kept)  # 0.29 * 100 < 29
        if kept == count or not expert.products:
            return None
        places = [dropped + kept, *([dropped + 1] if dropped else [])]
        sample = experts.sampled(expert) if count > FEW else None
        low, *high = largest(experts.magnitudes(expert), count, places, sample)
        below = _before(low, experts.dtype)

        def cut(tile: Tensor, rows: slice) -> None:
            if low > 0:
                _shrink(tile, below, out=tile)  # keeps what is larger than `below`
            for limit in high:
                tile.sub_(hardshrink(tile, limit))

        return cut

    return cut_of


def _before(value: float, dtype: torch.dtype) -> float:
    """The number just below."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    return float(np.nextafter(kind(value), kind(0)))


def random(density: float, seed: int, module: str) -> Sparsifier:
    """Keep each entry with a probability, `density`, and divide it by that."""
    last = min(max(round(density * WHOLE), 1), WHOLE) - 1  # of the numbers that keep an entry

    def cut_of(experts: Experts, expert: Expert) -> Cut | None:
        if last + 1 == WHOLE:
            return None
        draw = Draw.of(seed, expert.name, module)
        limit, rescale = np.uint32(last), WHOLE / (last + 1)

        def cut(tile: Tensor, rows: slice) -> None:
            _apply(tile, draw.numbers(rows, tile.shape[1]) <= limit)
            tile.mul_(rescale)

        return cut

    return cut_of


def ranked(density: float, epsilon: float, seed: int, module: str) -> Sparsifier:
    """Keep each entry with a probability that rises with its rank in its row, and divide it by that (DELLA).

    In each row the smallest |entry| has the probability density - epsilon / 2, the largest density + epsilon / 2, and
    those between lie on a line by rank; equal ones rank by column, and |entries| are compared in float32. The range is
    narrowed, about the density, where it would reach above 1 or below half the density.
    """
    half = min(epsilon / 2, 1 - density, density / 2)
    if half == 0:
        return random(density, seed, module)

    def cut_of(experts: Experts, expert: Expert) -> Cut | None:
        columns = experts.site.shape[1]
        draw = Draw.of(seed, expert.name, module)
        line = np.linspace(-half, half, columns) if columns > 1 else np.zeros(1)
        last = (np.clip(np.round((density + line) * WHOLE), 1, WHOLE) - 1).astype(np.uint32)
        rescale = (WHOLE / (last + 1.0)).astype(np.float64 if experts.dtype == torch.float64 else np.float32)

        def cut(tile: Tensor, rows: slice) -> None:
            places = _by_magnitude(tile)
            numbers = torch.from_numpy(draw.numbers(rows, columns).view(np.int32))
            kept = torch.gather(numbers, 1, places).numpy().view(np.uint32) <= last
            factors = torch.from_numpy(rescale * kept)
            tile.mul_(torch.empty_like(factors).scatter_(1, places, factors).to(tile.device))

        return cut

    return cut_of


def _by_magnitude(tile: Tensor) -> Tensor:
    """The columns of each row, from the smallest |entry| to the largest."""
    bits = tile.abs().float().cpu().numpy().view(np.uint32)  # positive numbers and their bits have one order
    keys = bits.astype(np.uint64) << np.uint64(32)
    keys |= np.arange(tile.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= np.uint64(WHOLE - 1)
    return torch.from_numpy(keys.view(np.int64))


def selected(chosen: Tensor) -> Sparsifier:
    """Keep the same entries of all experts. chosen: 1 where they are kept, else 0, of the shape of the delta."""

    def cut(tile: Tensor, rows: slice) -> None:
        tile.mul_(chosen[rows])

    return lambda experts, expert: cut


def _apply(tile: Tensor, mask: npt.NDArray[np.bool_]) -> None:
    if tile.device.type == "cpu":
        array = tile.numpy()
        np.multiply(array, mask, out=array)
    else:
        tile.mul_(torch.from_numpy(mask).to(tile.device))
