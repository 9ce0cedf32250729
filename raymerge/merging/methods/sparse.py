"""The sparse methods: one pipeline, which first sparsifies each expert's delta and then finds a consensus.

| method | sparsify | consensus |
|---|---|---|
| magnitude_prune | the largest entries | sum |
| ties | the largest entries | sign |
| dare_linear, dare_ties | random, rescaled | sum; sign |
| della_linear, della | random by rank of magnitude, rescaled | sum; sign |
| breadcrumbs, breadcrumbs_ties | the largest entries but for outliers | sum; sign |
| sce | entries that vary most between the experts | sign, weighted by energy |

All are of degree 1 in the weights, and negative weights subtract. An expert whose weight is 0 is left out. One that
lacks the module has entries of 0, which agree with no sign. Deltas are formed in tiles of rows and never held whole;
what is held is the result, the sums over experts for a group of rows, and the factors of a lot of experts
(`merging.tiles`). Results are float64 where any factor is, else float32.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from raymerge.merging.consensus import Consensus, MajoritySign, SignElection, Total
from raymerge.merging.site import Dense, Site
from raymerge.merging.sparsify import Cut, Sparsifier, magnitude, outliers, random, ranked, selected, share_of
from raymerge.merging.thresholds import largest
from raymerge.merging.tiles import Expert, Experts, gather, places

_ROUNDING = 32  # times the spacing of numbers, of the size of a mean entry: a smaller deviation is rounding


def magnitude_prune(site: Site, *, density: float) -> Dense:
    """The largest entries of each delta, summed. density: the share that is kept, rounded to a number of entries, at
    least one; entries as large as the last of them are kept too. At density 1 it is linear."""
    return _merged(site, magnitude(density), Total())


def ties(site: Site, *, density: float, majority_sign: MajoritySign = "total") -> Dense:
    """TIES (Yadav et al., arXiv:2306.01708): the largest entries of each delta, a sign elected for each place, and the
    mean of those that agree with it. density: as in `magnitude_prune`. majority_sign: see `SignElection`."""
    return _merged(site, magnitude(density), SignElection(majority_sign))


def dare_linear(site: Site, *, density: float, seed: int = 0) -> Dense:
    """DARE (Yu et al., arXiv:2311.03099): each entry is kept with the probability `density` and divided by it, then
    all are summed: linear, in expectation. The draw depends on the seed, the expert's name and the module's path."""
    return _merged(site, random(density, seed, site.path), Total())


def dare_ties(site: Site, *, density: float, seed: int = 0, majority_sign: MajoritySign = "total") -> Dense:
    """DARE with the signs and means of TIES. Signs are elected, and those that agree counted, before the random drop:
    so in expectation it is what it is at density 1, where nothing is dropped."""
    return _merged(site, random(density, seed, site.path), SignElection(majority_sign, early=True))


def della_linear(site: Site, *, density: float, epsilon: float = 0.1, seed: int = 0) -> Dense:
    """DELLA (Deep et al., arXiv:2406.11617) without signs: as `dare_linear`, but larger entries of a row are kept with
    a higher probability. epsilon: the range of probabilities, see `sparsify.ranked`. At density 1 it is linear."""
    return _merged(site, ranked(density, epsilon, seed, site.path), Total())


def della(
    site: Site, *, density: float, epsilon: float = 0.1, seed: int = 0, majority_sign: MajoritySign = "total"
) -> Dense:
    """DELLA (Deep et al., arXiv:2406.11617): as `dare_ties`, but larger entries of a row are kept with a higher
    probability. epsilon: the range of probabilities, see `sparsify.ranked`."""
    return _merged(site, ranked(density, epsilon, seed, site.path), SignElection(majority_sign, early=True))


def breadcrumbs(site: Site, *, density: float, gamma: float = 0.01) -> Dense:
    """Model Breadcrumbs (Davari and Belilovsky, arXiv:2312.06795): without the largest entries of each delta, a share
    gamma of all, and without the smallest, so that the share `density` of all remains; then summed. Where density and
    gamma exceed 1 fewer of the largest are dropped; at density 1 it is linear."""
    return _merged(site, outliers(density, gamma), Total())


def breadcrumbs_ties(
    site: Site, *, density: float, gamma: float = 0.01, majority_sign: MajoritySign = "total"
) -> Dense:
    """Model Breadcrumbs (arXiv:2312.06795) with the signs and means of TIES."""
    return _merged(site, outliers(density, gamma), SignElection(majority_sign))


def sce(site: Site, *, density: float) -> Dense:
    """SCE (Wan et al., FuseChat, arXiv:2408.07990): select, calculate, erase.

    Selected are those entries whose variance over the experts is 0 up to rounding, and of the others the share
    `density` with the largest variance. Each expert's weight is multiplied by its mean square over what is selected,
    such that the sum of |weights| stays; then a sign is elected for each place (total), and the result is the mean of
    those that agree with it, as in `ties`. N copies at weights 1 / N are the adapter itself, at any density.
    """
    experts = gather(site, weighted=False)
    choose = None if density == 1 else selected(_most_varying(experts, density))
    energies = _energies(experts, choose)
    whole = math.fsum(abs(weight) for weight in site.weights)
    shared = math.fsum(abs(w) * energy for w, energy in zip(site.weights, energies, strict=True))
    scale = whole / shared if shared > 0 else 0.0
    weights = tuple(w * energy * scale for w, energy in zip(site.weights, energies, strict=True))
    return _merged(replace(site, weights=weights), choose, SignElection())


def _merged(site: Site, sparsifier: Sparsifier | None, consensus: Consensus) -> Dense:
    experts = gather(site, weighted=True)
    whole = math.fsum(abs(weight) for weight in site.weights)
    cuts: dict[int, Cut | None] = {}

    def add(sums: Tensor, expert: Expert, rows: slice, tile: Tensor, spare: Tensor) -> None:
        if not expert.products:
            return
        if expert.index not in cuts:
            cuts[expert.index] = None if sparsifier is None else sparsifier(experts, expert)
        cut = cuts[expert.index]
        expert.form(rows, tile, spare)
        consensus.add(sums, tile, expert.weight, spare, lambda entries: None if cut is None else cut(entries, rows))

    merged = experts.tensor(*site.shape)
    for rows, sums in experts.sums(consensus.planes, add):
        merged[rows] = consensus.result(sums, whole)
    return Dense(merged)


def _most_varying(experts: Experts, density: float) -> Tensor:
    """1 at the places that `sce` selects, else 0. A variance is as good as 0 where it could be rounding alone."""
    out, into = experts.site.shape
    order = {index: n for n, index in enumerate((i for i, w in enumerate(experts.site.weights) if w != 0), 1)}

    def add(sums: Tensor, expert: Expert, rows: slice, tile: Tensor, spare: Tensor) -> None:
        mean, squares = sums  # by Welford's recurrence, which gives exactly 0 for copies
        expert.form(rows, tile, spare)
        torch.sub(tile, mean, out=spare)
        mean.add_(spare, alpha=1 / order[expert.index])
        squares.addcmul_(spare, tile.sub_(mean))

    variances = experts.tensor(out, into)  # times the number of experts
    energy = 0.0
    for rows, (mean, squares) in experts.sums(2, add):
        variances[rows] = squares
        energy += float(squares.sum()) + len(order) * float(mean.square_().sum())
    nothing = (_ROUNDING * torch.finfo(experts.dtype).eps) ** 2 * energy / variances.numel()
    same = variances <= nothing
    varying = variances.numel() - int(torch.count_nonzero(same))
    if varying:
        sample = variances[places((out, into), experts.device)]
        (low,) = largest(
            lambda: iter(torch.split(variances, experts.rows)), variances.numel(), [share_of(density, varying)], sample
        )
        same |= variances >= low
    return variances.copy_(same)


def _energies(experts: Experts, sparsifier: Sparsifier | None) -> list[float]:
    """The mean square of each delta over the entries that are kept of it; 0 where its weight is."""
    found = [0.0] * len(experts.site.names)
    count = math.prod(experts.site.shape)
    for lot in experts.lots():
        for expert in lot:
            cut = None if sparsifier is None else sparsifier(experts, expert)
            for rows, tile in experts.formed(expert):
                if cut is not None:
                    cut(tile, rows)
                found[expert.index] += float(torch.linalg.vector_norm(tile)) ** 2 / count
    return found
