"""Weights of named experts, from the numbers that a sampler proposes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

LEAST_SUM = 0.1  # of free weights, times the largest allowed: a row that sums to 0 or less is no merge


def on_simplex(numbers: Sequence[float]) -> list[float]:
    """Weights of 0 or more that sum to 1: -log u, normalised; uniform on the simplex where u are on (0, 1].

    Devroye, Non-Uniform Random Variate Generation (1986), chapter V. Where all u are 1, the weights are equal.
    """
    spacings = -np.log(np.array(numbers, dtype=np.float64))
    total = spacings.sum()
    weights = spacings / total if total > 0 else np.full(len(numbers), 1 / len(numbers))
    return [abs(float(weight)) for weight in weights]  # -log 1 is -0.0


def with_sum(numbers: Sequence[float], low: float, high: float) -> list[float]:
    """The nearest weights within [low, high], high above 0, that sum to `LEAST_SUM` times high or more."""
    from scipy.optimize import brentq

    weights, least = np.array(numbers, dtype=np.float64), LEAST_SUM * high
    if weights.sum() < least:  # the projection on a box and a half-space is one shift, clipped
        shift = brentq(lambda by: np.clip(weights + by, low, high).sum() - least, 0.0, high - weights.min())
        weights = np.clip(weights + shift, low, high)
    return [float(weight) for weight in weights]


def lattice(count: int, parts: int) -> Iterator[tuple[float, ...]]:
    """All ways to give `count` weights multiples of 1 / parts that sum to 1."""
    for bars in itertools.combinations(range(parts + count - 1), count - 1):
        ends = (-1, *bars, parts + count - 1)
        yield tuple((after - before - 1) / parts for before, after in itertools.pairwise(ends))
