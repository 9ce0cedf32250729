"""The weighted sum of deltas, exactly. With an anchor it is task arithmetic (Ilharco et al., arXiv:2212.04089)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raymerge.adapters.adapter import LoraModule
    from raymerge.merging.factors import Factor


def linear(
    modules: Iterable[LoraModule | None], weights: Sequence[float], anchor: LoraModule | None, scale: float
) -> Iterator[Factor]:
    """anchor + scale * sum(w_i (a_i - anchor)), as anchor * (1 - scale * sum(w_i)) + sum(scale * w_i a_i).

    Nothing is rounded here: weights and scalings travel beside the factors.
    """
    from raymerge.merging.factors import Factor

    if anchor is not None:
        yield Factor(anchor.B, anchor.A, anchor_share(weights, scale) * anchor.scaling)
    for module, weight in zip(modules, weights, strict=True):
        if module is not None:
            yield Factor(module.B, module.A, scale * weight * module.scaling)


def anchor_share(weights: Sequence[float], scale: float) -> float:
    """Weight of the anchor itself in a linear merge around it."""
    return 1.0 - scale * sum(weights)
