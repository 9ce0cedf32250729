"""`raymerge run PROJECT`: train what is missing, merge, evaluate and compare, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raymerge.errors import EvaluationError
from raymerge.pipelines.compare import compare_runs, show
from raymerge.pipelines.job import JobResult, finish
from raymerge.pipelines.opening import need_recipes, open_project
from raymerge.pipelines.plan import Steps
from raymerge.pipelines.seeds import check_seeds, with_seed
from raymerge.pipelines.steps import run_steps
from raymerge.pipelines.trainings import all_groupings, start_of


def run(location: str, *, recipes: Sequence[str] = (), seeds: int = 1, local: bool = False, refit: bool = False) -> int:
    """Everything a project's recipes ask for. seeds: trainings of everything, each with a seed of its own.

    Returns the exit status.
    """
    opened = open_project(location, recipes=recipes)
    need_recipes(opened)
    steps = Steps(train=all_groupings(opened), merge=True, evaluate=True, refit=refit)
    if seeds > 1:
        check_seeds(opened, steps.train)
    starts = {grouping: start_of(opened, grouping) for grouping in steps.train}
    result = run_steps(opened, steps, local=local, title="run")
    for number in range(1, seeds):
        other, begun = with_seed(opened, starts, number)
        again = run_steps(other, replace(steps, starts=begun), local=local, title=f"run, seed {number}")
        result = _joined(result, again, number)
    try:
        show(compare_runs(location))
    except EvaluationError:
        if not result.failed:  # with failures, they say more than the missing comparison
            raise
    return finish(result)


def _joined(result: JobResult, again: JobResult, number: int) -> JobResult:
    failed = {f"seed {number}: {item}": why for item, why in again.failed.items()}
    return replace(
        result, done=result.done + again.done, skipped=result.skipped + again.skipped,
        failed={**result.failed, **failed},
    )  # fmt: skip
