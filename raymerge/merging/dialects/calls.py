"""Which calls of PEFT and mergekit stand for a method, and why their results differ. No torch is imported here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge.merging.methods.parameters import Parameters


@dataclass(frozen=True)
class Call:
    """A method of a library, under its name there.

    reason: why it differs, one sentence. parameters: what it calls ours. halved: those of ours that are half as large
    there.
    """

    library: str
    name: str
    reason: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    halved: tuple[str, ...] = ()

    def translate(self, ours: Parameters) -> dict[str, Any]:
        """Our parameters as the dialect takes them."""
        return {
            theirs: _half(getattr(ours, own)) if own in self.halved else getattr(ours, own)
            for own, theirs in self.parameters.items()
        }

    def refuses(self, ours: Parameters) -> str | None:
        """Why the library cannot be asked for this, or None."""
        if self.library == "mergekit" and getattr(ours, "majority_sign", "total") != "total":
            return "mergekit elects signs by the sum only, not by frequency"
        return None

    def written(self, ours: Parameters) -> str:
        """The call as a user writes it; `...` where a parameter differs by layer or module."""
        given = {
            name: json.dumps(value) if isinstance(value, int | float | str) else "..."
            for name, value in self.translate(ours).items()
            if value is not None and name != "seed"
        }
        if self.library == "peft":
            listed = "".join(f", {name}={value}" for name, value in given.items())
            return f'add_weighted_adapter(combination_type="{self.name}"{listed})'
        return ", ".join((f"merge_method: {self.name}", *(f"{name}: {value}" for name, value in given.items())))


def calls(method: str) -> Sequence[Call]:
    """The calls for one of our methods; none where neither library has it."""
    return _CALLS.get(method, ())


def _half(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {pattern: _half(one) for pattern, one in value.items()}
    return value / 2 if isinstance(value, int | float) else [one / 2 for one in value]


_PEFT_SIGNED = {"density": "density", "majority_sign": "majority_sign_method"}
_SEEDED = {"density": "density", "seed": "seed"}
_DENSITY = {"density": "density"}
_VOTES = "divides by the votes and keeps the weights, so that the result shrinks"
_L1_NORM = "mergekit rescales to the L1 norm from before the drop, not by the probabilities"
_UNWEIGHTED = "signs are elected without the weights"
_APART = "so the result depends on how a delta is written as a product"

_CALLS: Mapping[str, Sequence[Call]] = {
    "linear": (
        Call("peft", "linear", f"PEFT sums A and B apart, each at the square root of its weight, {_APART}"),
        Call("peft", "cat", "PEFT puts the factors of all side by side"),
        Call("peft", "svd", "PEFT sums the deltas"),
        Call("mergekit", "linear", "mergekit divides by the sum of the weights (normalize)"),
        Call("mergekit", "task_arithmetic", "mergekit sums the deltas"),
    ),
    "slerp": (
        Call("mergekit", "slerp", "mergekit joins the deltas as long as they are, not their directions", {"t": "t"}),
    ),
    "karcher": (
        Call("mergekit", "karcher", "mergekit stops after ten steps"),
    ),
    "model_stock": (
        Call("mergekit", "model_stock", "mergekit takes no weights, and a negative mean cosine turns its result round"),
    ),
    "magnitude_prune": (
        Call("peft", "magnitude_prune", f"PEFT prunes and sums A and B apart, {_APART}", _DENSITY),
        Call("peft", "magnitude_prune_svd", "PEFT rounds the number of kept entries down", _DENSITY),
    ),
    "ties": (
        Call("peft", "ties", f"PEFT prunes and elects signs on A and B apart, {_APART}; it {_VOTES}", _PEFT_SIGNED),
        Call("peft", "ties_svd", f"PEFT {_VOTES}; {_UNWEIGHTED}", _PEFT_SIGNED),
        Call("mergekit", "ties", "mergekit divides by the weights that agree and forgets their sum", _DENSITY),
    ),
    "dare_linear": (
        Call("peft", "dare_linear", f"PEFT drops entries of A and B apart, and sums them apart, {_APART}", _SEEDED),
        Call("peft", "dare_linear_svd", "PEFT sums the deltas after the same drop", _SEEDED),
        Call("mergekit", "dare_linear", _L1_NORM, _SEEDED),
    ),
    "dare_ties": (
        Call(
            "peft", "dare_ties", f"PEFT drops entries and elects signs on A and B apart, {_APART}; it {_VOTES}",
            {**_PEFT_SIGNED, "seed": "seed"},
        ),
        Call(
            "peft", "dare_ties_svd", f"PEFT elects signs after the random drop, without the weights; it {_VOTES}",
            {**_PEFT_SIGNED, "seed": "seed"},
        ),
        Call(
            "mergekit", "dare_ties",
            "mergekit elects signs after the random drop, and sums those that agree without a mean", _SEEDED,
        ),
    ),
    "della_linear": (
        Call(
            "mergekit", "della_linear",
            _L1_NORM,
            {**_SEEDED, "epsilon": "epsilon"}, ("epsilon",),
        ),
    ),
    "della": (
        Call(
            "mergekit", "della",
            "mergekit elects signs after the random drop, and rescales to the L1 norm from before it",
            {**_SEEDED, "epsilon": "epsilon"}, ("epsilon",),
        ),
    ),
    "breadcrumbs": (
        Call(
            "mergekit", "breadcrumbs", "mergekit rounds the numbers of kept and of dropped entries down",
            {**_DENSITY, "gamma": "gamma"},
        ),
    ),
    "breadcrumbs_ties": (
        Call(
            "mergekit", "breadcrumbs_ties", "mergekit sums those that agree without a mean",
            {**_DENSITY, "gamma": "gamma"},
        ),
    ),
    "sce": (
        Call(
            "mergekit", "sce", "mergekit takes no weights, and elects signs without the energies of the experts",
            {"density": "select_topk"},
        ),
    ),
}  # fmt: skip
