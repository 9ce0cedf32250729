"""The weighted sum of deltas, exactly. With an anchor it is task arithmetic (Ilharco et al., arXiv:2212.04089)."""

from __future__ import annotations

from raymerge.merging.site import Site, Weighted


def linear(site: Site) -> Weighted:
    """sum(w_i (a_i - anchor)). Nothing is rounded here: weights and scalings travel beside the factors."""
    return Weighted(site.weights)
