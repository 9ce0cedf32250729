"""`raymerge merge PROJECT`: write the adapters of each recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raymerge.config import run_name_fault
from raymerge.errors import MergeError, RecipeError
from raymerge.pipelines.fusion.options import named_parameters, value_of
from raymerge.pipelines.job import finish
from raymerge.pipelines.opening import need_adapters, need_recipes, open_project
from raymerge.pipelines.plan import Steps
from raymerge.pipelines.steps import describe, run_steps


def merge(
    location: str,
    *,
    recipes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    parameters: Sequence[str] = (),
    plan: bool = False,
    local: bool = False,
    refit: bool = False,
) -> int:
    """Merge what is missing. extra: a recipe from the command line; parameters: more of it, each NAME=VALUE; plan: only
    say what would be done.

    Returns the exit status.
    """
    given = {**(extra or {}), **_parameters(parameters, extra or {})}
    opened = open_project(location, recipes=recipes, extra=_recipe(given, recipes))
    need_recipes(opened)
    need_adapters(opened)
    steps = Steps(merge=True, refit=refit)
    if plan:
        for line in describe(opened, steps):
            print(line)
        return 0
    return finish(run_steps(opened, steps, local=local, title="merge"))


def _recipe(given: Mapping[str, Any], recipes: Sequence[str]) -> dict[str, Any] | None:
    if not given:
        return None
    if "strategy" not in given:
        raise RecipeError(f"--{next(iter(given))}: needs --strategy.\nA recipe of the project file is taken as it is.")
    if recipes:
        raise RecipeError("--strategy and --recipe: give one of them.")
    numbers = {key: _number(key, given[key]) for key in ("scale", "rank") if key in given}
    if isinstance(numbers.get("rank"), float):
        numbers["rank"] = {"energy": numbers["rank"]}
    parts = [
        given["strategy"],
        *([f"k{given['k']}"] if "k" in given else []),
        *([given["method"]] if "method" in given else []),
    ]
    name = given.get("name") or "_".join(parts)
    fault = run_name_fault(given["name"]) if "name" in given else None
    if fault:
        raise RecipeError(f"--name {given['name']}: {fault}.\nThe run's folder has this name.")
    return {**given, **numbers, "name": name}


def _parameters(written: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters from --param. given: what options of their own say."""
    try:
        found = named_parameters(written, dict.fromkeys(given, ""))
        return {name: value_of(f"--param {name}", text) for name, text in found.items() if name not in given}
    except MergeError as error:
        raise RecipeError(str(error)) from error


def _number(option: str, value: Any) -> Any:
    """`5`, `0.95`, `match_norm` or `{energy: 0.9, max: 32}` as the project file would give it."""
    if not isinstance(value, str):
        return value
    try:
        return value_of(f"--{option}", value)
    except MergeError as error:
        expected = "a number or match_norm" if option == "scale" else "keep, exact, a number, or energy such as 0.95"
        raise RecipeError(f"--{option} {value}: cannot be read.\nExpected {expected}.") from error
