"""The parameters of strategies: their defaults, and what each may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from raymerge.errors import RoutingError, unknown

TUNED: Literal["tuned"] = "tuned"


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "k": (_count, "a whole number, 1 or more"),
        "learned_router.k": (lambda value: value is None or _count(value),
                             "a whole number, 1 or more, or null: as many as the router was trained with"),
        "top_clusters": (_count, "a whole number, 1 or more"),
        "temperature": (lambda value: _number(value) and value > 0, "a number above 0"),
        "self_weight": (lambda value: value == "similarity" or (_number(value) and 0 <= value <= 1),
                        "a number from 0 to 1, the persona's own share, or `similarity` to let it compete"),
        "centred": (lambda value: isinstance(value, bool), "true or false"),
        "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
                 "a whole number, 0 or more"),
        "own_weight": (lambda value: value == TUNED or (_number(value) and 0 <= value <= 1),
                       "the own adapter's share, a number from 0 to 1, or `tuned` on validation examples"),
        "sure": (lambda value: _number(value) and 0.5 <= value < 1, "a probability from 0.5 to 1"),
        "tokens": (_count, "a whole number of virtual tokens, 1 or more"),
        "epochs": (lambda value: value is None or _count(value) or (isinstance(value, list | tuple) and len(value) > 0
                   and all(map(_count, value))), "a whole number, or several to choose from on validation examples"),
        "learning_rate": (lambda value: _number(value) and value > 0, "a number above 0"),
        "among": (lambda value: isinstance(value, Mapping) and len(value) > 1,
                  "the names of two recipes or more, of strategies base, own, unified or cluster_trained"),
        "weights": (lambda value: isinstance(value, Mapping) and len(value) > 0,
                    "the experts' weights, such as {ann: 0.7, bob: 0.3}, or such a mapping for each persona"),
        "router": (lambda value: value is None or (isinstance(value, str) and value != ""),
                   "the folder of a trained router"),
        "of": (lambda value: isinstance(value, Mapping) and "strategy" in value,
               "the strategy to control, such as {strategy: sparse_moe, k: 5}"),
    }
)  # fmt: skip


def resolve(strategy: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a strategy. Raises RoutingError for an unknown one or an impossible value."""
    for name in given:
        if name not in defaults:
            refuse(f"strategy {strategy}", "parameter", str(name), defaults)
    resolved = {**defaults, **given}
    for name, value in resolved.items():
        fits, expected = CHECKS.get(f"{strategy}.{name}", CHECKS[name])
        if not fits(value):
            raise RoutingError(f"strategy {strategy}: {name} is {value!r}.\nExpected {expected}.")
    return resolved


def refuse(where: str, what: str, name: str, allowed: Iterable[str]) -> NoReturn:
    """Raise RoutingError for an unknown name, with the nearest and all allowed ones."""
    raise RoutingError(f"{where}: {unknown(what, name, allowed)}")
