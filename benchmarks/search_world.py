"""A demo world to search on, for `benchmarks/search.py`: made or copied, and searches of it set up and timed."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from raymerge.pipelines.opening import open_project
from raymerge.pipelines.search import prepare, with_settings
from raymerge.pipelines.searching.scorer import RecipeScorer, subset_sizes
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.tune import search_on_ray
from raymerge.search.records import Trial
from raymerge.search.study import Study


class Clock:
    """Told of trials: when they ended."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.ended: list[float] = []

    def begun(self, trial: Trial) -> None: ...
    def reported(self, trial: Trial) -> None: ...
    def say(self, text: str) -> None: ...

    def finished(self, trial: Trial) -> None:
        self.ended.append(time.perf_counter())

    def seconds_each(self, warm: int) -> float:
        """Of a trial, when the first `warm` have ended."""
        return (self.ended[-1] - self.ended[warm - 1]) / (len(self.ended) - warm)


class Bench:
    """A world to search on, and how a search of it is set up. Everything is below `out`."""

    def __init__(self, out: Path, world: Path | None, arguments: argparse.Namespace) -> None:
        self.world, self.arguments = out / "world", arguments
        self.workers: int = arguments.workers
        self.scratch = Path(tempfile.mkdtemp(dir=out, prefix="scratch-"))
        if not (self.world / "raymerge.yaml").exists():
            make_world(self.world, world)

    @property
    def location(self) -> str:
        return str(self.world / "raymerge.yaml")

    def scorer(self, cache: str, workers: int, **settings: Any) -> tuple[RecipeScorer, tuple[WorkerKind, ...]]:
        """The project's scorer and its model workers, of one thread each. cache: where scores are known, by name."""
        opened = with_settings(open_project(self.location), settings)
        hardware = opened.project.hardware.model_copy(update={"cpus_per_model": 1, "max_model_workers": workers})
        opened = replace(opened, project=opened.project.model_copy(update={"hardware": hardware}))
        sought = prepare(opened, restart=True, local=True)
        names = sought.scorer.names[: self.arguments.personas]
        rungs = subset_sizes(sought.search, len(names), self.location)
        folder = str(self.world / "known" if cache == "kept" else self.scratch / cache)
        return replace(sought.scorer, names=names, rungs=rungs, folder=folder), sought.kinds

    def study(self, scorer: Any, like: RecipeScorer | None = None, **settings: Any) -> Study:
        """A new study of a scorer's points, or of those of another scorer."""
        of = like or scorer
        search = of.opened.project.search.model_copy(update=settings)
        return Study(of.space, search, scorer.rungs, tempfile.mkdtemp(dir=self.scratch), "benchmark", restart=True)

    def run(self, study: Study, scorer: Any, kinds: Sequence[WorkerKind], concurrency: int | None = None) -> Clock:
        """Carry a study out on Ray."""
        clock = Clock()
        search_on_ray(study, scorer, kinds, concurrency=concurrency, may_go_on=lambda: True, watch=clock)
        failed = [trial.error for trial in study.trials if trial.state == "failed"]
        if failed:
            sys.exit(f"{len(failed)} trials failed: {failed[0]}")
        return clock


def make_world(folder: Path, source: Path | None) -> None:
    """A copy of a demo world, or a quick one; with a space to search where its project has none."""
    if source is None:
        print("making a world ...", flush=True)
        command = [sys.executable, "-m", "raymerge.cli", "demo", "--quick", "--out", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    else:
        known = shutil.ignore_patterns("search", "searched*")
        shutil.copytree(source, folder, ignore=known)
    location = folder / "raymerge.yaml"
    project = yaml.safe_load(location.read_text())
    space = {  # of a demo's project, for one that was made before it had any
        "strategy": ["top_k", "sparse_moe", "soft"],
        "k": {"min": 2, "max": 40, "log": True},
        "temperature": {"min": 0.02, "max": 1.0, "log": True},
        "self_weight": {"min": 0.0, "max": 0.5},
        "scale": {"min": 0.5, "max": 2.0, "log": True},
        "centred": [True, False],
    }
    project.setdefault("search", {"recipe": {"strategy": "top_k", "rank": "exact"}, "space": space})
    location.write_text(yaml.safe_dump(project, sort_keys=False))
