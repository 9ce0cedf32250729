"""What PEFT's `add_weighted_adapter` computes (0.21), by the names of its combination types.

The types that end in svd act on the deltas and leave compression to their caller, as `svd` and `cat` do here. All
others act on A and on B apart, each at the square root of weight times scaling, with the sign of the weight on A; their
result therefore depends on how a delta is written as a product. One adapter alone is always merged by `linear`. Under
rsLoRA PEFT multiplies its result by the square root of the new rank, which is left out here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from raymerge.adapters.adapter import LoraModule
from raymerge.errors import MergeError
from raymerge.merging.consensus import MajoritySign
from raymerge.merging.dialects.draws import uniform
from raymerge.merging.dialects.election import Election, WeightedSum
from raymerge.merging.dialects.selection import keep_largest, topk
from raymerge.merging.factors import Factor
from raymerge.merging.site import Combined, Dense, Factored, Site, Weighted
from raymerge.merging.tiles import working_dtype

# From a tensor, the name of its expert and of the tensor to the tensor with some entries dropped.
Prune = Callable[[Tensor, str, str], Tensor]


def combination(name: str) -> Callable[..., Combined]:
    """The function of a combination type. Trained biases of LoRA modules get zeros, as PEFT gives them to its new
    adapter. Raises MergeError for a tensor that is stored whole, which PEFT does not merge either."""
    function = _TYPES[name]

    @functools.wraps(function)
    def combine(site: Site, **parameters: Any) -> Combined:
        if site.path.endswith(".weight"):
            raise MergeError("peft cannot merge tensors that are stored whole (modules_to_save).\nUse dialect delta.")
        if site.path.endswith(".bias"):
            return Weighted([0.0] * len(site.names))
        return function(site, **parameters)

    return combine


def linear(site: Site) -> Factored:
    """(sum of sqrt(w_i s_i) B_i) (sum of sqrt(w_i s_i) A_i), which is not the sum of the products."""
    return _by_factors(site, "linear", None, None)


def cat(site: Site) -> Weighted:
    """The weighted sum of deltas; PEFT keeps all its rank-one terms, which is `rank: exact` but for dependent ones."""
    return Weighted(site.weights)


def svd(site: Site) -> Weighted:
    """The weighted sum of deltas."""
    return Weighted(site.weights)


def magnitude_prune(site: Site, density: float | None) -> Factored:
    """The largest entries of each A and each B."""
    return _by_factors(site, "magnitude_prune", _largest(density), None)


def magnitude_prune_svd(site: Site, density: float | None) -> Combined:
    """The largest entries of each delta."""
    return _by_deltas(site, _largest(density), None)


def ties(site: Site, density: float | None, majority_sign_method: MajoritySign) -> Factored:
    """TIES on A and on B. Signs are elected without weights; the weighted sum is divided by the number that agree."""
    return _by_factors(site, "ties", _largest(density), majority_sign_method)


def ties_svd(site: Site, density: float | None, majority_sign_method: MajoritySign) -> Combined:
    """TIES on the deltas. Signs are elected without weights; the weighted sum is divided by the number that agree."""
    return _by_deltas(site, _largest(density), majority_sign_method)


def dare_linear(site: Site, density: float | None, seed: int) -> Factored:
    """Random entries of each A and each B, rescaled by the density."""
    return _by_factors(site, "dare_linear", _random(density, seed), None)


def dare_linear_svd(site: Site, density: float | None, seed: int) -> Combined:
    """Random entries of each delta, rescaled by the density."""
    return _by_deltas(site, _random(density, seed), None)


def dare_ties(site: Site, density: float | None, majority_sign_method: MajoritySign, seed: int) -> Factored:
    """TIES on A and on B, with a random drop instead of the smallest."""
    return _by_factors(site, "dare_ties", _random(density, seed), majority_sign_method)


def dare_ties_svd(site: Site, density: float | None, majority_sign_method: MajoritySign, seed: int) -> Combined:
    """TIES on the deltas, with a random drop instead of the smallest."""
    return _by_deltas(site, _random(density, seed), majority_sign_method)


def _by_factors(site: Site, name: str, prune: Prune | None, majority: MajoritySign | None) -> Factored:
    if len(site.names) == 1:
        prune = majority = None
    ranks = sorted({rank for rank in site.ranks if rank})
    if len(ranks) > 1:
        raise MergeError(
            f"peft's {name} needs adapters of one rank.\nFound ranks {', '.join(map(str, ranks))}; "
            f"{'cat or svd' if name == 'linear' else f'{name}_svd'} takes any."
        )
    sums = {letter: _start(majority) for letter in "AB"}
    for expert, weight, module in _present(site):
        strength = weight * module.scaling
        share = math.sqrt(abs(strength))
        for letter, factor, size in (("A", module.A, math.copysign(share, strength)), ("B", module.B, share)):
            x = factor.detach().to(working_dtype(factor))
            sums[letter].add(x if prune is None else prune(x, expert, f"{site.path}.lora_{letter}"), size)
    return Factored([Factor(_finish(sums["B"]), _finish(sums["A"]))])


def _by_deltas(site: Site, prune: Prune, majority: MajoritySign | None) -> Combined:
    if len(site.names) == 1:
        return Weighted(site.weights)
    merged = _start(majority)
    for expert, weight, module in _present(site):
        delta = module.delta(working_dtype(module.A, module.B))
        merged.add(prune(delta, expert, site.path), weight)
    return Dense(_finish(merged))


def _present(site: Site) -> Iterator[tuple[str, float, LoraModule]]:
    for name, weight, module in zip(site.names, site.weights, site.read(), strict=True):
        if module is not None:
            yield name, weight, module


def _start(majority: MajoritySign | None) -> Election | WeightedSum:
    return WeightedSum() if majority is None else Election(majority)


def _finish(merged: Election | WeightedSum) -> Tensor:
    if isinstance(merged, WeightedSum):
        return merged.total()
    agreed, votes = merged.result()
    return agreed.div_(votes.clamp_(min=1))


def _largest(density: float | None) -> Prune:
    kept = _given(density)
    return lambda x, expert, tensor: keep_largest(x, int(kept * x.numel()), topk)


def _random(density: float | None, seed: int) -> Prune:
    kept = _given(density)

    def drop(x: Tensor, expert: str, tensor: str) -> Tensor:
        if kept >= 1:
            return x
        return x * (uniform(seed, expert, tensor, x.shape).to(x.device) < kept) / kept

    return drop


def _given(density: float | None) -> float:
    if density is None:
        raise MergeError("density is missing.\nPEFT has no default for it: give a share above 0 and at most 1.")
    return density


_TYPES: Mapping[str, Callable[..., Combined]] = {
    function.__name__: function
    for function in (
        linear, cat, svd, magnitude_prune, magnitude_prune_svd, ties, ties_svd, dare_linear, dare_linear_svd, dare_ties,
        dare_ties_svd,
    )
}  # fmt: skip
