"""Truncation by a block Krylov iteration from a random start, which goes on until it can prove what it found.

Musco and Musco, arXiv:1504.05477, for the iteration; the proof is a residual bound for eigenvalues of symmetric
matrices (after Mathias, SIAM J. Matrix Anal. Appl. 19, 1998).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from raymerge.merging.factors import Stacked, Truncation
from raymerge.merging.rank import ROUNDING, RankRule, chosen_rank

EXCESS = 1e-4  # by how much the error may exceed the optimum, relative
GUARD = 8  # columns beside the wanted rank, so that equal singular values at its edge are all seen
MAX_STEPS = 24


def squared_norm(stacked: Stacked, block: int = 512) -> float:
    """Squared Frobenius norm of a sum of products, by blocks of the Gram matrices of both sides."""
    rows, A = stacked.rows * stacked.weights[:, None], stacked.A
    total = 0.0
    for i in range(0, A.shape[0], block):
        for j in range(i, A.shape[0], block):
            part = (rows[i : i + block] @ rows[j : j + block].T) * (A[i : i + block] @ A[j : j + block].T)
            total += float(part.sum()) * (1 if i == j else 2)
    return total


def by_krylov(
    apply: Callable[[Tensor], Tensor],
    apply_transposed: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    total: float,
    rule: RankRule,
    ceiling: int,
    device: torch.device,
) -> Truncation | None:
    """Truncate an operator S of a shape (out, in), known by its products with float64 blocks.

    total: |S|^2. None if the error is not proven to be within (1 + 1e-4) of the optimum, or 5e-7 |S|, after MAX_STEPS
    or when the space is no smaller than the whole: then a full factorisation is the quicker way.
    """
    if shape[0] > shape[1]:
        found = by_krylov(apply_transposed, apply, (shape[1], shape[0]), total, rule, ceiling, device)
        return found and Truncation(found.A.T, found.B.T, found.norm, found.tail, found.path)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape[1], ceiling + GUARD, dtype=torch.float64, generator=generator).to(device)
    block = _orthonormal(apply(start), None)
    Q = T = N = torch.empty(0)
    for step in range(MAX_STEPS):
        images = apply_transposed(block)
        products = apply(images)
        Q, T, N = (
            (block, images, products)
            if step == 0
            else (torch.cat([Q, block], 1), torch.cat([T, images], 1), torch.cat([N, products], 1))
        )
        energies, Z = torch.linalg.eigh(T.T @ T)
        energies, Z = energies.flip(0).clamp(min=0), Z.flip(1)
        rank = chosen_rank(rule, ceiling, energies.tolist(), total)
        block = _orthonormal(products, Q)
        complete = block.shape[1] == 0
        if complete or _proven(Q, N, energies, Z, rank, total):
            return _result(Q @ Z[:, :rank], T @ Z[:, :rank], energies[:rank], total)
        if Q.shape[1] + block.shape[1] > shape[0] // 2:
            return None
    return None


def _orthonormal(Y: Tensor, Q: Tensor | None) -> Tensor:
    """Orthonormal columns that span what of Y is outside of Q; directions of rounding size are dropped."""
    size = torch.linalg.matrix_norm(Y)
    if Q is not None:
        for _ in range(2):
            Y = Y - Q @ (Q.T @ Y)
    U: Tensor
    U, values, _ = torch.linalg.svd(Y, full_matrices=False)
    U = U[:, values > 1e-12 * size]
    if Q is not None and U.shape[1]:
        U = torch.linalg.qr(U - Q @ (Q.T @ U))[0]
    return U


def _proven(Q: Tensor, N: Tensor, energies: Tensor, Z: Tensor, rank: int, total: float) -> bool:
    """Whether the top `rank` directions found hold so much that no others could do better by more than is allowed.

    In the basis (top directions, all others) S S^T is [[D, R^T], [R, H]] with R the residual. For every eta > 0 it is
    at most diag(D + R^T R / eta, H + eta), so the true top energies sum to at most
    sum(D) + |R|^2 / eta + sum(max(0, |H| + eta - d_k)).
    |H| is bounded by the next energy found plus its own residual: a Gaussian start misses no direction.
    """
    if rank >= energies.numel():
        return False
    residual = N @ Z[:, : rank + 1] - Q @ (Z[:, : rank + 1] * energies[: rank + 1])
    squared = float(residual[:, :rank].square().sum())
    rest = float(energies[rank]) + float(torch.linalg.vector_norm(residual[:, rank]))
    found = energies[:rank].tolist()
    tail = max(total - math.fsum(found), 0.0)
    scale = max(found[0], 1e-300)
    gain = min(
        squared / eta + sum(max(0.0, rest + eta - energy) for energy in found)
        for eta in (scale * 10.0 ** (-exponent / 2) for exponent in range(30))
    )
    optimum = max(tail - gain, 0.0)
    return math.sqrt(tail) <= (1 + EXCESS) * math.sqrt(optimum) + ROUNDING * math.sqrt(total)


def _result(U: Tensor, images: Tensor, energies: Tensor, total: float) -> Truncation:
    share = energies.sqrt().sqrt()
    inverse = torch.where(energies > 0, 1 / share, 0.0)
    tail = max(total - float(energies.sum()), 0.0)
    return Truncation(U * share, (images * inverse).T, math.sqrt(total), math.sqrt(tail), "randomised")
