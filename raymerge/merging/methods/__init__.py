"""The methods by name: how the contributors' deltas combine. One file per family; no torch is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge.merging.methods.linear import linear

if TYPE_CHECKING:
    from raymerge.merging.factors import Factor

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """A method of merging.

    parameters: its own, with their defaults. combine: from the modules of the experts (None where one lacks it),
    their weights, the anchor's module or None, and the scale, to the merged delta as a sum of low-rank products;
    modules may be read one by one.
    """

    name: str
    parameters: Mapping[str, Any]
    combine: Callable[..., Iterator[Factor]]


METHODS: Mapping[str, Method] = {method.name: method for method in (Method("linear", {}, linear),)}
