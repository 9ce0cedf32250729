"""Personas whom nobody knew before, for `benchmarks/router.py`: everything trained and searched without them.

They keep a text to be embedded by, as a new persona has, and their test questions. Their adapters are not there, their
validation rows are gone, the unified adapter and those of the clusters are trained again without their rows, and the
router is told that they are held out.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from router_world import LEARNED, Learned, RouterBench, Row, scores_on_test

from raymerge import storage
from raymerge.config import Project
from raymerge.pipelines.opening import open_project

SEEN = ("own", "unified", "cluster_trained")  # runs of a world that show what their rows are worth


def rows_of(
    bench: RouterBench, searches: Mapping[str, Mapping[str, Any]], count: int, seed: int, trials: int
) -> tuple[tuple[str, ...], Learned, dict[str, Row]]:
    """Who is held out, the router, and the other rows: those of `searches` (sections of a project file), and the base.

    trials: of the router's tuning.
    """
    names = _draw(bench, count, seed)
    sections = _without(bench, names)
    learned = bench.router("cold", {"trials": trials, "held_out": list(names)}, **sections)
    _check(bench.world / "cold.yaml", names)
    rows = {}
    for name, search in searches.items():
        rows[name] = bench.tuned(name, search, output=f"cold_{name}", **sections)
    rows["base"] = bench.as_it_is("base", {"strategy": "base"}, output="cold_base", **sections)
    return names, learned, rows


def seen(bench: RouterBench, names: Sequence[str]) -> dict[str, Row]:
    """What adapters that were trained on their rows too score on them, where the world has such runs."""
    project = open_project(bench.location).project
    there = [name for name in SEEN if storage.exists(storage.join(project.run_folder(name), "evaluation"))]
    return {name: Row(name, scores_on_test(bench.location, name)) for name in there}


def _draw(bench: RouterBench, count: int, seed: int) -> tuple[str, ...]:
    names = open_project(bench.location).adapters
    if not 2 <= count <= len(names) // 2:
        sys.exit(f"--held-out {count}: of {len(names)} personas 2 to {len(names) // 2} can be left out")
    drawn = np.random.default_rng([seed, 20]).permutation(len(names))[:count]
    return tuple(sorted(names[place] for place in drawn))


def _without(bench: RouterBench, names: Sequence[str]) -> dict[str, Any]:
    """Sections of a project that does not know them, its adapters trained where they are not there yet."""
    project, folder = open_project(bench.location).project, bench.world / "cold"
    folder.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in Path(_personas(project)).read_text().splitlines()]
    _write_rows(
        folder / "personas.jsonl", (x for x in lines if x["persona"] not in names or x["split"] != "validation")
    )
    _write_rows(folder / "others.jsonl", (x for x in lines if x["persona"] not in names))
    fitted = storage.read_json(storage.join(project.shared_folder(), "clusters", "clusters.json"))
    labels = {name: label for name, label in fitted.items() if name not in names}
    (folder / "clusters.json").write_text(json.dumps(labels))
    for name in open_project(bench.location).adapters:
        if name not in names and not (folder / "adapters" / name).exists():
            shutil.copytree(project.adapter_location(name), folder / "adapters" / name, copy_function=os.link)
    trained = {"unified_adapter": "cold/unified", "cluster_adapters": "cold/clusters/{cluster}"}
    alone = {**trained, "personas": "cold/others.jsonl", "clusters": {"file": "cold/clusters.json"}}
    location = bench.project("cold_training", **alone)
    for grouping in ("unified", "cluster"):
        bench.command("train", location, "--group-by", grouping)
    return {**trained, "personas": "cold/personas.jsonl", "adapters": "cold/adapters/{persona}"}


def _personas(project: Project) -> str:
    if project.personas is None:
        sys.exit(f"{project.location}: has no personas")
    return project.path(project.personas.path)


def _write_rows(location: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    location.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _check(location: Path, names: Sequence[str]) -> None:
    """End the benchmark if somebody who is held out contributes to anybody."""
    folder = open_project(str(location)).project.run_folder(LEARNED)
    table = storage.read_parquet(storage.join(folder, "routing.parquet"))
    asked = set(table.column("expert").to_pylist()) & set(names)
    if asked:
        sys.exit(f"cold: {min(asked)} is held out and contributes ({len(asked)} such personas)")
