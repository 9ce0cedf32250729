"""A row as other training seeds made it: its answers' scores, as far as all but the seed is the same as now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from raymerge import storage
from raymerge.config import Project
from raymerge.manifest import read_manifest
from raymerge.pipelines.artefacts import Artefact, Artefacts
from raymerge.pipelines.seeds import FOLDER
from raymerge.pipelines.trainings import is_unified

_FOLDERS = {"persona": "adapters", "cluster": "clusters"}  # of trained adapters, below a seed's


def read_other_seeds(
    project: Project, name: str, recipe: Mapping[str, Any], parts: Sequence[Artefact | None], artefacts: Artefacts
) -> tuple[dict[int, pa.Table], tuple[str, ...]]:
    """Seed -> the metrics of a row, and notes on the seeds that are left out since the row was made in another way.

    recipe, parts: of the row as it is now, and the adapters that it is made of.
    """
    below = storage.join(project.path(project.output), FOLDER)
    found: dict[int, pa.Table] = {}
    notes = []
    for seed in sorted(int(folder) for folder in storage.list_folders(below) if folder.isdecimal()):
        place = storage.join(below, str(seed))
        evaluation = storage.join(place, name, "evaluation")
        if read_manifest(evaluation) is None:
            continue
        why = _other_recipe(project, recipe, place, name) or _other_training(project, parts, place, name, artefacts)
        if why is None:
            found[seed] = storage.read_parquet(storage.join(evaluation, "metrics.parquet"))
        else:
            notes.append(f"seed {seed} is left out: {why}. `raymerge run --seeds` makes it anew.")
    return found, tuple(notes)


def _other_recipe(project: Project, recipe: Mapping[str, Any], place: str, name: str) -> str | None:
    location = storage.join(place, name, "recipe.json")
    theirs = storage.read_json(location) if storage.exists(location) else {}
    differing = [
        key
        for key in sorted({*recipe, *theirs})
        if (_moved(project, recipe.get(key), place) if key == "anchor" else recipe.get(key))
        != (project.path(theirs[key]) if key == "anchor" and theirs.get(key) else theirs.get(key))
    ]
    return f"its recipe was another one then ({', '.join(differing)})" if differing else None


def _other_training(
    project: Project, parts: Sequence[Artefact | None], place: str, name: str, artefacts: Artefacts
) -> str | None:
    for part in parts:
        if part is None or part.grouping is None or part.name is None:
            continue
        theirs = artefacts.read_beside(_trained(place, name, part.grouping, part.name))
        if theirs is None:
            return f"the adapter {part.name} of its training is not there"
        mine = {**part.training, "start_from": _moved(project, part.training.get("start_from"), place)}
        start = theirs.training.get("start_from")
        others = {**theirs.training, "start_from": None if start is None else project.path(start)}
        differing = sorted(key for key in mine.keys() & others.keys() if mine[key] != others[key])
        if differing:
            return f"{part.name} was trained with other settings then ({', '.join(differing)})"
    return None


def _trained(place: str, run: str, grouping: str, name: str) -> str:
    """Where a seed has the adapter of a grouping; a run that trains its own has them in its folder."""
    if grouping == "unified":
        return storage.join(place, "_trained", "unified")
    if grouping in _FOLDERS:
        return storage.join(place, "_trained", _FOLDERS[grouping], name)
    return storage.join(place, run, "trained", name)


def _moved(project: Project, location: str | None, place: str) -> str | None:
    """A location of the project file as a seed has it: its own unified adapter for the unified one."""
    if location is None:
        return None
    return storage.join(place, "_trained", "unified") if is_unified(project, location) else project.path(location)
