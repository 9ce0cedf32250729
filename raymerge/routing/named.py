"""Experts named one by one, at the weights that a recipe gives them: for everybody alike, or for each persona."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from raymerge.errors import RoutingError
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.lines import Rows
from raymerge.routing.neighbours import make_row

Weights = Mapping[str, float]


def parse_weights(written: Mapping[Any, Any]) -> dict[str, Any]:
    """{expert: weight}, or {persona: {expert: weight}}, all weights float. A weight may be negative.

    Raises RoutingError for a weight that is no finite number, and for weights that sum to 0 or less.
    """
    if all(isinstance(value, Mapping) for value in written.values()):
        return {str(persona): _parse_row(value, f" for {persona}") for persona, value in written.items()}
    return _parse_row(written, "")


def _parse_row(written: Mapping[Any, Any], whose: str) -> dict[str, float]:
    for name, value in written.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RoutingError(
                f"strategy named: the weight of {name}{whose} is {value!r}.\nExpected a finite number for each expert, "
                "such as {ann: 0.7, bob: 0.3}, or such a mapping for each persona."
            )
    total = math.fsum(written.values())
    if total <= 0:
        raise RoutingError(
            f"strategy named: the weights{whose} sum to {total:.6g}.\nExpected a sum above 0: single weights may be "
            "negative, but a row that takes away more than it gives turns its experts around."
        )
    return {str(name): float(value) for name, value in written.items()}


def by_persona(weights: Mapping[str, Any]) -> Mapping[str, Weights] | None:
    """Persona -> weights, where each has its own; None where they are for everybody."""
    return weights if isinstance(next(iter(weights.values()), None), Mapping) else None


def experts_in(weights: Mapping[str, Any], below: float = math.inf) -> tuple[str, ...]:
    """The experts that weights name, sorted; those with a weight below a bound, where one is given."""
    own = by_persona(weights)
    rows = [weights] if own is None else own.values()
    return tuple(sorted({name for row in rows for name, weight in row.items() if weight < below}))


def named(parameters: Mapping[str, Any], inputs: RoutingInputs) -> tuple[Rows, list[str]]:
    """Rows of the weights as they are; a persona that is given none where others are gets the base.

    Raises RoutingError for a persona among the experts whose adapter is not there and will not be.
    """
    weights = parameters["weights"]
    experts = experts_in(weights)
    without = sorted(set(experts) & (set(inputs.personas) - set(inputs.experts)))
    if without:
        raise RoutingError(
            f"strategy named: {without[0]} has no adapter.\nNothing that is to be done trains it: train it first "
            "(`raymerge train`), or add a recipe of strategy own."
        )
    position = {name: i for i, name in enumerate(experts)}
    own = by_persona(weights)
    given = [weights] if own is None else [own.get(persona, {}) for persona in inputs.personas]
    rows = []
    for row in given:
        kept = {position[name]: weight for name, weight in row.items() if weight != 0}
        adapter = "all" if own is None else None
        rows.append(make_row(np.array(list(kept), np.int64), np.array(list(kept.values())), adapter=adapter))
    row_of = np.zeros(len(inputs.personas), np.int32) if own is None else np.arange(len(rows), dtype=np.int32)
    unnamed = [] if own is None else [persona for persona in inputs.personas if persona not in own]
    notes = [f"{unnamed[0]}: is given no weights and gets the base ({len(unnamed)} such personas)"] if unnamed else []
    return Rows(experts, tuple(rows), row_of), notes
