"""What mergekit's methods compute (0.1.5), with a delta in the place of a task vector and nothing in that of the base.

A module that an expert lacks is a delta of zeros, as it is when the adapter is folded into its own copy of the base.
The rounding of that copy is left out. mergekit's lambda is the scale of a merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from raymerge.errors import MergeError
from raymerge.merging.dialects.draws import uniform
from raymerge.merging.dialects.election import Election, WeightedSum
from raymerge.merging.dialects.mergekit_means import karcher, model_stock, no_weights, slerp
from raymerge.merging.dialects.selection import keep_between, keep_largest
from raymerge.merging.site import Combined, Dense, Site, Weighted
from raymerge.merging.tiles import working_dtype

__all__ = [
    "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher", "linear",
    "model_stock", "sce", "slerp", "task_arithmetic", "ties",
]  # fmt: skip

# From a delta and the name of its expert to the delta with some entries dropped.
Sparsify = Callable[[Tensor, str], Tensor]

_NOTHING = 1e-8  # a sum of weights that counts as 0
_SMALL = 1e-6  # an energy, or a share of it, that counts as 0


def linear(site: Site, normalize: bool) -> Weighted:
    """The weighted sum, divided by the sum of the weights. Raises MergeError if that is 0."""
    total = math.fsum(site.weights) if normalize else 1.0
    if total == 0:
        raise MergeError("the weights sum to 0.\nmergekit's linear divides by their sum; normalize: false does not.")
    return Weighted([weight / total for weight in site.weights])


def task_arithmetic(site: Site, normalize: bool) -> Weighted:
    """The weighted sum (Ilharco et al., arXiv:2212.04089)."""
    divisor = _divisor(site) if normalize else 1.0
    return Weighted([weight / divisor for weight in site.weights])


def ties(site: Site, density: float, normalize: bool, rescale: bool) -> Dense:
    """Largest entries, signs elected with weights, a mean of those that agree (Yadav et al., arXiv:2306.01708)."""
    return _elected(site, _largest(density), normalize, rescale)


def dare_linear(site: Site, density: float, normalize: bool, rescale: bool, seed: int) -> Combined:
    """A random drop of each, summed (Yu et al., arXiv:2311.03099). What is left has the L1 norm of the delta."""
    return _summed(site, _random(site, density, seed), normalize, rescale)


def dare_ties(site: Site, density: float, normalize: bool, rescale: bool, seed: int) -> Dense:
    """A random drop of each, then signs elected with weights (arXiv:2311.03099)."""
    return _elected(site, _random(site, density, seed), normalize, rescale)


def della_linear(site: Site, density: float, epsilon: float, normalize: bool, rescale: bool, seed: int) -> Combined:
    """A drop that spares what is large in its row, summed (Deep et al., arXiv:2406.11617)."""
    return _summed(site, _ranked(site, density, epsilon, seed), normalize, rescale)


def della(site: Site, density: float, epsilon: float, normalize: bool, rescale: bool, seed: int) -> Dense:
    """A drop that spares what is large in its row, then signs elected with weights (arXiv:2406.11617)."""
    return _elected(site, _ranked(site, density, epsilon, seed), normalize, rescale)


def breadcrumbs(site: Site, density: float, gamma: float, normalize: bool, rescale: bool) -> Combined:
    """Entries between the largest and the smallest, summed (Davari and Belilovsky, arXiv:2312.06795)."""
    return _summed(site, _middle(density, gamma), normalize, rescale)


def breadcrumbs_ties(site: Site, density: float, gamma: float, normalize: bool, rescale: bool) -> Dense:
    """Entries between the largest and the smallest, then signs elected with weights (arXiv:2312.06795)."""
    return _elected(site, _middle(density, gamma), normalize, rescale)


def sce(site: Site, select_topk: float) -> Dense:
    """Entries that vary most between the deltas, each delta weighted by its energy among them, signs elected (Wan et
    al., arXiv:2408.07990). The deltas are formed anew for each of four passes."""
    no_weights(site, "sce")
    count = len(site.names)
    mask = None
    if select_topk < 1:
        mean = _sum(delta for _, delta in _deltas(site)) / count
        variance = _sum((delta - mean).square_() for delta in _everyone(site)) / count
        chosen = int(int(variance.count_nonzero()) * select_topk)
        mask = torch.zeros_like(variance)
        mask.view(-1)[torch.topk(variance.reshape(-1), chosen).indices] = 1
    energies = [float(_masked(delta, mask).square().sum()) / delta.numel() for delta in _everyone(site)]
    whole = math.fsum(energies)
    shares = [energy / whole if whole >= _SMALL else 1 / count for energy in energies]
    election = Election("total")
    for share, delta in zip(shares, _everyone(site), strict=True):
        election.add(_masked(delta, mask), share, share)
    agreed, agreeing = election.result()
    return Dense(agreed.div_(agreeing.clamp_(min=_SMALL)))


def _summed(site: Site, sparsify: Sparsify | None, normalize: bool, rescale: bool) -> Combined:
    divisor = _divisor(site) if normalize else 1.0
    if sparsify is None:
        return Weighted([weight / divisor for weight in site.weights])
    merged = WeightedSum()
    for index, delta in _deltas(site):
        merged.add(_sparse(delta, site.names[index], sparsify, rescale), site.weights[index] / divisor)
    return Dense(merged.total())


def _elected(site: Site, sparsify: Sparsify | None, normalize: bool, rescale: bool) -> Dense:
    election = Election("total")
    for index, delta in _deltas(site):
        weight = site.weights[index]
        election.add(_sparse(delta, site.names[index], sparsify, rescale).mul_(weight), 1.0, weight)
    agreed, weights = election.result()
    if normalize:
        agreed.div_(torch.where(weights == 0, 1.0, weights))
    return Dense(agreed)


def _sparse(delta: Tensor, name: str, sparsify: Sparsify | None, rescale: bool) -> Tensor:
    if sparsify is None:
        return delta
    kept = sparsify(delta, name)
    if not rescale:
        return kept
    before, after = float(delta.abs().sum()), float(kept.abs().sum())
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)


def _divisor(site: Site) -> float:
    total = math.fsum(site.weights)
    return 1.0 if abs(total) < _NOTHING else total


def _largest(density: float) -> Sparsify | None:
    def pick(magnitudes: Tensor, count: int) -> Tensor:
        return torch.argsort(magnitudes, descending=True)[:count]

    if density >= 1:
        return None
    return lambda delta, name: keep_largest(delta, max(1, int(density * delta.numel())), pick)


def _middle(density: float, gamma: float) -> Sparsify | None:
    if density >= 1:
        return None

    def keep(delta: Tensor, name: str) -> Tensor:
        kept, largest = int(density * delta.numel()), int(gamma * delta.numel())
        start = max(0, delta.numel() - kept - largest)
        return keep_between(delta, start, start + kept, lambda magnitudes: torch.sort(magnitudes).indices)

    return keep


def _random(site: Site, density: float, seed: int) -> Sparsify | None:
    if density >= 1:
        return None
    return lambda delta, name: delta * (uniform(seed, name, site.path, delta.shape).to(delta.device) < density)


def _ranked(site: Site, density: float, epsilon: float, seed: int) -> Sparsify | None:
    if density >= 1:
        return None
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise MergeError(
            f"epsilon {epsilon:g} does not go with density {density:g}.\n"
            "mergekit wants density - epsilon and density + epsilon within (0, 1)."
        )

    # A vector is one row; an embedding's weight is the transpose of its delta here.
    turned = site.shape[1] == 1 or next(module.embedding for module in site.read() if module is not None)

    def drop(delta: Tensor, name: str) -> Tensor:
        rows = delta.T if turned else delta
        places = rows.abs().argsort(1).argsort(1).to(delta.dtype)
        chances = density - epsilon + places / max(rows.shape[1] - 1, 1) * 2 * epsilon
        kept = rows * (uniform(seed, name, site.path, rows.shape).to(delta.device) < chances)
        return kept.T if turned else kept

    return drop


def _deltas(site: Site) -> Iterator[tuple[int, Tensor]]:
    """The deltas that are there, with the places of their experts: float32, or float64 where a factor is."""
    for index, module in enumerate(site.read()):
        if module is not None:
            yield index, module.delta(working_dtype(module.A, module.B))


def _everyone(site: Site) -> Iterator[Tensor]:
    """The deltas of all experts, zeros where one lacks the module."""
    for module in site.read():
        yield torch.zeros(site.shape) if module is None else module.delta(working_dtype(module.A, module.B))


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    merged = WeightedSum()
    for tensor in tensors:
        merged.add(tensor, 1.0)
    return merged.total()


def _masked(delta: Tensor, mask: Tensor | None) -> Tensor:
    return delta if mask is None else delta * mask
