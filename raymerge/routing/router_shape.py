"""What a learned router is before it has learned anything. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from raymerge.errors import RoutingError

WEIGHTS, CONFIG = "router.safetensors", "router.json"  # the files of a trained one
CANDIDATES, TUNED = "candidates.parquet", "recipe.yaml"  # beside them: whom it weighed; the recipe it was tuned to

Network = Literal["bilinear", "mlp"]
Weighting = Literal["softmax", "entmax"]


@dataclass(frozen=True)
class RouterShape:
    """What a router is before it has learned anything.

    size: of an embedding. rank: of U and V (bilinear). hidden: units (mlp). experts: the mlp's outputs in their order;
    none for bilinear. temperature: of the similarity (bilinear). candidates: how many experts, the most similar, a
    persona's score is computed for; k: how many of them contribute at most. scope: where they are looked for.
    max_in_degree: how many personas one expert may serve, its own aside. Raises RoutingError for what cannot be.
    """

    network: Network = "bilinear"
    size: int = 384
    rank: int = 16
    hidden: int = 128
    experts: tuple[str, ...] = ()
    temperature: float = 0.1
    candidates: int = 64
    k: int = 24
    scope: Literal["all", "cluster"] = "all"
    weighting: Weighting = "softmax"
    max_in_degree: int | None = None

    def __post_init__(self) -> None:
        allowed = {"network": get_args(Network), "scope": ("all", "cluster"), "weighting": get_args(Weighting)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise RoutingError(f"router: {name} is {getattr(self, name)!r}.\nExpected one of {', '.join(values)}.")
        for name in ("size", "rank", "hidden", "candidates", "k", "max_in_degree"):
            value = getattr(self, name)
            if not ((name == "max_in_degree" and value is None) or (isinstance(value, int) and value >= 1)):
                raise RoutingError(f"router: {name} is {value!r}.\nExpected a whole number, 1 or more.")
        if not (isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf):
            raise RoutingError(f"router: temperature is {self.temperature!r}.\nExpected a number above 0.")

    def as_record(self) -> dict[str, Any]:
        """JSON-able; `from_record` reads it."""
        return {**asdict(self), "experts": list(self.experts)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RouterShape:
        """The shape of a record. Raises RoutingError for a missing field or an impossible value."""
        missing = [field.name for field in fields(cls) if field.name not in record]
        if missing:
            raise RoutingError(f"router: its shape has no {missing[0]}.\nFound: {', '.join(sorted(record)) or 'none'}.")
        values = {field.name: record[field.name] for field in fields(cls)}
        return cls(**{**values, "experts": tuple(values["experts"])})
