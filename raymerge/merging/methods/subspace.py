"""Methods in the subspace that the experts span: knots, tsv and iso_c.

All act inside the numerical column and row space of the experts: what a low-rank delta has beyond it is rounding. All
are of degree 1 in the weights, and negative weights subtract. An expert whose weight is 0 is left out. Vectors (sites
of shape (n, 1)) are summed linearly, as the papers average what is no matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraModule
from raymerge.merging.consensus import MajoritySign
from raymerge.merging.exact import NOTHING, squared_terms
from raymerge.merging.factors import Factor, stack
from raymerge.merging.lowrank import truncate
from raymerge.merging.methods.sparse import ties
from raymerge.merging.rank import RankRule, chosen_rank
from raymerge.merging.site import Combined, Dense, Factored, Site, Weighted
from raymerge.merging.tiles import working_dtype

_EXACT = RankRule("exact")
_SAME = 1e-12  # share of the largest eigenvalue below which unit vectors do not differ: 1e-6 of a length
_NOISE = {torch.float32: 2e-6, torch.float64: 1e-10}  # of the longest row of coordinates: a shorter one is rounding


def tsv(site: Site) -> Combined:
    """TSV-Merge (Gargiulo et al., arXiv:2412.00081): the singular vectors of all experts are made orthogonal.

    Each expert keeps its full numerical rank. U and V are the singular vectors of all experts side by side; each is
    replaced by its polar factor, the nearest matrix with orthonormal columns, or, where experts share directions, by
    that of its numerical rank (P Q^T of the thin SVD). The result is the sum of the new pairs of vectors, each times
    its singular value and its expert's weight.

    N copies of an adapter with weights w_i give sum(w_i) / N of it: at weights 1 / N, an Nth.
    """
    if site.shape[1] == 1:
        return Weighted(site.weights)
    anchored = 0 if site.anchor is None else site.anchor.rank * len(site.names)
    if sum(site.ranks) + anchored > max(site.shape):
        return _dense_tsv(site)
    parts = list(_weighted_svds(site))
    if not parts:
        return Weighted([0.0] * len(site.names))
    U, V = torch.cat([U for U, _, _ in parts], 1), torch.cat([Vh for _, _, Vh in parts]).T
    values = torch.cat([values for _, values, _ in parts])
    return Factored([Factor(U @ _root(U.T @ U) * values, _root(V.T @ V) @ V.T)])


def _dense_tsv(site: Site) -> Combined:
    """The same of more directions than rows or columns: as the polar factor of U is also (U U^T)^-1/2 U, only sums
    over the experts are kept, and memory does not grow with their number."""
    out, into = site.shape
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    for U, values, Vh in _weighted_svds(site):
        sums = sums or (U.new_zeros(out, out), U.new_zeros(out, into), U.new_zeros(into, into))
        sums[0].addmm_(U, U.T)
        sums[1].addmm_(U * values, Vh)
        sums[2].addmm_(Vh.T, Vh)
    if sums is None:
        return Weighted([0.0] * len(site.names))
    return Dense(_root(sums[0]) @ sums[1] @ _root(sums[2]))


def _weighted_svds(site: Site) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """U, w_i times the singular values, and V^T of each delta with a weight."""
    for weight, factors in zip(site.weights, site.deltas(), strict=True):
        found = _singular(site.shape, factors) if weight != 0 and factors else None
        if found is not None:
            yield found[0], found[1] * weight, found[2]


def iso_c(site: Site) -> Combined:
    """Iso-C (Marczak et al., arXiv:2502.04959): the weighted sum with all singular values set to their mean.

    The sum is truncated to the site's rank first, and the mean is over those singular values that are not zero but for
    rounding: taken over a whole matrix, as for full fine-tuning, it would put most of the energy of a low-rank delta
    into arbitrary directions.

    N copies of an adapter at weights 1 / N give its own singular vectors, each with the mean of its singular values.
    """
    if site.shape[1] == 1:
        return Weighted(site.weights)
    ranks = [rank if weight != 0 else 0 for rank, weight in zip(site.ranks, site.weights, strict=True)]
    anchored = 0 if site.anchor is None else site.anchor.rank
    found = truncate(site.shape, [*ranks, anchored], lambda: _summed(site), site.rule, kept=site.kept)
    if found.norm == 0:
        return Weighted([0.0] * len(site.names))
    left, right = found.B.double().norm(dim=0), found.A.double().norm(dim=1)
    values = left * right
    energies = values.square().tolist()
    rank = chosen_rank(_EXACT, len(energies), energies, math.fsum(energies))
    U, V = found.B[:, :rank] / left[:rank], found.A[:rank] / right[:rank, None]
    return Factored([Factor(U, V, float(values[:rank].mean()))], cut=True)


def knots(site: Site, *, density: float, majority_sign: MajoritySign = "total") -> Combined:
    """KnOTS with TIES (Stoica et al., arXiv:2410.19735): TIES over the coordinates in the basis the experts share.

    [D_1 .. D_N] = U S [V_1 .. V_N]^T, of numerical rank K; the coordinates of expert i are U^T D_i = S V_i^T, (K, in).
    They carry the singular values, as in all configurations that the authors published (their text merges V_i^T and
    puts S into the basis): so an entry is as large as it is in the delta, and a direction that hardly exists has
    hardly a say. The weights do not enter the basis.

    density, majority_sign: as of `ties`, over the K x in coordinates. The sign of a column of U is arbitrary, so where
    a sum is even the entry is 0. Where singular values are equal, U is arbitrary among their directions, and so is
    the result.

    N copies at weights 1 / N give what one at weight 1 gives: the adapter, with the largest coordinates only.
    """
    if site.shape[1] == 1:
        return Weighted(site.weights)
    found = _shared(site)
    if found is None:
        return Weighted([0.0] * len(site.names))
    U, inside = found
    return Factored([Factor(U, ties(inside, density=density, majority_sign=majority_sign).delta)])


class _Part(NamedTuple):
    """A delta X Q: X (out, r), and Q (r, in) with orthonormal rows, both float64. dtype: to work on entries in."""

    X: Tensor
    Q: Tensor
    dtype: torch.dtype


def _parts(site: Site) -> Iterator[_Part | None]:
    """The deltas one after the other; None where one is zero, or has no weight."""
    for weight, factors in zip(site.weights, site.deltas(), strict=True):
        yield _part(factors) if weight != 0 and factors else None


def _part(factors: Sequence[Factor]) -> _Part | None:
    stacked = stack(factors)
    inner, into = stacked.A.shape
    if inner >= into:  # a dense delta, as it is
        X = (stacked.rows.T * stacked.weights) @ stacked.A
        Q = torch.eye(into, dtype=X.dtype, device=X.device)
    else:
        columns, R = torch.linalg.qr(stacked.A.T)
        X, Q = stacked.rows.T @ (stacked.weights[:, None] * R.T), columns.T
    if float(X.square().sum()) <= NOTHING**2 * squared_terms(stacked):
        return None
    return _Part(X, Q, working_dtype(*(side for factor in factors for side in (factor.A, factor.B))))


def _shared(site: Site) -> tuple[Tensor, Site] | None:
    """The left singular vectors of all deltas side by side, (out, K) with K their numerical rank, and the deltas in
    that basis, (K, in), as a site that makes them one after the other; None where all are zero.

    As [D_1 .. D_N] = [X_1 Q_1 .. X_N Q_N], [X_1 .. X_N] has the same left singular vectors. Neither is formed where
    that would take more memory than a matrix (out, out).
    """
    out, into = site.shape
    anchored = 0 if site.anchor is None else site.anchor.rank
    most = sum(min(rank + anchored, into) for rank, weight in zip(site.ranks, site.weights, strict=True) if weight != 0)
    ranks, dtype = [], torch.float32
    columns: list[Tensor] = []
    M: Tensor | None = None
    for part in _parts(site):
        ranks.append(0 if part is None else int(part.Q.shape[0]))
        if part is None:
            continue
        dtype = torch.promote_types(dtype, part.dtype)
        if most < out:
            columns.append(part.X)
        else:
            M = part.X.new_zeros(out, out) if M is None else M
            M.addmm_(part.X, part.X.T)
    if not any(ranks):
        return None
    U = _eigenvectors(M) if M is not None else _left_vectors(torch.cat(columns, 1))

    def read() -> Iterator[LoraModule | None]:
        return (None if part is None else _inside(U, part, dtype) for part in _parts(site))

    shape = (int(U.shape[1]), into)
    return U, Site(site.path, shape, site.names, site.weights, tuple(ranks), None, site.rule, read)


def _inside(U: Tensor, part: _Part, dtype: torch.dtype) -> LoraModule:
    """A delta in the basis U, as a product. A direction of which it has rounding alone is one that it has not: it must
    not vote there."""
    P = U.T @ part.X
    lengths = P.norm(dim=1, keepdim=True)
    P *= lengths > _NOISE[dtype] * lengths.max()
    return LoraModule(part.Q.to(dtype), P.to(dtype), 1.0)


def _left_vectors(X: Tensor) -> Tensor:
    """Left singular vectors of a tall matrix, up to its numerical rank."""
    Q, R = torch.linalg.qr(X)
    return torch.mm(Q, _eigenvectors(R @ R.T))


def _eigenvectors(M: Tensor) -> Tensor:
    """Eigenvectors of X X^T, the largest first, up to the numerical rank of X."""
    values, vectors = torch.linalg.eigh(M)
    energies = values.flip(0).clamp(min=0).tolist()
    rank = chosen_rank(_EXACT, len(energies), energies, math.fsum(energies))
    return torch.flip(vectors, (1,))[:, :rank].contiguous()


def _singular(shape: tuple[int, int], factors: Sequence[Factor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """U (out, r), singular values (r,) and V^T (r, in) of a sum of products, at its numerical rank; None if it is 0."""
    ranks = [factor.rank for factor in factors]
    # QR sees small singular values exactly; where it is dear, because the rank is high, they do not matter.
    found = truncate(shape, ranks, lambda: factors, _EXACT, "qr" if 2 * sum(ranks) <= min(shape) else "dense")
    if found.norm == 0:
        return None
    values = found.B.square().sum(0)  # B is U times the roots of the singular values, and A is them times V^T
    live = values > 0
    roots = values[live].sqrt()
    return found.B[:, live] / roots, values[live], found.A[live] / roots[:, None]


def _root(G: Tensor) -> Tensor:
    """G^-1/2 of a symmetric matrix (n, n), on those directions that are not zero but for rounding."""
    values, Z = torch.linalg.eigh(G)
    live = values > _SAME * float(values[-1])
    return torch.mm(Z[:, live] * values[live].rsqrt(), Z[:, live].T)


def _summed(site: Site) -> Iterator[Factor]:
    """sum(w_i (a_i - anchor)), read expert by expert."""
    if site.anchor is not None:
        yield Factor(site.anchor.B, site.anchor.A, -math.fsum(site.weights) * site.anchor.scaling)
    for module, weight in zip(site.read(), site.weights, strict=True):
        if module is not None and weight != 0:
            yield Factor(module.B, module.A, weight * module.scaling)
