"""Truncation with the whole spectrum at hand: from Gram matrices, from QR, or from the sum itself. All in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from raymerge.merging.factors import Factor, Stacked, Truncation, gram_of_rows, stack, zero
from raymerge.merging.rank import RankRule, chosen_rank

# A Gram matrix knows squares to 1e-16 of the terms; above this ratio of the terms' squares to that of their sum
# (terms that cancel) its error could reach the 1e-6 of the norm that a merge may lose.
CANCELLATION = 30.0
NOTHING = 1e-13  # a sum this small against its terms is their rounding: a zero delta
_LOT = 256  # columns side by side while a sum is formed
_LIVE = 1e-14  # share of the squared norm below which a direction is noise


def squared_terms(stacked: Stacked) -> float:
    """Sum of the squared norms of the rank-one terms."""
    return float((stacked.A.square().sum(1) * stacked.rows.square().sum(1) * stacked.weights.square()).sum())


def by_gram(stacked: Stacked, rule: RankRule, ceiling: int) -> Truncation | None:
    """Truncate by the K x K Gram matrices of both sides. None where terms cancel so much that QR is needed.

    With G_A = C C^T and M = C^T G_B C = Z L Z^T, the left singular vectors are U = B C Z L^-1/2 and U^T S needs only
    G_B: no factor is inverted, so neither has to have full rank.
    """
    rows, A, weights = stacked
    G_A, G_B = gram_of_rows(A), gram_of_rows(rows) * weights.outer(weights)
    lengths = G_A.diagonal().clamp(min=0).sqrt()
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))  # unit rows: the scale of a row is arbitrary
    G_A, G_B = G_A / lengths.outer(lengths), G_B * lengths.outer(lengths)
    terms = float((G_A.diagonal() * G_B.diagonal()).sum())
    C = _square_root(G_A)
    M = C.T @ G_B @ C
    energies, Z = _spectrum(M)
    total = float(energies.sum())
    if terms == 0.0:
        return zero((rows.shape[1], A.shape[1]), A.device)
    if terms > CANCELLATION * total:
        return None
    rank = chosen_rank(rule, ceiling, energies.tolist(), total)
    top = energies[:rank]
    live = top > _LIVE * total
    inverse = torch.where(live, top, torch.ones_like(top)).rsqrt() * live
    W = (C @ Z[:, :rank]) * inverse
    share = top.clamp(min=0).sqrt().sqrt()
    left = ((weights * lengths)[:, None] * W * share).T @ rows
    right = ((W * torch.where(live, 1 / share, 0.0)).T @ G_B / lengths) @ A
    return Truncation(left.T, right, math.sqrt(total), _tail(energies, rank, live), "gram")


def by_qr(stacked: Stacked, rule: RankRule, ceiling: int) -> Truncation:
    """Truncate by QR of both sides and an SVD of the small core: accurate however the terms cancel."""
    rows, A, weights = stacked
    Q_B, R_B = torch.linalg.qr((rows * weights[:, None]).T)
    Q_A, R_A = torch.linalg.qr(A.T)
    U, values, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    energies = values.square()
    total = float(energies.sum())
    if total <= NOTHING**2 * squared_terms(stacked):
        return zero((rows.shape[1], A.shape[1]), A.device)
    rank = chosen_rank(rule, ceiling, energies.tolist(), total)
    share = values[:rank].sqrt()
    left, right = Q_B @ (U[:, :rank] * share), (share[:, None] * Vh[:rank]) @ Q_A.T
    return Truncation(left, right, math.sqrt(total), math.sqrt(float(energies[rank:].sum())), "qr")


def formed(shape: tuple[int, int], factors: Iterable[Factor]) -> tuple[Tensor, float]:
    """The sum itself in float64, some products at a time, and the sum of the squared norms of its rank-one terms."""
    S: Tensor | None = None
    terms = 0.0
    for several in _chunks(factors):
        stacked = stack(several)
        terms += squared_terms(stacked)
        if S is None:
            S = torch.zeros(shape, dtype=torch.float64, device=stacked.A.device)
        S.addmm_((stacked.rows * stacked.weights[:, None]).T, stacked.A)
    return (torch.zeros(shape, dtype=torch.float64) if S is None else S), terms


def _chunks(factors: Iterable[Factor]) -> Iterator[list[Factor]]:
    """Factors in lots wide enough for a fast product, and no wider."""
    lot: list[Factor] = []
    for factor in factors:
        lot.append(factor)
        if sum(f.rank for f in lot) >= _LOT:
            yield lot
            lot = []
    if lot:
        yield lot


def by_forming(S: Tensor, rule: RankRule, ceiling: int) -> Truncation:
    """Truncate the sum itself by the Gram matrix of its smaller side."""
    if S.shape[0] > S.shape[1]:
        found = by_forming(S.T, rule, ceiling)
        return Truncation(found.A.T, found.B.T, found.norm, found.tail, found.path)
    energies, U = _spectrum(S @ S.T)
    total = float(S.square().sum())
    rank = chosen_rank(rule, ceiling, energies.tolist(), total)
    top = energies[:rank]
    live = top > _LIVE * total
    share = top.clamp(min=0).sqrt().sqrt()
    left = U[:, :rank] * share * live
    right = (U[:, :rank] * torch.where(live, 1 / share, 0.0)).T @ S
    return Truncation(left, right, math.sqrt(total), _tail(energies, rank, live), "dense")


def _tail(energies: Tensor, rank: int, live: Tensor) -> float:
    return math.sqrt(float(energies[rank:].sum() + (energies[:rank] * ~live).sum()))


def _square_root(G: Tensor) -> Tensor:
    """Some C with C C^T = G: Cholesky where G is definite, else by eigenvectors."""
    C: Tensor
    C, info = torch.linalg.cholesky_ex(G)
    if int(info) != 0:
        values, Q = torch.linalg.eigh(G)
        C = Q * values.clamp(min=0).sqrt()
    return C


def _spectrum(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and never below 0, and eigenvectors of a matrix that is symmetric but for rounding."""
    values, vectors = torch.linalg.eigh((M + M.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)
