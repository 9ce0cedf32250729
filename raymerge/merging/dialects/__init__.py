"""Dialects: what another library computes when it merges LoRAs, number by number, to compare and to migrate.

Each method acts on a `Site` as the methods of `merging.methods` do. A dialect takes no anchor. No torch is imported
here, and neither library: both are read from their published versions, PEFT 0.21 and mergekit 0.1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from raymerge.errors import MergeError, unknown
from raymerge.merging.dialects import parameters as p
from raymerge.merging.methods import METHODS, Method
from raymerge.merging.methods.parameters import NoParameters

if TYPE_CHECKING:
    from raymerge.merging.site import Combined

__all__ = ["DIALECTS", "method_of", "methods_of"]


def _peft(function: str) -> Callable[..., Combined]:
    from raymerge.merging.dialects.peft import combination

    return combination(function)


def _mergekit(function: str) -> Callable[..., Combined]:
    from raymerge.merging.dialects import mergekit

    found: Callable[..., Combined] = getattr(mergekit, function)
    return found


def _methods(load: Callable[[str], Any], *methods: tuple[Any, ...], **options: Any) -> dict[str, Method]:
    return {name: Method(name, summary, partial(load, name), model, **options) for name, summary, model in methods}


_APART = "sums, prunes and elects on A and B apart"
_NO_WEIGHTS = "mergekit gives this method no weights, so they have to be equal."

DIALECTS: Mapping[str, Mapping[str, Method]] = {
    "peft": _methods(
        _peft,
        ("linear", "A and B summed apart, each at the square root of its weight", NoParameters),
        ("cat", "the weighted sum, exactly", NoParameters),
        ("svd", "the weighted sum, compressed", NoParameters),
        ("ties", f"TIES, {_APART}", p.PeftTies),
        ("ties_svd", "TIES on the deltas, divided by the votes", p.PeftTies),
        ("dare_linear", f"DARE, {_APART}", p.PeftDareLinear),
        ("dare_linear_svd", "DARE on the deltas", p.PeftDareLinear),
        ("dare_ties", f"DARE with elected signs, {_APART}", p.PeftDareTies),
        ("dare_ties_svd", "DARE with elected signs on the deltas, divided by the votes", p.PeftDareTies),
        ("magnitude_prune", f"largest entries, {_APART}", p.PeftPruned),
        ("magnitude_prune_svd", "largest entries of the deltas, summed", p.PeftPruned),
    ),
    "mergekit": {
        **_methods(
            _mergekit,
            ("linear", "weighted mean", p.Linear),
            ("task_arithmetic", "weighted sum", p.TaskArithmetic),
            ("ties", "largest entries, elected signs, mean of those that agree", p.Ties),
            ("dare_linear", "random drop, L1 norm restored, summed", p.Dare),
            ("dare_ties", "random drop, L1 norm restored, signs elected, summed", p.Dare),
            ("della_linear", "drop by rank in the row, L1 norm restored, summed", p.DellaLinear),
            ("della", "drop by rank in the row, L1 norm restored, mean of those that agree", p.Della),
            ("breadcrumbs", "without largest and smallest entries, summed", p.Breadcrumbs),
            ("breadcrumbs_ties", "without largest and smallest entries, signs elected, summed", p.Breadcrumbs),
        ),
        **_methods(
            _mergekit,
            ("slerp", "along the arc between two; linear where they are nearly parallel", p.Slerp),
            fewest=2, most=2, signed=False, degree=0,
        ),
        **_methods(
            _mergekit,
            ("karcher", "Riemannian mean of directions, ten steps", p.Karcher),
            ("sce", "entries that vary most, weighted by energy, signs elected", p.Sce),
            signed=False, degree=0, note=_NO_WEIGHTS,
        ),
        **_methods(
            _mergekit,
            ("model_stock", "the mean, shrunk by how little the experts agree", p.ModelStock),
            fewest=2, signed=False, degree=0, note=_NO_WEIGHTS,
        ),
    },
}  # fmt: skip


def methods_of(dialect: str) -> Mapping[str, Method]:
    """The methods of a dialect; those of `delta` are our own. Raises MergeError, with the allowed names, if there is
    no such dialect."""
    known = {"delta": METHODS, **DIALECTS}
    if dialect not in known:
        raise MergeError(unknown("dialect", dialect, known))
    return known[dialect]


def method_of(name: str, dialect: str) -> Method:
    """A method of a dialect by its name. Raises MergeError, with the nearest names, if there is none."""
    known = methods_of(dialect)
    if name not in known:
        raise MergeError(unknown("method" if dialect == "delta" else f"method of dialect {dialect}", name, known))
    return known[name]
