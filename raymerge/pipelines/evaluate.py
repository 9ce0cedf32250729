"""`raymerge evaluate PROJECT`: answer and score runs that were merged, or recipes without writing adapters."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge import storage
from raymerge.errors import EvaluationError
from raymerge.pipelines.job import finish
from raymerge.pipelines.opening import need_adapters, need_recipes, open_project
from raymerge.pipelines.steps import Steps, run_steps


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
    opened = open_project(location, recipes=recipes or runs)
    need_recipes(opened)
    if not recipes:
        merged = {
            n for n in opened.recipes if storage.exists(storage.join(opened.project.run_folder(n), "recipe.json"))
        }
        missing = [name for name in runs if name not in merged]
        if missing or not merged:
            what = f"run {missing[0]}" if missing else "a run"
            raise EvaluationError(
                f"{opened.project.path(opened.project.output)}: {what} has not been merged.\n"
                f"`raymerge merge {location}` does it."
            )
        opened = opened.only(sorted(merged))
    need_adapters(opened)
    steps = Steps(merge=not recipes, evaluate=True, refit=refit)
    result = run_steps(opened, steps, local=local, title="evaluate")
    for name in opened.recipes if recipes else ():
        folder = storage.join(opened.project.run_folder(name), "evaluation_in_memory")
        summary = storage.read_json(storage.join(folder, "summary.json"))
        mean = {metric: round(value, 4) for metric, value in summary["mean"].items()}
        print(f"{name}: {summary['personas']} personas, {summary['examples']} answers: {mean}")
    return finish(result)
