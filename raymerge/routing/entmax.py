"""Entmax with alpha 1.5: like a softmax, but what lies far below the best gets a weight of exactly 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

OUT_OF_REACH = -2.0  # at half a score of 1 below the best the weight is 0 already


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        there = scores != -torch.inf
        best = scores.amax(-1, keepdim=True)
        half = (scores - torch.where(best == -torch.inf, 0.0, best)) / 2
        half = torch.where(there, half, OUT_OF_REACH).clamp_min(OUT_OF_REACH)
        ranked = half.sort(-1, descending=True).values
        count = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        mean = ranked.cumsum(-1) / count
        spread = (ranked**2).cumsum(-1) - count * mean**2
        thresholds = mean - ((1 - spread) / count).clamp_min(0).sqrt()
        support = (thresholds <= ranked).sum(-1, keepdim=True).clamp_min(1)
        weights = (half - thresholds.gather(-1, support - 1)).clamp_min(0) ** 2 * there
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        [weights] = ctx.saved_tensors
        roots = weights.sqrt()
        total = roots.sum(-1, keepdim=True)
        mean = (gradient * roots).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
        result: Tensor = (gradient - mean) * roots
        return result


def entmax(scores: Tensor) -> Tensor:
    """Weights along the last dimension that sum to 1, zeros among them (1.5-entmax, Peters et al. 2019,
    arXiv:1905.05702; exact, by sorting), same shape and dtype.

    A score of -inf gets 0, and a row of them nothing but zeros. Differentiable once, as far as any weight is above 0.
    """
    if not scores.shape[-1]:
        return scores
    weights: Tensor = _Entmax.apply(scores)  # type: ignore[no-untyped-call]
    return weights
