"""AdamW (Loshchilov and Hutter 2019) over many adapters, each at its own step and rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from raymerge.models.stacked import Rows


def clip(stack: Sequence[Rows], limit: float) -> None:
    """Scale each adapter's gradient, over all its modules, to a norm of at most `limit`."""
    squares = [torch.linalg.vector_norm(rows.gradients, dim=1).square_() for rows in stack]
    total = sum((square.to(squares[0].device) for square in squares[1:]), squares[0]).sqrt()
    factors = (limit / (total + 1e-6)).clamp(max=1.0)[:, None]
    for rows in stack:
        rows.gradients.mul_(factors.to(rows.gradients.device))


def update(stack: Sequence[Rows], steps: Sequence[int], rates: Sequence[float], weight_decay: float) -> None:
    """One step of every adapter, in place; the gradients are zero afterwards.

    steps: those that each slot has taken before. rates: of each slot.
    torch's fused kernel takes many tensors at one rate, each at a step of its own: it is called once for each rate.
    """
    for rows in stack:
        taken = torch.tensor(steps, dtype=torch.float32, device=rows.factors.device).unbind()
        for rate in dict.fromkeys(rates):
            slots = [slot for slot, own in enumerate(rates) if own == rate]
            adamw(
                [rows.factors[slot] for slot in slots],
                [rows.gradients[slot] for slot in slots],
                [rows.first[slot] for slot in slots],
                [rows.second[slot] for slot in slots],
                [],
                [taken[slot] for slot in slots],
                fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=rate, weight_decay=weight_decay, eps=1e-8,
                maximize=False,
            )  # fmt: skip
        rows.gradients.zero_()
        rows.refresh()
