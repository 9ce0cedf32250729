"""A sum of low-rank products, and what a compressed one is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from raymerge.errors import MergeError


class Factor(NamedTuple):
    """One product: weight * B @ A, with B (out, r) and A (r, in) of any float dtype."""

    B: Tensor
    A: Tensor
    weight: float = 1.0

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self.A.shape[0])


class Stacked(NamedTuple):
    """Products side by side: the sum is (rows.T * weights) @ A. rows: the columns of all B (K, out), A (K, in),
    weights (K,), all float64."""

    rows: Tensor
    A: Tensor
    weights: Tensor


def stack(factors: Sequence[Factor]) -> Stacked:
    """Put products side by side in float64, where they are exact."""
    A = torch.cat([f.A.detach() for f in factors]).double()
    rows = torch.cat([f.B.detach().T for f in factors]).double()
    weights = [f.weight for f in factors for _ in range(f.rank)]
    return Stacked(rows, A, torch.tensor(weights, dtype=torch.float64, device=A.device))


def is_identity(X: Tensor) -> bool:
    """Whether a factor is one: dense deltas are products with it, and need no multiplication."""
    size = int(X.shape[0])
    if X.shape[1] != size or bool(X[0, 0] != 1):
        return False
    return int(torch.count_nonzero(X)) == size and bool((X.diagonal() == 1).all())


def gram_of_rows(X: Tensor) -> Tensor:
    """X X^T, of which only the blocks up to the diagonal are multiplied out."""
    count = X.shape[0]
    block = max(-(-count // 5), 16)
    G = X.new_empty(count, count)
    for start in range(0, count, block):
        stop = min(start + block, count)
        G[start:stop, :stop] = X[start:stop] @ X[:stop].T
        G[:start, start:stop] = G[start:stop, :start].T
    return G


@dataclass(frozen=True)
class Truncation:
    """The best approximation found of a sum S, before it is rounded.

    B (out, rank), A (rank, in), float64 or float32. norm: |S|, tail: |S - B A|, Frobenius. path: how it was found.
    """

    B: Tensor
    A: Tensor
    norm: float
    tail: float
    path: str


@dataclass(frozen=True)
class Compressed:
    """A sum of products as one: B (out, rank), A (rank, in) in the output dtype.

    error: |S - B A| / |S|, the rounding to that dtype included, and 0 where S is 0. norm: |S|, Frobenius.
    """

    B: Tensor
    A: Tensor
    error: float
    norm: float
    path: str


Low = TypeVar("Low", Truncation, Compressed)


def zero(shape: tuple[int, int], device: torch.device) -> Truncation:
    """A delta that is zero: rank 1, nothing lost."""
    B = torch.zeros(shape[0], 1, dtype=torch.float64, device=device)
    return Truncation(B, torch.zeros(1, shape[1], dtype=torch.float64, device=device), 0.0, 0.0, "zero")


def cast(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A finite tensor in another dtype. what: its name in the error. Raises MergeError if a value does not fit."""
    narrow = tensor.to(dtype).contiguous()
    if not math.isfinite(float(narrow.double().sum())) and not bool(narrow.isfinite().all()):
        raise MergeError(f"{what} does not fit into {dtype}.\nChoose a wider dtype, such as float32.")
    return narrow


def rounded(found: Truncation, scale: float, dtype: torch.dtype, what: str = "a merged module") -> Compressed:
    """Scale a truncation and round it. what: its name in errors. Raises MergeError if a value does not fit."""
    share = math.sqrt(abs(scale))
    exact_B, exact_A = found.B.double() * math.copysign(share, scale), found.A.double() * share
    B, A = cast(exact_B, dtype, what), cast(exact_A, dtype, what)
    done_B, done_A = B.double(), A.double()
    norm = found.norm * abs(scale)
    if norm == 0.0:
        return Compressed(torch.zeros_like(B[:, :1]), torch.zeros_like(A[:1]), 0.0, 0.0, found.path)
    # What rounding adds is nearly orthogonal to what truncation dropped, so their squares add up.
    left, right = torch.cat([(exact_B - done_B).T, done_B.T]), torch.cat([exact_A, exact_A - done_A])
    added = math.sqrt(max(float((gram_of_rows(left) * gram_of_rows(right)).sum()), 0.0))
    error = math.hypot(found.tail * scale, added) / norm
    return Compressed(B, A, error, norm, found.path)


def inner(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> float:
    """Frobenius inner product of two products, by their Gram matrices in float64."""
    left = B.detach().double().T @ other_B.detach().double()
    right = A.detach().double() @ other_A.detach().double().T
    return float((left * right).sum())


def filled(found: Low, rank: int) -> Low:
    """The same product with zeros up to a rank: where fewer directions exist than were asked for, or a server wants
    one rank for all modules."""
    missing = rank - found.A.shape[0]
    if missing <= 0:
        return found
    B = torch.cat([found.B, found.B.new_zeros(found.B.shape[0], missing)], 1)
    A = torch.cat([found.A, found.A.new_zeros(missing, found.A.shape[1])])
    return replace(found, B=B, A=A)
