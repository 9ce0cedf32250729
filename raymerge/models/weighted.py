"""Mixtures whose weights learn: each group of rows takes a few of many experts, and gradients reach their weights.

Base and factors are frozen, so a layer's backward pass needs the gradients of its input and of the weights, and
nothing else: the layer's input is not kept. Of the stacked factors only those that the groups name are copied, one
layer at a time, and again in the backward pass, so that memory grows with neither the layers nor the experts loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymerge.errors import ModelError
from raymerge.models.layers import Forward, frozen_weight, wrap
from raymerge.models.products import frozen_layer, frozen_product


@dataclass(frozen=True, eq=False)
class Mixture:
    """Which experts each group of rows takes at a layer, and how much of each.

    index: int64 (groups * k,), numbers in the stacked factors. weights: floating (groups, k), 0 where nobody is.
    Both on the layer's device.
    """

    index: Tensor
    weights: Tensor

    @property
    def groups(self) -> int:
        """How many groups the rows of a batch form."""
        return len(self.weights)

    def gathered(self, stacked: Tensor) -> Tensor:
        """Of factors (experts, rank, features) those of each group, joined: (groups, k * rank, features)."""
        return stacked.index_select(0, self.index).view(self.groups, -1, stacked.shape[2])

    def spread(self, weights: Tensor, stacked: Tensor) -> Tensor:
        """The weights for each row of what `gathered` gives: (groups, 1, k * rank), in the factors' dtype."""
        wide = weights.to(stacked.dtype)[:, :, None].expand(-1, -1, stacked.shape[1])
        return wide.reshape(self.groups, 1, -1)

    def times(self, factor: Tensor | None) -> Mixture:
        """The same with all weights multiplied by a 0-d tensor."""
        return self if factor is None else Mixture(self.index, self.weights * factor.to(self.weights.device))


@dataclass(frozen=True, eq=False)
class WeightedLayer:
    """A layer's factors, A (experts, rank, in_features) and Bt (experts, rank, out_features), and who takes them."""

    A: Tensor
    Bt: Tensor
    mixture: Mixture

    def answer(self, original: Forward, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The layer's output (..., out_features) with each group's mixture.

        weight: (out_features, in_features), frozen; None where the layer keeps it in few bits and computes itself.
        """
        if x.shape[0] % self.mixture.groups:
            raise ModelError(
                f"a batch of {x.shape[0]} rows meets weights for {self.mixture.groups} groups.\n"
                "All groups must have equally many rows."
            )
        if weight is not None:
            out: Tensor = _Weighted.apply(x, self.mixture.weights, self, weight, bias)  # type: ignore[no-untyped-call]
            return out
        base = original(x)
        delta: Tensor = _Weighted.apply(  # type: ignore[no-untyped-call]
            x.to(self.A.dtype), self.mixture.weights, self, None, None
        )
        return base + delta.to(base.dtype)


def place_mixture(
    experts: Tensor, weights: Tensor, devices: set[torch.device], loaded: int
) -> dict[torch.device, Mixture]:
    """A mixture on each device of a model; gradients flow back to `weights`.

    experts: int64 (groups, k), -1 is nobody. weights: floating (groups, k). loaded: how many experts there are.
    Raises ModelError if the shapes differ, an expert is not loaded or a weight is not finite.
    """
    if experts.ndim != 2 or 0 in experts.shape or weights.shape != experts.shape:
        raise ModelError(
            f"experts are {tuple(experts.shape)} and their weights {tuple(weights.shape)}.\n"
            "Expected (groups, k) twice, at least one of each."
        )
    least, most = int(experts.min()), int(experts.max())
    if not -1 <= least <= most < loaded:
        raise ModelError(f"groups name experts {least} to {most}.\nExpected -1 to {loaded - 1}.")
    if not bool(torch.isfinite(weights.detach()).all()):
        raise ModelError("weights of experts hold NaN or Inf.\nEvery weight must be a finite number.")
    named = weights.masked_fill((experts < 0).to(weights.device), 0)
    index = experts.clamp_min(0).flatten()
    return {device: Mixture(index.to(device), named.to(device)) for device in devices}


@contextmanager
def frozen(layers: Iterable[Any]) -> Iterator[None]:
    """Let linear layers that no adapter changes compute the gradient of their input alone."""
    restores = [wrap(layer, frozen_layer(frozen_weight(layer), layer.bias)) for layer in layers]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def check_factors(factors: Mapping[str, Tensor], modules: Mapping[str, Any]) -> None:
    """Raise ModelError if a factor is meant for a module that no adapter changes, or is not one number."""
    for name, factor in factors.items():
        if name not in modules:
            near = ", ".join(list(modules)[:3])
            raise ModelError(f"a factor names {name}, which no loaded adapter changes.\nThey change {near}, ...")
        if factor.ndim:
            raise ModelError(f"the factor of {name} is {tuple(factor.shape)}.\nExpected a single number, ().")


class _Weighted(torch.autograd.Function):
    """x W^T + bias + sum over j of weights[g, j] (x A_j^T) B_j^T for the rows of group g; without W the sum alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, layer: WeightedLayer, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        mixture, outer = layer.mixture, layer.Bt.shape[2]
        out = x.new_zeros(*x.shape[:-1], outer) if weight is None else frozen_product(x, weight, bias)
        rows = x.reshape(mixture.groups, -1, x.shape[-1])
        inner = torch.bmm(rows, mixture.gathered(layer.A).transpose(1, 2))
        scaled = inner * mixture.spread(weights, layer.A)
        out.view(mixture.groups, -1, outer).baddbmm_(scaled, mixture.gathered(layer.Bt))
        ctx.save_for_backward(weights, inner if ctx.needs_input_grad[1] else None)
        ctx.layer, ctx.weight = layer, weight
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        gradient = gradients[0].contiguous()
        weights, inner = ctx.saved_tensors
        layer: WeightedLayer = ctx.layer
        mixture, features = layer.mixture, layer.A.shape[2]
        rows = gradient.view(mixture.groups, -1, gradient.shape[-1])
        back = torch.bmm(rows, mixture.gathered(layer.Bt).transpose(1, 2))
        to_weights = None if inner is None else _summed(back, inner, weights)
        if not ctx.needs_input_grad[0]:
            return None, to_weights, None, None, None
        if ctx.weight is None:
            to_x = gradient.new_zeros(*gradient.shape[:-1], features)
        else:
            to_x = frozen_product(gradient, ctx.weight.T)
        scaled = back.mul_(mixture.spread(weights, layer.A))
        to_x.view(mixture.groups, -1, features).baddbmm_(scaled, mixture.gathered(layer.A))
        return to_x, to_weights, None, None, None


def _summed(back: Tensor, inner: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the weights: products of (groups, tokens, k * rank) summed over tokens and ranks."""
    wide = torch.promote_types(back.dtype, torch.float32)
    products = (back.to(wide) * inner.to(wide)).sum(1)
    return products.view(*weights.shape, -1).sum(2).to(weights.dtype)
