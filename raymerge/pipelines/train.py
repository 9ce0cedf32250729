"""`raymerge train PROJECT --group-by persona|cluster|unified`: train adapters that are missing."""

from __future__ import annotations

from raymerge.config import GROUPINGS
from raymerge.errors import ProjectError
from raymerge.pipelines.job import finish
from raymerge.pipelines.opening import open_project
from raymerge.pipelines.steps import Steps, run_steps
from raymerge.pipelines.trainings import is_unified


def train(
    location: str, *, group_by: str, start_from: str | None = None, local: bool = False, refit: bool = False
) -> int:
    """Train one grouping. start_from: an adapter to begin from, from the workspace. Returns the exit status."""
    if group_by not in GROUPINGS:
        raise ProjectError(f"--group-by {group_by}: unknown grouping.\nAllowed: {', '.join(GROUPINGS)}.")
    opened = open_project(location, start_from=start_from).without_recipes()
    if group_by == "unified" and is_unified(opened.project, start_from):
        raise ProjectError(f"--start-from {start_from}: the unified adapter cannot start from itself.")
    steps = Steps(train=(group_by,), refit=refit)
    return finish(run_steps(opened, steps, local=local, title=f"train {group_by}"))
