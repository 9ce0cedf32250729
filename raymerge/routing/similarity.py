"""Cosine similarity, the most similar by blocks, and softmax weights. Nothing here is persona x expert in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

BLOCK = 1 << 18  # similarities held at a time: 1 MiB, and four times that while they are ranked, within a cache
RESOLUTION = 1e-6  # similarities closer than this are a tie, which the order of the names decides


@dataclass(frozen=True)
class Near:
    """The most similar keys of one query, best first: indices int32 (n,), similarities float64 (n,)."""

    indices: NDArray[np.int32]
    similarities: NDArray[np.float64]


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Rows scaled to length 1, float32 (n, d); a row of zeros stays one."""
    rows = np.asarray(vectors, dtype=np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)).astype(np.float32)[:, None]
    directions: NDArray[np.float32] = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return directions


def mean_direction(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """What all rows have in common: the mean of their directions, float32 (d,). Long rows count as much as short."""
    return np.asarray(unit(vectors).mean(axis=0, dtype=np.float64), dtype=np.float32)


def project(vectors: NDArray[Any], mean: NDArray[Any] | None) -> NDArray[np.float32]:
    """Rows whose inner products are cosines, float32 (n, d): directions, less `mean` (d,) where one is given."""
    return unit(vectors) if mean is None else unit(unit(vectors) - np.asarray(mean, dtype=np.float32))


def nearest(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    k: int,
    *,
    exclude: NDArray[np.int64] | None = None,
    temperature: float = 1.0,
    mass: float = 1.0,
) -> list[Near]:
    """For each query the k most similar keys; ties go to the key that comes first.

    queries (q, d), keys (n, d): float32 rows of length 1. exclude (q,): a key that a query must not get, or -1.
    mass: keep only as many of the k as make up this share of the sum of exp(similarity / temperature) over all keys.
    Returns fewer than k where there are no more keys.
    """
    count = len(keys)
    if count == 0:
        nothing = Near(np.zeros(0, np.int32), np.zeros(0))
        return [nothing] * len(queries)
    found: list[Near] = []
    step = max(1, BLOCK // count)
    hidden = np.full(len(queries), -1) if exclude is None else exclude
    with threadpool_limits(1):  # blocks are small: more threads would wait for each other, and round otherwise
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            best, counts = _best(queries[part] @ keys.T, hidden[part], k, temperature, mass)
            for query, near, kept in zip(queries[part], best, counts, strict=True):
                indices = near[:kept].astype(np.int32)
                found.append(Near(indices, np.einsum("nd,d->n", keys[indices], query, dtype=np.float64)))
    return found


def _best(
    block: NDArray[np.float32], hidden: NDArray[np.int64], k: int, temperature: float, mass: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (rows, k) of the most similar, best first, and how many of them count (rows,)."""
    count = block.shape[1]
    k = min(k, count)
    there = hidden >= 0
    available = count - there.astype(np.int64)
    rank = np.rint(block / np.float32(RESOLUTION)).astype(np.int64)
    rank = rank * count + np.arange(count - 1, -1, -1)  # no two are equal, so that a tie has one outcome
    rank[there, hidden[there]] = np.iinfo(np.int64).min
    best = np.argpartition(rank, count - k, axis=1)[:, count - k :]
    order = np.argsort(np.take_along_axis(rank, best, axis=1), axis=1)[:, ::-1]
    best = np.take_along_axis(best, order, axis=1)
    kept = np.minimum(k, available)
    if mass < 1.0:
        block[there, hidden[there]] = -np.inf
        with np.errstate(invalid="ignore"):
            share = np.exp((block.astype(np.float64) - block.max(axis=1, keepdims=True)) / temperature)
        running = np.cumsum(np.take_along_axis(share, best, axis=1), axis=1) / share.sum(axis=1, keepdims=True)
        kept = np.minimum(kept, 1 + (running < mass - 1e-12).sum(axis=1))
    return best, kept


def softmax(similarities: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Weights (n,) that sum to 1, in proportion to exp(similarity / temperature)."""
    if not len(similarities):
        return np.zeros(0)
    share = np.exp((similarities - similarities.max()) / temperature)
    return np.asarray(share / share.sum())
