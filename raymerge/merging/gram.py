"""Inner products of whole adapters' deltas, from r x r products and never from a delta. All in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.merging.factors import Factor, Stacked, inner, stack

_BLOCK = 512  # columns side by side


def gram(adapters: Sequence[LoraAdapter]) -> Tensor:
    """Frobenius inner products of adapters, summed over modules: float64 (N, N).

    A module that an adapter lacks is a zero delta. One module of all adapters is in memory at a time, in its own dtype.
    """
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for path in sorted({path for adapter in adapters for path in adapter.headers}):
        owners = [i for i, adapter in enumerate(adapters) if path in adapter.modules]
        total[torch.tensor(owners)[:, None], torch.tensor(owners)] += gram_module(
            [adapters[i].modules[path] for i in owners]
        )
    return total


def gram_module(modules: Sequence[LoraModule]) -> Tensor:
    """Frobenius inner products of deltas of one shape: float64 (N, N)."""
    products = torch.zeros(len(modules), len(modules), dtype=torch.float64)
    spans = list(_spans([module.rank for module in modules]))
    for index, (start, stop) in enumerate(spans):
        left, left_owner = _block(modules[start:stop])
        for other_start, other_stop in spans[index:]:
            right, right_owner = _block(modules[other_start:other_stop])
            terms = (left.rows @ right.rows.T) * (left.A @ right.A.T)
            block = (left_owner.T @ terms @ right_owner).cpu()
            products[start:stop, other_start:other_stop] = block
            products[other_start:other_stop, start:stop] = block.T
    return (products + products.T) / 2


def squared_norm_of(module: LoraModule) -> float:
    """Squared Frobenius norm of a delta."""
    return module.scaling**2 * max(inner(module.B, module.A, module.B, module.A), 0.0)


def inner_of(module: LoraModule, other: LoraModule) -> float:
    """Frobenius inner product of two deltas of one shape."""
    return module.scaling * other.scaling * inner(module.B, module.A, other.B, other.A)


def _spans(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    start, columns = 0, 0
    for index, rank in enumerate(ranks):
        if columns and columns + rank > _BLOCK:
            yield start, index
            start, columns = index, 0
        columns += rank
    if start < len(ranks):
        yield start, len(ranks)


def _block(modules: Sequence[LoraModule]) -> tuple[Stacked, Tensor]:
    """Factors side by side, scalings folded in, and which columns are whose: (K, modules)."""
    stacked = stack([Factor(module.B, module.A, module.scaling) for module in modules])
    owner = torch.repeat_interleave(torch.arange(len(modules)), torch.tensor([module.rank for module in modules]))
    chosen = torch.nn.functional.one_hot(owner, len(modules)).double().to(stacked.A.device)
    return stacked._replace(rows=stacked.rows * stacked.weights[:, None]), chosen
