"""What becomes of the recipe that a search chose: its size at several ranks, and its test score beside the controls.

The winner, the unified adapter and random experts in the winner's place are rows of the comparison like any other. The
latter two have their scales chosen from one grid by the same validation examples; the winner keeps the one it was found
with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from raymerge import storage
from raymerge.errors import ProjectError
from raymerge.evaluation.scores import kind_of
from raymerge.evaluation.statistics import Against, against
from raymerge.manifest import read_manifest
from raymerge.pipelines.job import JobResult
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.plan import Steps
from raymerge.pipelines.searching.aim import Aim
from raymerge.pipelines.steps import run_steps
from raymerge.recipes import parse_recipes
from raymerge.routing.strategies import CONTROLS, WITHOUT_NEIGHBOURS


def check_names(opened: Opened, aim: Aim) -> None:
    """Raise ProjectError if a recipe of the project file has the name of a run that a search makes."""
    taken = sorted({*aim.runs} & {*opened.project.recipes})
    if taken:
        raise ProjectError(
            f"{opened.project.location}: the name {taken[0]} of a recipe is that of a run of "
            f"`raymerge {aim.title}`.\nRename it."
        )


def rows_of(opened: Opened, aim: Aim, winner: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The recipes to compare on test examples, as they are written, and notes on what is left out."""
    rows = {aim.run: dict(winner)}
    notes = []
    if winner["strategy"] not in (*CONTROLS, *WITHOUT_NEIGHBOURS, "named", "base", "own", "unified", "cluster_trained"):
        rows[aim.random] = {"strategy": "random_k", "of": aim.run, "scale": "tuned"}
    if storage.exists(storage.join(opened.project.adapter_location("unified"), "adapter_config.json")):
        rows[aim.unified] = {"strategy": "unified", "scale": "tuned"}
    else:
        notes.append("there is no unified adapter to compare with: `raymerge train --group-by unified` trains one")
    return rows, notes


def score_on_test(opened: Opened, aim: Aim, rows: Mapping[str, Mapping[str, Any]], *, local: bool) -> JobResult:
    """Merge and evaluate the rows on test examples, if there are any. Runs of an earlier search under their names are
    replaced."""
    split, personas = opened.project.evaluation.split, opened.need_personas(aim.title)
    if len(personas.missing(split)) == len(personas.names):
        return JobResult(0, 0, notes=(f"nobody has examples of split {split}: the winner has no score on them",))
    recipes = parse_recipes(rows, centred=opened.project.embedding.centred)
    for name in aim.runs:
        _remove_other(opened.project.run_folder(name), None if name not in recipes else recipes[name].as_dict())
    return run_steps(replace(opened, recipes=recipes), Steps(merge=True, evaluate=True), local=local, title=aim.title)


def _remove_other(folder: str, recipe: Mapping[str, Any] | None) -> None:
    location = storage.join(folder, "recipe.json")
    if storage.exists(location) and storage.read_json(location) != recipe:
        storage.remove(folder)


def beside(opened: Opened, aim: Aim, names: Sequence[str]) -> list[Against]:
    """The winner's test score against other evaluated runs, the best of them first. Runs without scores are left out,
    and ceilings, which nothing is to beat."""
    own = _by_persona(opened, aim.run)
    if own is None:
        return []
    found = []
    for name in names:
        other = _by_persona(opened, name)
        both = sorted(set(own) & set(other or {}))
        if name == aim.run or other is None or len(both) < 2 or _is_ceiling(opened, name):
            continue
        found.append(against(name, *(np.array([one[p] for p in both]) for one in (own, other))))
    return sorted(found, key=lambda one: -one.similarity)


def _is_ceiling(opened: Opened, name: str) -> bool:
    return kind_of(name, storage.read_json(storage.join(opened.project.run_folder(name), "recipe.json"))) == "ceiling"


def score_on_test_examples(opened: Opened, aim: Aim) -> float | None:
    """The winner's mean similarity on test examples, percent; None where it was not scored."""
    own = _by_persona(opened, aim.run)
    return float(np.mean(list(own.values()))) if own else None


def _by_persona(opened: Opened, name: str) -> dict[str, float] | None:
    place = storage.join(opened.project.run_folder(name), "evaluation")
    if read_manifest(place) is None:
        return None
    metrics: pa.Table = storage.read_parquet(storage.join(place, "metrics.parquet"))
    means = metrics.group_by("persona").aggregate([("similarity", "mean")]).to_pylist()
    return {row["persona"]: 100 * float(row["similarity_mean"]) for row in means}
