"""The points of a search space: how they are proposed or enumerated, and the recipe that each stands for."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raymerge.errors import ProjectError, RecipeError
from raymerge.merging.methods import METHODS
from raymerge.recipes import Recipe, parse_recipe
from raymerge.routing.strategies import STRATEGIES
from raymerge.search.parsing import Parameter
from raymerge.search.weights import LEAST_SUM, lattice, on_simplex, with_sum

if TYPE_CHECKING:
    import optuna

MOST_POINTS = 100_000  # of a grid
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """What a search tries, beginning from one recipe.

    base: the recipe as written; a parameter that the strategy or method of a point does not have is left out there.
    parameters: each after those that decide whether it counts. penalties: of `clusters` and `layers`, in points of
    similarity for offsets with a mean square of 1. centred: whether embeddings are, unless a recipe says.
    """

    base: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    penalties: Mapping[str, float] = field(default_factory=dict)
    centred: bool = True

    @property
    def free(self) -> int:
        """Numbers that are searched; n weights on a simplex are n - 1 of them."""
        numbers = sum(one.kind != "choice" for one in self.parameters)
        return numbers - len({one.path[:-1] for one in self.parameters if one.simplex})

    @property
    def conditional(self) -> bool:
        """Whether some parameter counts only beside certain values of another."""
        return any(one.when for one in self.parameters)

    @property
    def continuous(self) -> bool:
        """Whether all parameters are numbers, as CMA-ES needs."""
        return all(one.kind != "choice" for one in self.parameters)

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """The values a trial is to have; those that do not count beside the others are not asked for."""
        values: dict[str, Any] = {}
        for one in self.parameters:
            if not one.counts(values):
                continue
            if one.kind == "choice":
                values[one.name] = trial.suggest_categorical(one.name, list(one.choices))
                continue
            ask = trial.suggest_int if one.kind == "int" else trial.suggest_float
            step = {} if one.step is None or one.simplex else {"step": one.step}
            values[one.name] = ask(one.name, *one.bounds, log=one.log, **step)
        return values

    def written(self, values: Values) -> dict[str, Any]:
        """The recipe of a point as one would write it in the project file.

        A scale is written times match_norm. Weights are made of their numbers by `weights.on_simplex`, or by
        `weights.with_sum` where they are free. Raises RecipeError where a value is missing, or does not count beside
        the others.
        """
        counting = [one for one in self.parameters if one.counts(values)]
        wrong = sorted({one.name for one in counting} ^ set(values))
        if wrong:
            raise RecipeError(f"values of a search: {', '.join(wrong)}: missing, or given where it does not count.")
        recipe = {**self.base, **{one.name: _meant(one, values[one.name]) for one in counting if len(one.path) == 1}}
        weights = self._weights(values)
        if weights:
            recipe["weights"] = weights
        offsets = self._offsets(values)
        if offsets:
            recipe["scale_offsets"] = {**(recipe.get("scale_offsets") or {}), **offsets}
        own = _parameters_of(str(recipe.get("strategy")), str(recipe.get("method", "linear")))
        foreign = (
            set().union(*(_parameters_of(s, m) for s in self.tried("strategy") for m in self.tried("method"))) - own
        )
        return {key: value for key, value in recipe.items() if key not in foreign}

    def told(self, values: Values) -> dict[str, Any]:
        """Values as a person reads them: the weight of an expert, by its name, for the number that it is made from."""
        names = {one.name for one in self.parameters}
        found: dict[str, Any] = {}
        weights = self._weights(values)
        for one in self.parameters:
            if one.path[0] != "weights" and one.name in values:
                found[one.name] = values[one.name]
            elif one.name in values:
                short = ".".join(one.path[1:])
                row = weights[one.path[1]] if len(one.path) == 3 else weights
                found[one.name if short in names else short] = row[one.path[-1]]
        return found

    def tried(self, what: Literal["strategy", "method"]) -> list[str]:
        """Strategies or methods that the search tries, and that of the base."""
        searched = [value for one in self.parameters if one.name == what for value in one.choices]
        return [*searched, str(self.base.get(what, "linear" if what == "method" else ""))]

    def recipe(self, values: Values, name: str = "search") -> Recipe:
        """The recipe of a point. Raises RecipeError as `parse_recipe` and `written`."""
        return parse_recipe(name, self.written(values), centred=self.centred)

    def penalty(self, values: Values) -> float:
        """What the offsets of a point cost, in points of similarity: the mean of their squares times the penalty."""
        cost = 0.0
        for kind, weight in self.penalties.items():
            found = [values[one.name] for one in self.parameters if one.path[:2] == ("scale_offsets", kind)
                     and one.name in values]  # fmt: skip
            cost += weight * float(np.mean(np.square(found))) if found else 0.0
        return cost

    def grid(self) -> list[dict[str, Any]]:
        """All points, in the order of the parameters; without free weights that sum to too little.

        Raises ProjectError for a range without a step, and for more than `MOST_POINTS`.
        """
        points = list(itertools.islice(self._points(self._axes(), {}), MOST_POINTS + 1))
        if len(points) > MOST_POINTS:
            raise ProjectError(f"search.space: the grid has more than {MOST_POINTS:,} points.\nGive larger steps.")
        return points

    def _points(self, axes: Sequence[tuple[Parameter, list[dict[str, Any]]]], values: Values) -> Iterator[Any]:
        if not axes:
            if all(group[0].simplex or sum(numbers) >= LEAST_SUM * group[0].bounds[1]
                   for group, numbers in self._weight_groups(values)):  # fmt: skip
                yield dict(values)
            return
        (one, places), *rest = axes
        for place in places if one.counts(values) else [{}]:
            yield from self._points(rest, {**values, **place})

    def _axes(self) -> list[tuple[Parameter, list[dict[str, Any]]]]:
        """What each parameter may be; the weights of one simplex are one axis, under the first of them."""
        axes: list[tuple[Parameter, list[dict[str, Any]]]] = []
        for one in self.parameters:
            names = [other.name for other in self.parameters if one.simplex and other.path[:-1] == one.path[:-1]]
            if names[1:] and one.name != names[0]:
                continue
            if one.kind == "choice":
                axes.append((one, [{one.name: value} for value in one.choices]))
            elif one.step is None:
                raise ProjectError(
                    f"search.space.{one.name}: a range without a step has no grid.\n"
                    "Give `step`, list the choices, or take another `search.sampler`."
                )
            elif one.simplex:
                shares = lattice(len(names), round(1 / one.step))
                axes.append((one, [dict(zip(names, (math.exp(-w) for w in point), strict=True)) for point in shares]))
            else:
                (low, high), step = one.bounds, one.step
                steps = range(round((high - low) / step) + 1)
                axes.append((one, [{one.name: low + i * step if one.kind == "int" else round(low + i * step, 12)}
                                   for i in steps]))  # fmt: skip
        return axes

    def _weight_groups(self, values: Values) -> Iterator[tuple[list[Parameter], list[float]]]:
        """Parameters of the weights of all personas or of one, and their values."""
        chosen = [one for one in self.parameters if one.path[0] == "weights" and one.name in values]
        for _, members in itertools.groupby(chosen, key=lambda one: one.path[:-1]):
            group = list(members)
            yield group, [values[one.name] for one in group]

    def _weights(self, values: Values) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for group, numbers in self._weight_groups(values):
            weights = on_simplex(numbers) if group[0].simplex else with_sum(numbers, *group[0].bounds)
            named = {one.path[-1]: weight for one, weight in zip(group, weights, strict=True)}
            found.update({group[0].path[1]: named} if len(group[0].path) == 3 else named)
        return found

    def _offsets(self, values: Values) -> dict[str, Any]:
        found: dict[str, dict[str, float]] = {}
        for one in self.parameters:
            if one.path[0] == "scale_offsets" and one.name in values:
                found.setdefault(one.path[1], {})[one.path[2]] = values[one.name]
        return {kind: list(some.values()) if kind == "layers" else some for kind, some in found.items()}


def _parameters_of(strategy: str, method: str) -> set[str]:
    known = [STRATEGIES[strategy].parameters] if strategy in STRATEGIES else []
    return set().union(*known, *([METHODS[method].defaults] if method in METHODS else []))


def _meant(one: Parameter, value: Any) -> Any:
    """What stands in the recipe for a value of the search."""
    if isinstance(value, str) and value.startswith(("{", "[")):
        return json.loads(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"match_norm": float(value)} if one.name == "scale" and is_number else value
