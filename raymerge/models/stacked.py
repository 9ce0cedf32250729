"""Trainable factors of many adapters at once, with their gradients and moments.

All factors of one adapter on a device lie in one row, and so do their gradients and moments. Clipping, the optimiser,
a change of the adapter in a slot and a checkpoint are then operations on rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raymerge.adapters.adapter import LoraModule
from raymerge.models.layers import compute_dtype, frozen_weight, is_quantised, shape_of

# Floats between the beginnings of two factors in a row: 64 bytes, so that vector instructions meet whole lines.
_ALIGN = 16
_KEPT = ("factors", "gradients", "first", "second")


class Rows:
    """What adapters keep on one device for layers of one dtype, float32 (slots, length): a row for each slot.

    first, second: Adam's moments. cast: the factors in the layers' dtype, the same tensor where that is float32.
    """

    factors: Tensor
    gradients: Tensor
    first: Tensor
    second: Tensor
    cast: Tensor

    def __init__(self, slots: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._length, self._device = length, device
        self.allocate(slots)

    def allocate(self, slots: int) -> None:
        """Begin anew with so many slots, all zeros; the memory of before is free first."""
        for name in (*_KEPT, "cast"):
            setattr(self, name, torch.zeros(0, self._length, device=self._device))
        self.factors, self.gradients, self.first, self.second = (
            torch.zeros(slots, self._length, device=self._device) for _ in _KEPT
        )
        same = self.dtype == torch.float32
        self.cast = self.factors if same else torch.zeros_like(self.factors, dtype=self.dtype)

    def keep(self, slots: Sequence[int]) -> None:
        """Forget all other slots. slots: ascending. The memory stays, so that nothing is held twice."""
        for name in _KEPT:
            rows = getattr(self, name)
            for place, slot in enumerate(slots):
                if place < slot:
                    rows[place].copy_(rows[slot])
            setattr(self, name, rows[: len(slots)])
        self.cast = self.factors if self.dtype == torch.float32 else self.cast[: len(slots)]
        self.refresh()

    def refresh(self) -> None:
        """Bring the factors into the layers' dtype."""
        if self.cast is not self.factors:
            self.cast.copy_(self.factors)


@dataclass(frozen=True)
class StackedModule:
    """A layer, and where A and B's transpose begin in the rows. weight, bias: None where the base's layer computes."""

    path: str
    rows: Rows
    offsets: tuple[int, int]
    rank: int
    inner: int
    outer: int
    scaling: float
    weight: Tensor | None
    bias: Tensor | None

    def A(self, rows: Tensor) -> Tensor:  # noqa: N802
        """A's share of (slots, length): (slots, rank, in_features), a view."""
        begin = self.offsets[0]
        return rows[:, begin : begin + self.rank * self.inner].view(-1, self.rank, self.inner)

    def Bt(self, rows: Tensor) -> Tensor:  # noqa: N802
        """The share of B's transpose: (slots, rank, out_features), a view; without the scaling."""
        begin = self.offsets[1]
        return rows[:, begin : begin + self.rank * self.outer].view(-1, self.rank, self.outer)


class FactorStack:
    """Factors, gradients and moments of the adapters in training, over all devices of the model.

    There are no slots before `allocate`. held: those that there is memory for, which `keep` does not give back.
    """

    def __init__(self, model: Any, layers: Mapping[str, nn.Module], rank: int, scaling: float) -> None:
        kinds = {path: (_device_of(layer), compute_dtype(model, layer)) for path, layer in layers.items()}
        lengths = dict.fromkeys(kinds.values(), 0)
        offsets: dict[str, tuple[int, int]] = {}
        for path, layer in layers.items():
            outer, inner = shape_of(layer)
            begin = lengths[kinds[path]]
            offsets[path] = begin, begin + _aligned(rank * inner)
            lengths[kinds[path]] = offsets[path][1] + _aligned(rank * outer)
        rows = {kind: Rows(0, length, *kind) for kind, length in lengths.items()}
        self.rows = tuple(rows.values())
        self.modules: dict[str, StackedModule] = {}
        for path, layer in layers.items():
            outer, inner = shape_of(layer)
            weight = None if is_quantised(layer) else frozen_weight(layer)
            bias = getattr(layer, "bias", None) if weight is not None else None
            bias = bias.detach() if isinstance(bias, Tensor) else None
            self.modules[path] = StackedModule(
                path, rows[kinds[path]], offsets[path], rank, inner, outer, scaling, weight, bias
            )
        self.slots = self.held = 0

    def allocate(self, slots: int) -> None:
        """Begin anew with so many slots, all zeros; the memory of before is free first."""
        for rows in self.rows:
            rows.allocate(0)
        for rows in self.rows:
            rows.allocate(slots)
        self.slots = self.held = slots

    def keep(self, slots: Sequence[int]) -> None:
        """Forget all other slots. slots: ascending."""
        self.slots = len(slots)
        for rows in self.rows:
            rows.keep(slots)

    def begin(self, slot: int, factors: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> None:
        """Give a slot an adapter, and the optimiser's moments; None are zeros. Each as `pack` orders it."""
        for name, packed in (("factors", factors), ("first", first), ("second", second)):
            for rows in self.rows:
                getattr(rows, name)[slot].zero_()
            if packed is not None:
                parts = iter(torch.split(packed, self.sizes))
                for module in self.modules.values():
                    rows_of = getattr(module.rows, name)
                    for share in (module.A(rows_of), module.Bt(rows_of)):
                        share[slot] = next(parts).view(share.shape[1:]).to(share.device)
        for rows in self.rows:
            rows.refresh()

    @property
    def sizes(self) -> list[int]:
        """Numbers in each factor of an adapter, in the order of `pack`."""
        return [m.rank * features for m in self.modules.values() for features in (m.inner, m.outer)]

    def pack(self, name: str, slot: int) -> Tensor:
        """A slot's `factors`, `first` or `second` moments: float32 (sum of sizes,) on the CPU, of its own memory.

        Module after module, A before B's transpose: the same wherever the layers lie.
        """
        shares = [
            share[slot].reshape(-1).cpu()
            for m in self.modules.values()
            for share in (m.A(getattr(m.rows, name)), m.Bt(getattr(m.rows, name)))
        ]
        return torch.cat(shares)

    def modules_of(self, packed: Tensor) -> dict[str, LoraModule]:
        """The modules of packed factors."""
        parts = iter(torch.split(packed, self.sizes))
        found = {}
        for path, m in self.modules.items():
            A = next(parts).view(m.rank, m.inner).clone()
            found[path] = LoraModule(A, next(parts).view(m.rank, m.outer).T.contiguous(), m.scaling)
        return found


def _device_of(layer: Any) -> torch.device:
    device: torch.device = layer.weight.device
    return device


def _aligned(count: int) -> int:
    return math.ceil(count / _ALIGN) * _ALIGN
