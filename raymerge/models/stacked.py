"""Trainable factors of many adapters at once, and the layer that runs them.

The base weight is frozen, so a layer's backward pass needs the gradient of its input and of its factors, and nothing
else. One autograd function computes exactly these, adding into buffers that the optimiser reads: no gradient of the
base is formed, no product is added in a pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raymerge import storage
from raymerge.adapters.adapter import LoraModule
from raymerge.models.layers import Forward, frozen_weight, wrap


@dataclass
class StackedModule:
    """Factors of one module for all adapters in training, float32, each with the buffer of its gradient.

    A: (groups, rank, in_features). Bt: (groups, rank, out_features), without the scaling.
    A_cast, Bt_cast: the same in the model's dtype; the same tensors where that is float32.
    """

    A: Tensor
    Bt: Tensor
    A_cast: Tensor
    Bt_cast: Tensor
    weight: Tensor
    bias: Tensor | None
    scaling: float

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Buffers of the gradients of A and Bt."""
        assert self.A.grad is not None
        assert self.Bt.grad is not None
        return self.A.grad, self.Bt.grad


class _AdaptedLinear(torch.autograd.Function):
    """y = x W^T + bias + scaling (x A^T) B^T, each adapter for its own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, module: StackedModule) -> Tensor:
        out = nn.functional.linear(x, module.weight, module.bias)
        groups = len(module.A_cast)
        rows = x.reshape(groups, -1, x.shape[-1])
        inner = torch.bmm(rows, module.A_cast.transpose(1, 2))
        out.view(groups, -1, out.shape[-1]).baddbmm_(inner, module.Bt_cast, alpha=module.scaling)
        ctx.save_for_backward(x, inner)
        ctx.module = module
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        x, inner = ctx.saved_tensors
        module: StackedModule = ctx.module
        gradient = gradients[0].contiguous()
        groups = len(module.A_cast)
        rows = gradient.view(groups, -1, gradient.shape[-1])
        back = torch.bmm(rows, module.Bt_cast.transpose(1, 2))
        to_A, to_Bt = module.gradients
        _add_product(to_Bt, inner.transpose(1, 2), rows, module.scaling)
        _add_product(to_A, back.transpose(1, 2), x.reshape(groups, -1, x.shape[-1]), module.scaling)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        to_x = gradient @ module.weight
        to_x.view(groups, -1, to_x.shape[-1]).baddbmm_(back, module.A_cast, alpha=module.scaling)
        return to_x, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=scaling)
    else:
        total.add_(torch.bmm(left, right), alpha=scaling)


def first_factors(names: Sequence[str], seed: int, module: str, rank: int, inner: int) -> Tensor:
    """Initial A of each adapter: float32 (len(names), rank, inner), uniform as PEFT's, drawn by name and not by order.

    A name's draw depends on (seed, name, module) alone; equal names get equal draws.
    """
    bound = 1 / math.sqrt(inner)
    drawn = []
    for name in names:
        digest = storage.digest_value([seed, name, module]).removeprefix("sha256:")
        generator = torch.Generator().manual_seed(int(digest[:15], 16))
        drawn.append((torch.rand(rank, inner, generator=generator) * 2 - 1) * bound)
    return torch.stack(drawn)


def stack_module(layer: nn.Module, A: Tensor, Bt: Tensor, scaling: float) -> StackedModule:
    """Initial factors on the layer's device, with gradient buffers. Raises ModelError if the layer is quantised."""
    weight = frozen_weight(layer)
    A, Bt = A.to(weight.device, copy=True), Bt.to(weight.device, copy=True)
    for factor in (A, Bt):
        factor.requires_grad_(True)
        factor.grad = torch.zeros_like(factor)
    same = weight.dtype == A.dtype
    A_cast, Bt_cast = (f.detach() if same else f.detach().to(weight.dtype) for f in (A, Bt))
    bias = getattr(layer, "bias", None)
    bias = bias.detach() if isinstance(bias, Tensor) else None
    return StackedModule(A, Bt, A_cast, Bt_cast, weight, bias, scaling)


def refresh(modules: Mapping[str, StackedModule]) -> None:
    """After an optimiser step: clear the gradients, and bring the factors into the model's dtype."""
    for module in modules.values():
        for gradient in module.gradients:
            gradient.zero_()
        if module.A_cast.dtype != module.A.dtype:
            module.A_cast.copy_(module.A.detach())
            module.Bt_cast.copy_(module.Bt.detach())


def clip_per_adapter(modules: Mapping[str, StackedModule], limit: float) -> None:
    """Scale each adapter's gradient, over all its modules, to a norm of at most `limit`."""
    gradients = [gradient for module in modules.values() for gradient in module.gradients]
    norms = torch.stack([torch.linalg.vector_norm(g, dim=(1, 2)) for g in gradients])
    factors = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)[:, None, None]
    for gradient in gradients:
        gradient.mul_(factors)


@contextmanager
def attached(layers: Mapping[str, nn.Module], modules: Mapping[str, StackedModule]) -> Iterator[None]:
    """Run the layers with the adapters in training; batches hold the rows of adapter 0, then of 1, and so on."""

    def adapting(module: StackedModule) -> Callable[[Forward, Tensor], Tensor]:
        def adapt(_original: Forward, x: Tensor) -> Tensor:
            out: Tensor = _AdaptedLinear.apply(x, module.A, module)  # type: ignore[no-untyped-call]
            return out

        return adapt

    restores = [wrap(layers[name], adapting(module)) for name, module in modules.items()]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def unstack(module: StackedModule, group: int) -> LoraModule:
    """One adapter's factors of one module, float32 on the CPU, in memory of their own."""
    A = module.A.detach()[group].cpu().clone()
    B = module.Bt.detach()[group].T.cpu().contiguous()
    return LoraModule(A, B, module.scaling)
