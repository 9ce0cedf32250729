"""Trainable factors of many adapters at once, and the layers that run them.

The base is frozen, so a layer's backward pass needs the gradient of its input and of its factors, and nothing else.
One autograd function computes exactly these, adding into buffers that the optimiser reads: no gradient of the base is
formed, no product is added in a pass of its own.

All factors of one adapter on a device lie in one row, and so do their gradients and moments. Clipping, the optimiser,
a change of the adapter in a slot and a checkpoint are then operations on rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raymerge.adapters.adapter import LoraModule
from raymerge.models.dropout import Dropout
from raymerge.models.layers import Forward, compute_dtype, frozen_weight, is_quantised, shape_of, wrap
from raymerge.models.products import frozen_layer, frozen_product

# Floats between the beginnings of two factors in a row: 64 bytes, so that vector instructions meet whole lines.
_ALIGN = 16


@dataclass(frozen=True)
class Part:
    """Which adapters have rows in a batch, in the order of their rows, each equally many; None is all.

    dropout: what is left out of the inputs of A; None is nothing.
    """

    slots: tuple[int, ...] | None = None
    dropout: Dropout | None = None

    def of(self, stacked: Tensor) -> Tensor:
        """These adapters' share of (slots, ...): a view where they stand side by side."""
        if self.slots is None:
            return stacked
        if self.is_range:
            return stacked[self.slots[0] : self.slots[-1] + 1]
        return stacked.index_select(0, torch.tensor(self.slots, device=stacked.device))

    @property
    def is_range(self) -> bool:
        """Whether they stand side by side, in their order."""
        return self.slots is None or self.slots == tuple(range(self.slots[0], self.slots[0] + len(self.slots)))


class Rows:
    """What adapters keep on one device for layers of one dtype, float32 (slots, length): a row for each slot.

    first, second: Adam's moments. cast: the factors in the layers' dtype, the same tensor where that is float32.
    """

    def __init__(self, slots: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        self.factors, self.gradients, self.first, self.second = (
            torch.zeros(slots, length, device=device) for _ in range(4)
        )
        self.dtype = dtype
        self.cast = self._new_cast()

    def keep(self, slots: Sequence[int]) -> None:
        """Forget all other slots; those that stay stand in the given order."""
        chosen = torch.tensor(slots, dtype=torch.int64, device=self.factors.device)
        self.factors, self.gradients, self.first, self.second = (
            rows.index_select(0, chosen) for rows in (self.factors, self.gradients, self.first, self.second)
        )
        self.cast = self._new_cast()

    def refresh(self) -> None:
        """Bring the factors into the layers' dtype."""
        if self.cast is not self.factors:
            self.cast.copy_(self.factors)

    def _new_cast(self) -> Tensor:
        return self.factors if self.dtype == torch.float32 else self.factors.to(self.dtype)


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
    """Factors, gradients and moments of the adapters in training, over all devices of the model."""

    def __init__(self, model: Any, layers: Mapping[str, nn.Module], rank: int, scaling: float, slots: int) -> None:
        kinds = {path: (_device_of(layer), compute_dtype(model, layer)) for path, layer in layers.items()}
        lengths = dict.fromkeys(kinds.values(), 0)
        offsets: dict[str, tuple[int, int]] = {}
        for path, layer in layers.items():
            outer, inner = shape_of(layer)
            begin = lengths[kinds[path]]
            offsets[path] = begin, begin + _aligned(rank * inner)
            lengths[kinds[path]] = offsets[path][1] + _aligned(rank * outer)
        rows = {kind: Rows(slots, length, *kind) for kind, length in lengths.items()}
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
        head = model.get_output_embeddings()
        plain = (
            isinstance(head, nn.Linear) and not is_quantised(head) and all(head is not one for one in layers.values())
        )
        self.head = head if plain else None
        self.slots = slots
        self.part = Part()
        self.anchor = torch.zeros((), requires_grad=True)  # what makes autograd ask a layer for its backward pass

    def keep(self, slots: Sequence[int]) -> None:
        """Forget all other slots; those that stay stand in the given order."""
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

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let the layers run with the adapters of `part`: the rows of its first adapter, then of its second."""

        def adapting(module: StackedModule) -> Callable[[Forward, Tensor], Tensor]:
            def adapt(original: Forward, x: Tensor) -> Tensor:
                if module.weight is None:
                    base = original(x)
                    delta: Tensor = _Delta.apply(x, self.anchor, module, self.part)  # type: ignore[no-untyped-call]
                    return base + delta.to(base.dtype)
                x = x.to(module.weight.device)  # the layer's own way to move it is bypassed
                out: Tensor = _AdaptedLinear.apply(x, self.anchor, module, self.part)  # type: ignore[no-untyped-call]
                return out

            return adapt

        restores = [wrap(layers[path], adapting(module)) for path, module in self.modules.items()]
        if self.head is not None:
            restores.append(wrap(self.head, frozen_layer(frozen_weight(self.head), self.head.bias)))
        try:
            yield
        finally:
            for restore in restores:
                restore()


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T, each adapter for its own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, module: StackedModule, part: Part) -> Tensor:
        assert module.weight is not None
        out = frozen_product(x, module.weight, module.bias)
        _add_delta(ctx, out, x, module, part)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient = gradients[0].contiguous()
        module: StackedModule = ctx.module
        assert module.weight is not None
        to_x = frozen_product(gradient, module.weight.T) if ctx.needs_input_grad[0] else None
        _collect(ctx, gradient, to_x)
        return to_x, None, None, None


class _Delta(torch.autograd.Function):
    """scaling (x A^T) B^T, each adapter for its own rows, beside a layer that computes x W^T itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, module: StackedModule, part: Part) -> Tensor:
        x = x.to(module.rows.dtype)
        out = x.new_zeros(*x.shape[:-1], module.outer)
        _add_delta(ctx, out, x, module, part)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient = gradients[0].contiguous()
        to_x = gradient.new_zeros(*gradient.shape[:-1], ctx.module.inner) if ctx.needs_input_grad[0] else None
        _collect(ctx, gradient, to_x)
        return to_x, None, None, None


