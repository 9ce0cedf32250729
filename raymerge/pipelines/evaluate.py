"""`raymerge evaluate PROJECT`: answer and score runs that were merged, or recipes without writing adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raymerge import storage
from raymerge.errors import EvaluationError, RecipeError, RoutingError, did_you_mean
from raymerge.manifest import read_manifest
from raymerge.pipelines.job import finish
from raymerge.pipelines.opening import Opened, need_adapters, need_recipes, open_project, with_those_asked
from raymerge.pipelines.plan import Steps
from raymerge.pipelines.steps import run_steps
from raymerge.recipes import Recipe


def evaluate(
    location: str,
    *,
    runs: Sequence[str] = (),
    recipes: Sequence[str] = (),
    local: bool = False,
    refit: bool = False,
) -> int:
    """Score runs (all that were merged if none is named) or, with recipes, score without writing adapters.

    Returns the exit status.
    """
    if runs and recipes:
        raise EvaluationError("--run and --recipe: give one of them.")
    opened = open_project(location, recipes=recipes)
    if recipes:
        need_recipes(opened)
    else:
        opened = _merged_runs(opened, runs)
    need_adapters(opened)
    steps = Steps(merge=not recipes, evaluate=True, refit=refit)
    result = run_steps(opened, steps, local=local, title="evaluate")
    for name in opened.recipes if recipes else ():
        _say_means(storage.join(opened.project.run_folder(name), "evaluation_in_memory"), name)
    return finish(result)


def _say_means(folder: str, name: str) -> None:
    """Print a recipe's figures; nothing where it has none, since its failures speak for themselves."""
    if read_manifest(folder) is None:
        return
    summary = storage.read_json(storage.join(folder, "summary.json"))
    if summary["personas"]:
        mean = {metric: round(value, 4) for metric, value in summary["mean"].items()}
        print(f"{name}: {summary['personas']} personas, {summary['examples']} answers: {mean}")


def _merged_runs(opened: Opened, runs: Sequence[str]) -> Opened:
    """The project with the recipes of these runs (of all that were merged if none is named).

    A run made with --strategy is not in the project file: its recipe is the one recorded in its folder. Raises
    EvaluationError for a run that is not there.
    """
    output = opened.project.path(opened.project.output)
    merged = [n for n in storage.list_folders(output) if storage.exists(_record(opened, n))]
    missing = [name for name in runs if name not in merged]
    if missing or not merged:
        hints = [did_you_mean(missing[0], merged).strip()] if missing else []
        found = " ".join([*filter(None, hints), f"Found: {', '.join(merged) or 'none'}."])
        raise EvaluationError(
            f"{output}: {f'run {missing[0]}' if missing else 'a run'} has not been merged.\n"
            f"{found} `raymerge merge {opened.project.location}` makes them."
        )
    wanted = sorted(set(runs)) or merged
    chosen = {n: opened.recipes.get(n) or _recorded(opened, n) for n in wanted}
    return replace(opened, recipes=with_those_asked(chosen, opened.recipes))


def _record(opened: Opened, name: str) -> str:
    return storage.join(opened.project.run_folder(name), "recipe.json")


def _recorded(opened: Opened, name: str) -> Recipe:
    written = storage.read_json(_record(opened, name))
    try:
        recipe = Recipe(**{**written, "name": name})
        _ = recipe.needs  # knows the strategy
    except (TypeError, KeyError, AttributeError, RoutingError) as error:
        raise RecipeError(
            f"{_record(opened, name)}: is not a recipe that this version knows.\n{error}\n"
            "Merge it anew, or add the recipe to the project file."
        ) from error
    return recipe
