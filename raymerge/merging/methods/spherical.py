"""Means of directions: SLERP of two deltas, and the Karcher mean of any number. Gram matrices only, no dense delta."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raymerge.errors import MergeError
from raymerge.merging.gram import squared_norm_of
from raymerge.merging.site import Site, Weighted

_ROUNDING = 1e-6  # of the anchor's norm: a difference from it that is smaller is its rounding, a zero delta
_OPPOSITE = 1e-3  # radians from 180 degrees: nearer, the great circle between two directions is made of rounding

_Array = npt.NDArray[np.float64]


def slerp(site: Site, *, t: float | None = None) -> Weighted:
    """Spherical linear interpolation of two deltas (Shoemake, SIGGRAPH 1985): of their directions, along the great
    circle through them; the norm is interpolated linearly.

    t: 0 is the first expert, 1 the second; without it, w_2 / (w_1 + w_2). If one delta is zero, the other is the
    result. Raises MergeError if all weights are zero, or the directions are opposite.
    """
    shares = normalised(site)
    return _mean_direction(site, shares if t is None else [1.0 - t, t], tolerance=0.0, steps=0)


def karcher(site: Site, *, tolerance: float = 1e-10, steps: int = 1000) -> Weighted:
    """The Riemannian (Karcher) mean of the deltas' directions on the unit sphere, times the weighted mean of their
    norms (Karcher, Comm. Pure Appl. Math. 30, 1977): where the weighted sum of the logarithms of all directions is 0.

    The mean is a weighted sum of the directions and found in its coefficients, by gradient steps no longer than the
    curvature allows. tolerance: the length of a step, in radians, below which it is found. steps: at most so many. For
    two experts it is SLERP.

    The mean is unique if the directions lie in one open half of the sphere (Afsari, Proc. AMS 139, 2011), as linearly
    independent ones always do. Raises MergeError if they do not, if it is not found within `steps`, or if
    all weights are zero.
    """
    return _mean_direction(site, normalised(site), tolerance, steps)


def normalised(site: Site) -> list[float]:
    """The weights, none of them negative, as shares of their sum. Raises MergeError if all are zero."""
    total = math.fsum(site.weights)
    if total == 0:
        raise MergeError("all weights are 0.\nExpected at least one above 0: only their ratios count.")
    return [weight / total for weight in site.weights]


def lengths(site: Site, gram: Tensor) -> _Array:
    """Frobenius norms of the deltas (N,), 0 where one is zero but for the rounding of the anchor. gram: the site's."""
    floor = 0.0 if site.anchor is None else _ROUNDING**2 * squared_norm_of(site.anchor)
    squares = gram.diagonal()
    return np.asarray(torch.where(squares > floor, squares, 0.0).sqrt().numpy())


def _mean_direction(site: Site, shares: Sequence[float], tolerance: float, steps: int) -> Weighted:
    """The mean direction times the mean norm, as coefficients of the deltas."""
    gram = site.gram()
    norms = lengths(site, gram)
    coefficients = np.zeros(len(norms))
    chosen = np.flatnonzero((norms > 0) & (np.asarray(shares) > 0))
    if len(chosen):
        weights = np.asarray(shares)[chosen]
        weights = weights / weights.sum()
        cosines = gram.numpy()[np.ix_(chosen, chosen)] / np.outer(norms[chosen], norms[chosen])
        np.fill_diagonal(cosines, 1.0)
        if len(chosen) == 1:
            found = weights
        elif len(chosen) == 2:
            found = _arc(site, chosen, float(cosines[0, 1]), float(weights[1]))
        else:
            found = _karcher(cosines, weights, tolerance, steps)
        coefficients[chosen] = (weights @ norms[chosen]) * found / norms[chosen]
    return Weighted(coefficients.tolist())