def _add_delta(ctx: Any, out: Tensor, x: Tensor, module: StackedModule, part: Part) -> None:
    """Add the adapters' share to (..., out_features) in place, and keep what the backward pass needs."""
    A, Bt = part.of(module.A(module.rows.cast)), part.of(module.Bt(module.rows.cast))
    kept = None if part.dropout is None else part.dropout.kept(module.path, x)
    rows = (x if kept is None else x * kept).reshape(len(A), -1, x.shape[-1])
    inner = torch.bmm(rows, A.transpose(1, 2))
    ctx.scaling = module.scaling * (1.0 if part.dropout is None else part.dropout.factor)
    out.view(len(A), -1, out.shape[-1]).baddbmm_(inner, Bt, alpha=ctx.scaling)
    ctx.save_for_backward(*(saved for saved in (x, inner, kept) if saved is not None))
    ctx.module, ctx.part = module, part


def _collect(ctx: Any, gradient: Tensor, to_x: Tensor | None) -> None:
    """Add the factors' gradients to their buffers, and the input's to `to_x` in place."""
    module, part = ctx.module, ctx.part
    x, inner, *dropped = ctx.saved_tensors
    kept = dropped[0] if dropped else None
    A, Bt = part.of(module.A(module.rows.cast)), part.of(module.Bt(module.rows.cast))
    rows = gradient.view(len(A), -1, gradient.shape[-1])
    back = torch.bmm(rows, Bt.transpose(1, 2))
    entered = (x if kept is None else x * kept).reshape(len(A), -1, x.shape[-1])
    _add_product(module.Bt(module.rows.gradients), part, inner.transpose(1, 2), rows, ctx.scaling)
    _add_product(module.A(module.rows.gradients), part, back.transpose(1, 2), entered, ctx.scaling)
    if to_x is None:
        return
    if kept is None:
        to_x.view(len(A), -1, to_x.shape[-1]).baddbmm_(back, A, alpha=ctx.scaling)
    else:
        to_x.add_(torch.bmm(back, A).view(to_x.shape).mul_(kept), alpha=ctx.scaling)


def _add_product(total: Tensor, part: Part, left: Tensor, right: Tensor, scaling: float) -> None:
    if not part.is_range:
        product = torch.bmm(left, right).to(total.dtype)
        total.index_add_(0, torch.tensor(part.slots, device=total.device), product, alpha=scaling)
    elif total.dtype == left.dtype:
        part.of(total).baddbmm_(left, right, alpha=scaling)
    else:
        part.of(total).add_(torch.bmm(left, right), alpha=scaling)


def _device_of(layer: Any) -> torch.device:
    device: torch.device = layer.weight.device
    return device


def _aligned(count: int) -> int:
    return math.ceil(count / _ALIGN) * _ALIGN
