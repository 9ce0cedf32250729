"""The space that a search tries, from the project file, checked before anything starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from raymerge.config.search import Search
from raymerge.errors import MergeError, ProjectError, RecipeError, unknown
from raymerge.merging.methods import METHODS
from raymerge.recipes import Recipe
from raymerge.routing.strategies import STRATEGIES
from raymerge.search.parsing import FIXED, OFFSETS, SEARCHED, Entry, Parameter, as_scalar, known_names, refuse
from raymerge.search.points import Space

__all__ = ["Parameter", "Space", "parse_space"]

FIRST = ("strategy", "method")  # decide what else counts
COUNTED = ("top_k", "sparse_moe", "learned_router")  # have k contributors, and the persona itself where it has a share


def parse_space(
    search: Search,
    recipes: Mapping[str, Mapping[str, Any]],
    where: str,
    *,
    clusters: Sequence[str] = (),
    validation: Mapping[str, int],
    centred: bool,
) -> Space:
    """The space of a project file, checked as far as can be without adapters.

    recipes: as written there; the search may begin from one of them. where: the project file, named in errors.
    clusters: their labels. validation: persona -> number of validation examples. Without `search.space` it is k,
    temperature and scale, as far as the recipe has them. Raises ProjectError for an unknown name, an empty range, a
    condition that never holds, more free numbers than `search.free`, a range without steps in a grid, no validation
    examples, and where some choice of strategy and method gives no valid recipe.
    """
    if not any(validation.values()):
        raise ProjectError(f"{where}: search: there are no validation examples.\nTrials are scored on them: add some.")
    base = _base(search, recipes, where)
    written = search.space or _default(base, len(validation))
    for name in written:
        if name not in known_names():
            refuse(where, "", unknown("parameter", name, known_names()))
    context = Entry(where, "", None, (), (), clusters, validation, search.sampler == "grid")
    context = replace(
        context,
        strategies=_tried(context, "strategy", written, base.get("strategy", "")),
        methods=_tried(context, "method", written, base.get("method", "linear")),
    )
    entries = [replace(context, name=name, written=value) for name, value in written.items()]
    parameters = _with_conditions(entries)
    penalties = {OFFSETS[entry.name]: entry.penalty for entry in entries if entry.name in OFFSETS}
    space = Space(base, parameters, penalties, centred)
    if space.free > search.free:
        refuse(
            where,
            "",
            f"{space.free} numbers are searched at once, and at most {search.free} may be.\n"
            "Search fewer, or list choices; `search.free` raises the limit, but a few examples carry no more.",
        )
    _check_corners(space, where)
    if search.sampler == "grid":
        try:
            space.grid()
        except ProjectError as error:
            raise ProjectError(f"{where}: {error}") from error
    return space


def _base(search: Search, recipes: Mapping[str, Mapping[str, Any]], where: str) -> Mapping[str, Any]:
    if not isinstance(search.recipe, str):
        return search.recipe
    if search.recipe not in recipes:
        raise ProjectError(f"{where}: search.recipe: {unknown('recipe', search.recipe, recipes)}")
    return recipes[search.recipe]


def _default(base: Mapping[str, Any], personas: int) -> dict[str, Any]:
    """A small space for a recipe: how many are asked, how evenly, and how strong the result is."""
    strategy = STRATEGIES.get(str(base.get("strategy")))
    known = strategy.parameters if strategy else {}
    most = min(30, personas - 1)
    ranges = {
        "k": {"min": 2, "max": most, "log": True} if most > 2 else None,
        "temperature": {"min": 0.02, "max": 1.0, "log": True},
    }
    scale = {"scale": {"min": 0.5, "max": 3.0, "log": True}}
    return {name: range_ for name, range_ in ranges.items() if name in known and range_} | scale


def _tried(context: Entry, name: str, written: Mapping[str, Any], otherwise: Any) -> tuple[str, ...]:
    """Strategies or methods that are tried; that of the recipe where none is searched, or only on a condition."""
    chosen: tuple[Any, ...] = ()
    if name in written:
        chosen = replace(context, name=name, written=written[name]).parameters()[0].choices
    if not chosen or (isinstance(written[name], Mapping) and "when" in written[name]):
        chosen = (*chosen, str(otherwise))
    registry: Mapping[str, Any] = SEARCHED if name == "strategy" else METHODS
    for one in chosen:
        if one not in registry:
            why = unknown(name, str(one), registry)
            if one in FIXED:
                why = f"strategy {one} merges nothing that could be searched.\nAllowed: {', '.join(SEARCHED)}."
            place = f"search.space.{name}" if name in written else "search.recipe"
            raise ProjectError(f"{context.location}: {place}: {why}")
    return tuple(dict.fromkeys(chosen))


def _with_conditions(entries: Sequence[Entry]) -> tuple[Parameter, ...]:
    """All parameters, also with the conditions that are written, each after those it depends on."""
    found = [(entry, entry.parameters()) for entry in entries]
    choices = {one.name: one.choices for _, parameters in found for one in parameters if one.kind == "choice"}
    waiting = [(e, replace(one, when=_when(e, one, choices))) for e, parameters in found for one in parameters]
    waiting.sort(key=lambda pair: pair[1].name not in FIRST)
    ordered: list[Parameter] = []
    while waiting:
        known = {one.name for one in ordered}
        ready = [one for _, one in waiting if set(one.when) <= known]
        if not ready:
            waiting[0][0].refuse("counts only beside itself: the conditions go in a circle.\nLeave one `when` out.")
        ordered += ready
        waiting = [(entry, one) for entry, one in waiting if not set(one.when) <= known]
    return tuple(ordered)


def _when(entry: Entry, one: Parameter, choices: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The conditions of a parameter: those that follow from registries, and those that are written."""
    written = entry.written.get("when", {}) if isinstance(entry.written, Mapping) else {}
    if not isinstance(written, Mapping):
        entry.refuse(f"when is {written!r}.\nExpected for example {{strategy: [top_k]}}.")
    conditions = dict(one.when)
    for other, values in written.items():
        if other not in choices:
            entry.refuse(f"when: {unknown('parameter with choices', str(other), choices)}")
        asked = [as_scalar(value) for value in (values if isinstance(values, list) else [values])]
        for value in asked:
            if value not in choices[other]:
                entry.refuse(f"when: {unknown(f'choice of {other}', str(value), map(str, choices[other]))}")
        conditions[other] = tuple(value for value in asked if value in conditions.get(other, asked))
        if not conditions[other]:
            entry.refuse(
                f"never counts: `when` asks for {other} {', '.join(map(str, asked))}, which does not have it.\n"
                f"Expected some of: {', '.join(map(str, one.when.get(other, choices[other])))}."
            )
    return conditions


