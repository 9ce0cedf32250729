"""`raymerge run PROJECT`: train what is missing, merge, evaluate and compare, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.errors import EvaluationError
from raymerge.pipelines.compare import compare_runs, show
from raymerge.pipelines.job import finish
from raymerge.pipelines.opening import need_recipes, open_project
from raymerge.pipelines.steps import Steps, run_steps
from raymerge.pipelines.trainings import all_groupings


def run(location: str, *, recipes: Sequence[str] = (), local: bool = False, refit: bool = False) -> int:
    """Everything a project's recipes ask for. Returns the exit status."""
    opened = open_project(location, recipes=recipes)
    need_recipes(opened)
    steps = Steps(train=all_groupings(opened), merge=True, evaluate=True, refit=refit)
    result = run_steps(opened, steps, local=local, title="run")
    try:
        show(compare_runs(location))
    except EvaluationError:
        if not result.failed:  # with failures, they say more than the missing comparison
            raise
    return finish(result)
