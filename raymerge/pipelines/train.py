"""`raymerge train PROJECT --group-by persona|cluster|unified`: train adapters that are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from raymerge.config import GROUPINGS, Training
from raymerge.errors import ProjectError
from raymerge.pipelines.job import finish
from raymerge.pipelines.opening import Opened, open_project
from raymerge.pipelines.plan import Steps
from raymerge.pipelines.steps import run_steps
from raymerge.pipelines.trainings import is_unified


def train(
    location: str,
    *,
    group_by: str,
    cluster: str | None = None,
    start_from: str | None = None,
    settings: Mapping[str, Any] | None = None,
    local: bool = False,
    refit: bool = False,
) -> int:
    """Train one grouping. Returns the exit status.

    cluster: the only one to train, by label or number. start_from: an adapter to begin from, from the workspace.
    settings: of `training` in the project file, which these take the place of.
    """
    if group_by not in GROUPINGS:
        raise ProjectError(f"--group-by {group_by}: unknown grouping.\nAllowed: {', '.join(GROUPINGS)}.")
    if cluster is not None and group_by != "cluster":
        raise ProjectError(f"--cluster {cluster}: goes with --group-by cluster alone.")
    opened = open_project(location, start_from=start_from).without_recipes()
    opened = _with_settings(opened, settings or {})
    if group_by == "unified" and is_unified(opened.project, start_from):
        raise ProjectError(f"--start-from {start_from}: the unified adapter cannot start from itself.")
    steps = Steps(train=(group_by,), refit=refit, cluster=cluster)
    return finish(run_steps(opened, steps, local=local, title=f"train {group_by}"))


def _with_settings(opened: Opened, settings: Mapping[str, Any]) -> Opened:
    """The project with other settings of training. Raises ProjectError for an impossible one."""
    if not settings:
        return opened
    try:
        training = Training(**{**opened.project.training.model_dump(), **settings})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "settings"
        raise ProjectError(f"--{where.replace('_', '-')}: {problem['msg']}; found {problem['input']!r}.") from error
    given = ", ".join(f"{name} {value}" for name, value in settings.items())
    note = f"trained with {given} as given here; `raymerge run` trains anew unless the project file says the same"
    return replace(
        opened, project=opened.project.model_copy(update={"training": training}), notes=(*opened.notes, note)
    )
