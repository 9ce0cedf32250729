"""The layers of a frozen base with adapters in training, each acting on its own rows of a batch.

The base is frozen, so a layer's backward pass needs the gradient of its input and of its factors, and nothing else.
One autograd function computes exactly these, adding into buffers that the optimiser reads: no gradient of the base is
formed, no product is added in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raymerge.models.dropout import Dropout, masked
from raymerge.models.layers import Forward, frozen_weight, is_quantised, wrap
from raymerge.models.products import frozen_layer, frozen_product
from raymerge.models.stacked import FactorStack, StackedModule


@dataclass(frozen=True, eq=False)
class Part:
    """Which adapters have rows in a batch, in the order of their rows, each equally many; None is all.

    dropout: what is left out of the inputs of A; None is nothing.
    """

    slots: tuple[int, ...] | None = None
    dropout: Dropout | None = None
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def of(self, stacked: Tensor) -> Tensor:
        """These adapters' share of (slots, ...): a view where they stand side by side."""
        if self.slots is None:
            return stacked
        if self.is_range:
            return stacked[self.slots[0] : self.slots[-1] + 1]
        return stacked.index_select(0, self.index(stacked.device))

    def index(self, device: torch.device) -> Tensor:
        """The slots as int64 (adapters,), brought to each device once."""
        if device not in self._indices:
            self._indices[device] = torch.tensor(self.slots, device=device)
        return self._indices[device]

    @property
    def is_range(self) -> bool:
        """Whether they stand side by side, in their order."""
        return self.slots is None or self.slots == tuple(range(self.slots[0], self.slots[0] + len(self.slots)))


@contextmanager
def attached(
    model: Any, layers: Mapping[str, nn.Module], stack: FactorStack, part: Callable[[], Part]
) -> Iterator[None]:
    """Let layers run with the adapters of `part()`: a batch holds the rows of its first adapter, then of its second."""
    anchor = torch.zeros((), requires_grad=True)  # what makes autograd ask a layer for its backward pass

    def adapting(module: StackedModule) -> Callable[[Forward, Tensor], Tensor]:
        def adapt(original: Forward, x: Tensor) -> Tensor:
            if module.weight is None:
                base = original(x)
                delta: Tensor = _Delta.apply(x, anchor, module, part())  # type: ignore[no-untyped-call]
                return base + delta.to(base.dtype)
            x = x.to(module.weight.device)  # the layer's own way to move it is bypassed
            out: Tensor = _AdaptedLinear.apply(x, anchor, module, part())  # type: ignore[no-untyped-call]
            return out

        return adapt

    restores = [wrap(layers[path], adapting(module)) for path, module in stack.modules.items()]
    head = model.get_output_embeddings()
    adapted = any(head is layer for layer in layers.values())
    if isinstance(head, nn.Linear) and not adapted and not is_quantised(head):
        restores.append(wrap(head, frozen_layer(frozen_weight(head), head.bias)))
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
    entering = x if part.dropout is None else masked(x, part.dropout.kept(module.path, x))
    inner = torch.bmm(entering.reshape(len(A), -1, x.shape[-1]), A.transpose(1, 2))
    ctx.scaling = module.scaling * (1.0 if part.dropout is None else part.dropout.factor)
    out.view(len(A), -1, out.shape[-1]).baddbmm_(inner, Bt, alpha=ctx.scaling)
    ctx.save_for_backward(x, inner)
    ctx.module, ctx.part = module, part


def _collect(ctx: Any, gradient: Tensor, to_x: Tensor | None) -> None:
    """Add the factors' gradients to their buffers, and the input's to `to_x` in place."""
    module, part = ctx.module, ctx.part
    x, inner = ctx.saved_tensors
    A, Bt = part.of(module.A(module.rows.cast)), part.of(module.Bt(module.rows.cast))
    kept = None if part.dropout is None else part.dropout.kept(module.path, x)  # cheaper made again than stored
    entered = (x if kept is None else masked(x, kept)).reshape(len(A), -1, x.shape[-1])
    rows = gradient.view(len(A), -1, gradient.shape[-1])
    back = torch.bmm(rows, Bt.transpose(1, 2))
    _add_product(module.Bt(module.rows.gradients), part, inner.transpose(1, 2), rows, ctx.scaling)
    _add_product(module.A(module.rows.gradients), part, back.transpose(1, 2), entered, ctx.scaling)
    if to_x is None:
        return
    if kept is None:
        to_x.view(len(A), -1, to_x.shape[-1]).baddbmm_(back, A, alpha=ctx.scaling)
    else:
        to_x.add_(masked(torch.bmm(back, A).view(to_x.shape), kept), alpha=ctx.scaling)


def _add_product(total: Tensor, part: Part, left: Tensor, right: Tensor, scaling: float) -> None:
    if not part.is_range:
        product = torch.bmm(left, right).to(total.dtype)
        total.index_add_(0, part.index(total.device), product, alpha=scaling)
    elif total.dtype == left.dtype:
        part.of(total).baddbmm_(left, right, alpha=scaling)
    else:
        part.of(total).add_(torch.bmm(left, right), alpha=scaling)
