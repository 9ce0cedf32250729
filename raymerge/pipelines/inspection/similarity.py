"""Cosines of adapters' deltas, for `raymerge inspect --similarity`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from raymerge.pipelines.inspection.adapter import Inspected
    from raymerge.pipelines.inspection.groups import Group

FEW = 12  # adapters up to which they stay in the order of their names, and the whole matrix fits a terminal


@dataclass(frozen=True)
class Similarity:
    """Cosines of deltas over all modules: (N, N), NaN between adapters that do not merge. left_out: adapters whose
    delta cannot be had."""

    names: tuple[str, ...]
    cosines: NDArray[np.float64]
    left_out: tuple[str, ...] = ()

    def values(self) -> NDArray[np.float64]:
        """The cosine of every pair that has one: (pairs,)."""
        return np.asarray(self.cosines[self._known()])

    def nearest(self, count: int) -> list[tuple[float, str, str]]:
        """Cosine and names of the most similar pairs, the most similar first."""
        places = np.flatnonzero(self._known())
        values = self.cosines.ravel()[places]
        if count < len(values):
            chosen = np.argpartition(-values, count)[:count]
            places, values = places[chosen], values[chosen]
        rows, columns = np.divmod(places, max(len(self.names), 1))
        found = []
        for value, row, column in zip(values.tolist(), rows.tolist(), columns.tolist(), strict=True):
            first, second = sorted((self.names[row], self.names[column]))
            found.append((value, first, second))
        return sorted(found, key=lambda pair: (-pair[0], pair[1], pair[2]))

    def _known(self) -> NDArray[np.bool_]:
        """(N, N): whether a cosine is known and stands above the diagonal, where each pair is once."""
        return np.triu(~np.isnan(self.cosines), 1)

    def to_json(self) -> dict[str, Any]:
        """As mappings and lists; null between adapters that do not merge. Rounded where float32 ends."""
        rows = [[None if math.isnan(value) else round(value, 7) for value in row] for row in self.cosines.tolist()]
        return {"names": list(self.names), "cosines": rows, "left_out": list(self.left_out)}


def measure(groups: Sequence[Group], adapters: Sequence[Inspected]) -> Similarity:
    """Cosines within each group. Where there are many adapters, similar ones stand together."""
    from raymerge.merging.gram import gram, similarities

    opened = {one.name: one.adapter for one in adapters if one.adapter is not None}
    parts = [[name for name in group.names if name in opened] for group in groups]
    many = sum(map(len, parts)) > FEW
    names: list[str] = []
    blocks: list[NDArray[np.float64]] = []
    for part in filter(None, parts):
        block = similarities(gram([opened[name] for name in part], "float32")).numpy()
        order = _side_by_side(block) if many else list(range(len(part)))
        names += [part[i] for i in order]
        blocks.append(block[np.ix_(order, order)])
    whole = np.full((len(names), len(names)), np.nan)
    start = 0
    for block in blocks:
        stop = start + len(block)
        whole[start:stop, start:stop] = block
        start = stop
    left_out = tuple(one.name for one in adapters if one.error is None and one.name not in opened)
    return Similarity(tuple(names), whole, left_out)


def _side_by_side(cosines: NDArray[np.float64]) -> list[int]:
    """An order in which similar ones are neighbours: the leaves of average-linkage clustering."""
    if len(cosines) < 3:
        return list(range(len(cosines)))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distances = np.clip(1 - cosines, 0, None)
    np.fill_diagonal(distances, 0)
    return [int(i) for i in leaves_list(linkage(squareform(distances, checks=False), "average"))]
