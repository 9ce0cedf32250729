"""`raymerge merge PROJECT`: write the adapters of each recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from raymerge.errors import RecipeError
from raymerge.pipelines.job import finish
from raymerge.pipelines.opening import need_adapters, need_recipes, open_project
from raymerge.pipelines.steps import Steps, describe, run_steps


def merge(
    location: str,
    *,
    recipes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    plan: bool = False,
    local: bool = False,
    refit: bool = False,
) -> int:
    """Merge what is missing. extra: a recipe from the command line; plan: only say what would be done.

    Returns the exit status.
    """
    opened = open_project(location, recipes=recipes, extra=_recipe(extra or {}, recipes))
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
    written = {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in given.items()}
    if isinstance(written.get("rank"), float):
        written["rank"] = {"energy": written["rank"]}
    default = written["strategy"] + (f"_k{written['k']}" if "k" in written else "")
    return {**written, "name": written.get("name", default)}