def _check_corners(space: Space, where: str) -> None:
    """Raise ProjectError if a strategy with a method, a choice or an end of a range makes no valid recipe."""
    corners = list(_corners(space))
    faults = [(corner, fault) for corner in corners if (fault := _fault(space, corner)) is not None]
    if not faults:
        return
    corner, fault = faults[0]
    point = ", ".join(f"{name}: {value}" for name, value in corner.items()) or "the recipe"
    if len(faults) == len(corners):
        refuse(where, "", f"holds no valid recipe.\nThe first that was tried, {{{point}}}: {fault}")
    refuse(where, "", f"{{{point}}} is no valid recipe: {fault}\nNarrow the space, or give a condition, `when`.")


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """Each strategy with each method, at both ends of all ranges; and beside these each choice of any other."""
    choices = {one.name: one.choices for one in space.parameters if one.kind == "choice"}
    first = [[(name, value) for value in choices[name]] for name in FIRST if name in choices]
    others = [((name, value),) for name, values in choices.items() if name not in FIRST for value in values]
    for pair, other, end in itertools.product(itertools.product(*first), [(), *others], (0, -1)):
        fixed = dict((*pair, *other))
        values: dict[str, Any] = {}
        for one in space.parameters:
            if one.counts(values):
                values[one.name] = fixed[one.name] if one.name in fixed else (one.choices or one.bounds)[end]
        yield values


def _fault(space: Space, values: Mapping[str, Any]) -> str | None:
    """Why a point is no valid recipe, as far as that can be known without adapters."""
    try:
        recipe = space.recipe(values)
        method = METHODS[recipe.method]
        count = _contributors(recipe)
        if method.most is not None and count > method.most:
            method.check_experts(count)
    except (RecipeError, MergeError) as error:
        return str(error).removeprefix("recipe search: ")
    if recipe.tuned:
        return f"{recipe.tuned[0]} is tuned on the same validation examples.\nGive a number, or search it here."
    weights = [weight for row in _rows(recipe) for weight in row.values()]
    weights += [one.bounds[0] for one in space.parameters if one.path[0] == "weights" and one.name in values]
    if not method.signed and min(weights, default=0.0) < 0:
        return f"weights may be negative, which method {method.name} cannot use."
    by_cluster = any(one.path[:2] == ("scale_offsets", "clusters") and one.name in values for one in space.parameters)
    if by_cluster and recipe.strategy == "named" and len(_rows(recipe)) == 1:
        return "scale_by_cluster: one set of weights for all personas is one merge, which lies in no cluster."
    return None


def _rows(recipe: Recipe) -> list[Mapping[str, float]]:
    """Weights of a recipe that names experts: one row, or one for each persona; else none."""
    weights: Mapping[str, Any] = recipe.strategy_parameters.get("weights") or {}
    rows = [row for row in weights.values() if isinstance(row, Mapping)]
    return rows or ([weights] if weights else [])


def _contributors(recipe: Recipe) -> int:
    """How many a persona may have at most, as far as the recipe says; else 0."""
    if recipe.strategy in COUNTED and (k := recipe.strategy_parameters["k"]) is not None:
        return int(k) + (recipe.strategy_parameters["self_weight"] not in ("similarity", 0, 1))
    return max((len(row) for row in _rows(recipe)), default=0)
