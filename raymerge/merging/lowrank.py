"""The best low-rank approximation of a sum of low-rank products, by the cheapest way that is accurate enough.

All ways compute in float64 from factors as they are, so that before it is rounded to its dtype a result S_r of a sum
S satisfies |S - S_r| <= (1 + 1e-4) * optimum + 1e-6 * |S| in the Frobenius norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from raymerge.errors import MergeError, RankError
from raymerge.merging.exact import CANCELLATION, NOTHING, by_forming, by_gram, by_qr, formed, squared_terms
from raymerge.merging.factors import Compressed, Factor, Stacked, Truncation, filled, rounded, stack, zero
from raymerge.merging.randomised import GUARD, by_krylov, squared_norm
from raymerge.merging.rank import RankRule, parse_rank

# Seconds per operation on one core in float64; only their ratios decide.
_PRODUCT = 1 / 60e9
_NARROW = 1 / 15e9  # a product with a few dozen columns
_QR = 1 / 15e9
_EIGEN = 1.6e-10  # times n^3: all eigenvectors of a symmetric matrix
_SVD = 1e-9  # times n^3
_STEPS = 10  # of the iteration, until it proves itself
_MAX_STACKED = 512 * 2**20  # bytes of factors side by side in float64; more are summed one by one


def costs(shape: tuple[int, int], inner: int, ceiling: int, rule: RankRule) -> Mapping[str, float]:
    """Estimated seconds of each way to truncate a sum with `inner` rank-one terms; ways that cannot be are left out."""
    out, into = shape
    small, large = min(shape), max(shape)
    columns = ceiling + GUARD
    iterable = _bounded(rule) and 4 * columns < small
    form = 2 * inner * out * into * _PRODUCT
    basis = (columns * _STEPS) ** 2 * 4 * small * _PRODUCT
    iterate = 4 * _STEPS * columns * out * into * _NARROW + basis
    whole = 2 * small**2 * large * _PRODUCT + _EIGEN * small**3
    found = {"dense": form + (min(iterate, whole) if iterable else whole)}
    if inner * (out + into) * 8 > _MAX_STACKED:
        return found
    found["gram"] = 2 * inner**2 * (out + into + 3 * inner) * _PRODUCT + _EIGEN * inner**3
    core = min(inner, small)
    found["qr"] = 4 * inner * core * (out + into) * _QR + _SVD * core**3
    if iterable and 4 * columns < inner:
        norm = inner**2 * (out + into) * _PRODUCT
        found["randomised"] = norm + 4 * _STEPS * columns * inner * (out + into) * _NARROW + basis
    return found


def _bounded(rule: RankRule) -> bool:
    return rule.kind in ("keep", "fixed") or (rule.kind == "energy" and rule.maximum is not None)


def truncated_sum(
    factors: Sequence[Factor | tuple[torch.Tensor, torch.Tensor]],
    rank: RankRule | int | str | Mapping[str, object] = "exact",
    *,
    dtype: torch.dtype = torch.float32,
    path: str | None = None,
) -> Compressed:
    """Best approximation of a sum of low-rank products at a rank, without forming it unless that is cheapest.

    factors: products (B, A) or (B, A, weight) with B (out, r_i) and A (r_i, in), any r_i, any float dtypes.
    rank: see `rank.parse_rank`. path: dense, gram, qr or randomised, instead of what the cost model chooses.
    Returns B (out, rank), A (rank, in) in `dtype` and the relative Frobenius error, rounding included.
    Raises RankError for a rank that is none, MergeError for factors that do not fit together.
    """
    rule = parse_rank(rank)
    if rule.kind == "fixed" and factors and rule.value > min(factors[0][0].shape[0], factors[0][1].shape[1]):
        raise RankError(f"rank {int(rule.value)} exceeds both sides of the sum.\nExpected at most the smaller one.")
    products = [Factor(*factor) for factor in factors]
    if not products:
        raise MergeError("A sum of no products has no shape.")
    shape = (int(products[0].B.shape[0]), int(products[0].A.shape[1]))
    for B, A, _ in products:
        if (B.shape[0], A.shape[1]) != shape or B.shape[1] != A.shape[0]:
            raise MergeError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not fit a sum of shape {shape}.")
    found = truncate(shape, [p.rank for p in products], lambda: products, rule, path)
    return rounded(found, 1.0, dtype)


def truncate(
    shape: tuple[int, int],
    ranks: Sequence[int],
    factors: Callable[[], Iterable[Factor]],
    rule: RankRule,
    path: str | None = None,
    kept: int | None = None,
    as_is: bool = False,
) -> Truncation:
    """Truncate a sum of products of known ranks, which are fetched only as the chosen way needs them.

    kept: the rank that `rank: keep` means, the largest of the products' unless given. as_is: factors that fit into the
    rank are handed on as they are; otherwise the columns of B, and the rows of A, are orthogonal, the largest first.
    """
    inner = sum(ranks)
    if inner == 0:
        return zero(shape, torch.device("cpu"))
    ceiling = rule.ceiling(shape, max(ranks) if kept is None else kept)
    if as_is and rule.kind in ("keep", "fixed") and inner <= ceiling:
        found = _as_it_is(stack(list(factors())))
        if found is not None:
            return _filled_up(found, rule, ceiling)
    return _filled_up(_by_cheapest(shape, inner, factors, rule, ceiling, path), rule, ceiling)


def truncate_formed(S: torch.Tensor, rule: RankRule, kept: int) -> Truncation:
    """Truncate a matrix that is there, float64 (out, in). kept: the rank that `rank: keep` means."""
    ceiling = rule.ceiling((S.shape[0], S.shape[1]), kept)
    return _filled_up(_of_formed(S, float(S.square().sum()), rule, ceiling), rule, ceiling)


def _filled_up(found: Truncation, rule: RankRule, ceiling: int) -> Truncation:
    return filled(found, ceiling if rule.kind in ("keep", "fixed") and found.norm > 0 else 1)


def _by_cheapest(
    shape: tuple[int, int],
    inner: int,
    factors: Callable[[], Iterable[Factor]],
    rule: RankRule,
    ceiling: int,
    path: str | None,
) -> Truncation:
    estimated = costs(shape, inner, ceiling, rule)
    chosen = path or min(sorted(estimated), key=estimated.__getitem__)
    if chosen == "dense":
        return _dense(shape, factors, rule, ceiling)
    stacked = stack(list(factors()))
    found: Truncation | None = None
    if chosen == "gram":
        found = by_gram(stacked, rule, ceiling)
    elif chosen == "randomised":
        found = _randomised(stacked, shape, rule, ceiling)
    return found or by_qr(stacked, rule, ceiling)


def _as_it_is(stacked: Stacked) -> Truncation | None:
    """Factors that need no truncation. Their weights go into B, and a power of two, which rounds nothing, makes B and A
    about as large. None where they cancel: fewer columns may do then."""
    total = squared_norm(stacked)
    if total <= 0 or squared_terms(stacked) > CANCELLATION * total:
        return None
    B, A = (stacked.rows * stacked.weights[:, None]).T, stacked.A
    shift = 2.0 ** round(math.log2(float(torch.linalg.matrix_norm(A) / torch.linalg.matrix_norm(B))) / 2)
    return Truncation(B * shift, A / shift, math.sqrt(total), 0.0, "kept")


def sum_norm(shape: tuple[int, int], ranks: Sequence[int], factors: Callable[[], Iterable[Factor]]) -> float:
    """Frobenius norm of a sum of products, by the cheaper of Gram matrices and forming it."""
    inner, (out, into) = sum(ranks), shape
    if inner == 0:
        return 0.0
    if inner * (out + into) * 8 <= _MAX_STACKED and inner * (out + into) < 2 * out * into:
        stacked = stack(list(factors()))
        total = squared_norm(stacked)
        if squared_terms(stacked) <= 1e8 * total:  # else the terms cancel, and with them the digits of their products
            return math.sqrt(total)
        return float(torch.linalg.matrix_norm((stacked.rows.T * stacked.weights) @ stacked.A))
    return float(torch.linalg.matrix_norm(formed(shape, factors())[0]))


def _randomised(stacked: Stacked, shape: tuple[int, int], rule: RankRule, ceiling: int) -> Truncation | None:
    rows, A, weights = stacked
    total = squared_norm(stacked)
    if squared_terms(stacked) > CANCELLATION * total:
        return None
    return by_krylov(
        lambda X: rows.T @ (weights[:, None] * (A @ X)),
        lambda Y: A.T @ (weights[:, None] * (rows @ Y)),
        shape, total, rule, ceiling, A.device,
    )  # fmt: skip


def _dense(shape: tuple[int, int], factors: Callable[[], Iterable[Factor]], rule: RankRule, ceiling: int) -> Truncation:
    S, terms = formed(shape, factors())
    total = float(S.square().sum())
    return _of_formed(S, total if total > NOTHING**2 * terms else 0.0, rule, ceiling)


def _of_formed(S: torch.Tensor, total: float, rule: RankRule, ceiling: int) -> Truncation:
    shape = (int(S.shape[0]), int(S.shape[1]))
    if total == 0.0:
        return zero(shape, S.device)
    found = None
    small, large = min(shape), max(shape)
    columns = ceiling + GUARD
    iterate = 4 * _STEPS * columns * small * large * _NARROW
    if _bounded(rule) and 4 * columns < small and iterate < 2 * small**2 * large * _PRODUCT + _EIGEN * small**3:
        found = by_krylov(lambda X: S @ X, lambda Y: S.T @ Y, shape, total, rule, ceiling, S.device)
    if found is None:
        return by_forming(S, rule, ceiling)
    return Truncation(found.B, found.A, found.norm, found.tail, "dense")