def _arc(site: Site, chosen: npt.NDArray[np.intp], cosine: float, t: float) -> _Array:
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    if angle > math.pi - _OPPOSITE:
        one, other = (site.names[index] for index in chosen)
        raise MergeError(
            f"{one} and {other} point in opposite directions ({math.degrees(angle):.2f} degrees).\n"
            "Every great circle through one leads to the other, so there is no mean of their directions.\n"
            "Leave one of them out, or use a linear merge, where they cancel."
        )
    if angle < 1e-6:  # sin(t x) / sin(x) is t to 1e-12 here, and acos knows no digit of x
        return np.array([1.0 - t, t])
    return np.array([math.sin((1.0 - t) * angle), math.sin(t * angle)]) / math.sin(angle)


def _karcher(cosines: _Array, weights: _Array, tolerance: float, steps: int) -> _Array:
    """Coefficients of the unit directions that give their Karcher mean, itself of norm 1."""
    _check_half_sphere(cosines, weights)
    mean = _unit(weights, cosines)
    length = math.inf
    for _ in range(steps):
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        sines = np.sqrt((1.0 - dots) * (1.0 + dots))
        angles = np.arctan2(sines, dots)
        ratios = np.divide(angles, sines, out=np.ones_like(angles), where=sines > 1e-8)
        gradient = weights * ratios - (weights * ratios * dots).sum() * mean
        gradient *= _step(cosines, weights, dots, ratios)
        length = math.sqrt(max(float(gradient @ cosines @ gradient), 0.0))
        if length <= tolerance:
            return mean
        mean = _unit(math.cos(length) * mean + math.sin(length) / length * gradient, cosines)
    raise MergeError(
        f"the Karcher mean of {len(weights)} directions was not found in {steps} steps "
        f"(the last one {length:.1e} radians).\nExpected a step of at most {tolerance:.1e}.\n"
        "Allow more steps, or a larger tolerance; nearly opposite experts are slow."
    )


def _unit(coefficients: _Array, cosines: _Array) -> _Array:
    norm = math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))
    return coefficients / norm if norm > 0 else coefficients


def _step(cosines: _Array, weights: _Array, dots: _Array, ratios: _Array) -> float:
    """How far to go along the gradient: 1 over a bound of the Hessian's largest eigenvalue.

    The Hessian is s I + sum(w_i k_i p_i p_i^T) with p_i the part of direction i orthogonal to the mean, s = sum(w_i
    x_i cot(x_i)) and k_i = (1 - x_i cot(x_i)) / sin(x_i)^2. No eigenvalue is above 1, and for many near-orthogonal
    directions, where s is small, all are far below.
    """
    curvature = float((weights * ratios * dots).sum())
    if curvature <= 0:
        return 1.0
    squares = (1.0 - dots) * (1.0 + dots)
    shares = np.divide(1.0 - ratios * dots, squares, out=np.full_like(dots, 1 / 3), where=squares > 1e-8)
    rows = np.abs(cosines - np.outer(dots, dots)) @ (weights * np.maximum(shares, 0.0))
    return 1.0 / min(curvature + float(rows.max()), 1.0)


def _check_half_sphere(cosines: _Array, weights: _Array) -> None:
    """Raises MergeError unless the directions lie in one open half of the sphere: unless 0 is outside their convex
    hull, by an angle that is not rounding."""
    equal = np.full(len(weights), 1.0 / len(weights))
    for centre in (weights, equal):
        if (cosines @ _unit(centre, cosines)).min() > _OPPOSITE:
            return
    from scipy.optimize import nnls

    values, vectors = np.linalg.eigh(cosines)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))).T
    ones = np.ones((1, len(weights)))
    nearest, _ = nnls(np.vstack([root, ones]), np.append(np.zeros(len(root)), 1.0), maxiter=100 * len(root))
    nearest /= nearest.sum()
    distance = math.sqrt(max(float(nearest @ cosines @ nearest), 0.0))
    if distance <= _OPPOSITE / 2:  # that of two directions so far from opposite
        raise MergeError(
            f"the directions of {len(weights)} experts do not lie in one half of the sphere.\n"
            "They pull against each other, so they have no single mean direction.\n"
            "Leave out the experts that oppose others, or use a linear merge, where they cancel."
        )
