"""Those of mergekit's methods that need no more than inner products: what they compute with deltas (0.1.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raymerge.errors import MergeError
from raymerge.merging.factors import Factor
from raymerge.merging.site import Combined, Factored, Site, Weighted

_NOTHING = 1e-8  # the norm of a delta in slerp that counts as 0
_SMALL = 1e-6  # a product of norms or a denominator that counts as 0
_PARALLEL = 0.9995  # a cosine beyond which slerp is linear
_OPPOSITE = 1e-12  # of a cosine to -1


def slerp(site: Site, t: float | None) -> Weighted:
    """Along the arc between the directions of two deltas, which keep their lengths; linear where they are nearly
    parallel or opposite."""
    if t is None:
        total = math.fsum(site.weights)
        if total <= 0:
            raise MergeError("slerp needs t, or weights that are not all 0.")
        t = site.weights[1] / total
    gram = site.gram()
    norms = [math.sqrt(max(float(gram[i, i]), 0.0)) for i in (0, 1)]
    first, second = (norm if norm > _NOTHING else 1.0 for norm in norms)
    cosine = min(max(float(gram[0, 1]) / first / second, -1.0), 1.0)
    if abs(cosine) > _PARALLEL:
        return Weighted([1 - t, t])
    angle = math.acos(cosine)
    return Weighted([math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)])


def karcher(site: Site, max_iter: int, tol: float) -> Weighted:
    """The mean of the deltas' directions on the sphere by some fixed-point steps, times the mean of their norms
    (arXiv:2603.04972). Directions are coefficients of the deltas here, and only their inner products are computed."""
    no_weights(site, "karcher")
    count = len(site.names)
    if count == 1:
        return Weighted([1.0])
    gram = site.gram()
    norms = gram.diagonal().clamp(min=0).sqrt()
    valid = norms > tol
    if not bool(valid.any()):
        return Weighted([0.0] * count)
    inverse = torch.where(valid, 1 / norms.clamp(min=tol), 0.0)
    cosines = gram * inverse.outer(inverse)
    shares = valid.double() / valid.sum()
    mean = _first_mean(shares, cosines, tol)
    for _ in range(max_iter):
        dots = (cosines @ mean).clamp(-1, 1)
        angles = dots.acos()
        steps = torch.where(valid & (angles >= tol), shares * angles / angles.sin(), 0.0)
        if bool((dots[valid] < -1 + _OPPOSITE).any()):
            raise MergeError("a delta is opposite to the mean of all.\nmergekit's karcher divides by zero there.")
        tangent = steps - (steps * dots).sum() * mean
        length = _norm(tangent, cosines)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / _norm(mean, cosines)
    return Weighted((norms.mean() * mean * inverse).tolist())


def model_stock(site: Site, filter_wise: bool) -> Combined:
    """The mean of the deltas times N c / (1 + (N - 1) c), where c is their mean cosine (Jang et al., arXiv:2403.19522);
    with filter_wise, a ratio for each row."""
    no_weights(site, "model_stock")
    count = len(site.names)
    by_row = filter_wise and site.shape[1] > 1
    products = _row_products(site) if by_row else site.gram()[:, :, None]
    norms = torch.diagonal(products).T.clamp(min=0).sqrt()
    cosines = (products / (norms[:, None] * norms[None]).clamp(min=_SMALL)).clamp(-1, 1)
    upper = torch.triu_indices(count, count, offset=1)
    cosine = cosines[upper[0], upper[1]].mean(0)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < _SMALL
    ratio = torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, denominator))
    if len(ratio) == 1:
        return Weighted([float(ratio) / count] * count)
    present = [module for module in site.read() if module is not None]
    return Factored([Factor(ratio[:, None] * m.B.detach().double(), m.A, m.scaling / count) for m in present])


def _first_mean(shares: Tensor, cosines: Tensor, tol: float) -> Tensor:
    """The normed weighted mean of directions, or the first of them where it is 0."""
    length = _norm(shares, cosines)
    if length >= tol:
        return shares / length
    first = torch.zeros_like(shares)
    first[int(shares.nonzero()[0])] = 1.0
    return first


def _norm(coefficients: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))


def _row_products(site: Site) -> Tensor:
    """Inner products of the deltas' rows: float64 (N, N, out)."""
    modules = list(site.read())
    products = torch.zeros(len(modules), len(modules), site.shape[0], dtype=torch.float64)
    for i, one in enumerate(modules):
        for j, other in enumerate(modules[: i + 1]):
            if one is not None and other is not None:
                between = one.A.detach().double() @ other.A.detach().double().T
                rows = (one.B.detach().double() @ between * other.B.detach().double()).sum(1)
                products[i, j] = products[j, i] = one.scaling * other.scaling * rows
    return products


def no_weights(site: Site, name: str) -> None:
    """Raise MergeError if the weights differ, which a method of mergekit's cannot take into account."""
    if len(set(site.weights)) > 1:
        raise MergeError(f"mergekit's {name} has no weights, but these differ.\nGive all experts the same weight.")
