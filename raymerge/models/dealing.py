"""Dealing the rows of a batch into groups that share an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Rows of a batch dealt into groups of equal size that share an adapter.

    adapters: int64 (groups,). size: rows of a group.
    slots: int64 (groups * size,), the row in each slot (row 0 where a group is not full).
    rows: int64 (m,), rows that have an adapter; places: int64 (m,), the slot of each.
    All three are None where the slots are the rows, in order. A model on several GPUs needs a copy on each.
    """

    batch: int
    adapters: Tensor
    size: int
    slots: Tensor | None = None
    rows: Tensor | None = None
    places: Tensor | None = None

    def on(self, device: torch.device) -> Layout:
        """The same on a device."""
        dealt = [part if part is None else part.to(device) for part in (self.slots, self.rows, self.places)]
        return Layout(self.batch, self.adapters.to(device), self.size, *dealt)


def plan_layout(index: Sequence[int]) -> Layout:
    """Deal rows into groups of equal size that share an adapter, with the least padding and reading of factors; on the
    CPU."""
    of_adapter: dict[int, list[int]] = {}
    for row, adapter in enumerate(index):
        if adapter >= 0:
            of_adapter.setdefault(adapter, []).append(row)
    counts = [len(rows) for rows in of_adapter.values()]

    def cost(size: int) -> tuple[int, int]:
        groups = sum(-(-count // size) for count in counts)
        return groups * size + groups, -size

    size = min({1, *counts}, key=cost)
    adapters: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    places: list[int] = []
    for adapter, members in of_adapter.items():
        for start in range(0, len(members), size):
            group = members[start : start + size]
            places += range(len(slots), len(slots) + len(group))
            rows += group
            slots += group + [0] * (size - len(group))
            adapters.append(adapter)
    chosen = torch.tensor(adapters, dtype=torch.int64)
    if slots == list(range(len(index))):
        return Layout(len(index), chosen, size)
    dealt = [torch.tensor(part, dtype=torch.int64) for part in (slots, rows, places)]
    return Layout(len(index), chosen, size, *dealt)
