"""The parameters of each method: names, ranges and defaults. No torch is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from raymerge.merging.settings import checked, value_at


def _within(expected: str, allowed: Callable[[float], bool]) -> BeforeValidator:
    return BeforeValidator(lambda value: checked(value, allowed, expected))


Density = Annotated[Any, _within("a density above 0 and at most 1", lambda x: 0 < x <= 1)]
Share = Annotated[Any, _within("a share from 0 to below 1", lambda x: 0 <= x < 1)]
Blend = Annotated[Any, _within("a number from 0 to 1", lambda x: 0 <= x <= 1)]


class Parameters(BaseModel):
    """Parameters of a method. A `Density`, `Share` or `Blend` may differ by layer and module (`merging.settings`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def at(self, path: str, depth: float) -> dict[str, Any]:
        """The parameters as they are at a module; the default where no pattern fits."""
        values = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            varies = isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str))
            values[name] = value_at(value, path, depth, field.default) if varies else value
        return values


class NoParameters(Parameters):
    """A method that has none."""


class Slerp(Parameters):
    """t: 0 is the first expert by name, 1 the second; without it, from the weights: w_2 / (w_1 + w_2)."""

    t: Blend | None = None


class Karcher(Parameters):
    """tolerance: length of the step (radians) below which the mean is found; steps: at most so many."""

    tolerance: float = Field(1e-10, gt=0, lt=1)
    steps: StrictInt = Field(1000, ge=1)


class MagnitudePrune(Parameters):
    """density: share of entries that is kept."""

    density: Density = 0.5


class Ties(Parameters):
    """density: share of entries that is kept. majority_sign: of the sum (total) or of the count (frequency)."""

    density: Density = 0.2
    majority_sign: Literal["total", "frequency"] = "total"


class DareLinear(Parameters):
    """density: probability with which an entry is kept. seed: of the random drop."""

    density: Density = 0.5
    seed: StrictInt = Field(0, ge=0)


class DareTies(DareLinear):
    """majority_sign: of the sum (total) or of the count (frequency)."""

    majority_sign: Literal["total", "frequency"] = "total"


class DellaLinear(DareLinear):
    """epsilon: the probability to keep an entry rises with its rank in its row, from density - epsilon / 2 to
    density + epsilon / 2, narrowed where it would pass 1 or half the density."""

    epsilon: Share = 0.1


class Della(DellaLinear):
    """majority_sign: of the sum (total) or of the count (frequency)."""

    majority_sign: Literal["total", "frequency"] = "total"


class Breadcrumbs(Parameters):
    """gamma: share of the largest entries that is dropped as outliers. density: share that is kept of all."""

    density: Density = 0.9
    gamma: Share = 0.01


class BreadcrumbsTies(Breadcrumbs):
    """majority_sign: of the sum (total) or of the count (frequency)."""

    majority_sign: Literal["total", "frequency"] = "total"


class Sce(Parameters):
    """density: share of entries that is kept, those that vary most between the experts."""

    density: Density = 0.2


class Knots(Ties):
    """density, majority_sign: of TIES, over the coordinates in the shared basis."""


def plain(parameters: Parameters) -> dict[str, Any]:
    """Parameters as JSON-able data."""
    return parameters.model_dump(mode="json")
