"""Projects on a demo world for `benchmarks/router.py`: routers trained, recipes searched, and what each scores on test.

Every project is a file beside the world's own, with an output of its own; embeddings, mean and clusters are the
world's, so that all rows route among the same vectors.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from search_world import make_world

from raymerge import storage
from raymerge.evaluation.statistics import against
from raymerge.pipelines.job import read_timings
from raymerge.pipelines.opening import Opened, open_project
from raymerge.pipelines.plan import Steps
from raymerge.pipelines.router import check as check_router
from raymerge.pipelines.router import train as train_router
from raymerge.pipelines.search import find, prepare
from raymerge.pipelines.steps import run_steps
from raymerge.recipes import parse_recipes
from raymerge.runtime.connection import connected
from raymerge.search.results import Summary, read_summary

LEARNED = "learned_router"  # the run that `raymerge router` makes


@dataclass(frozen=True)
class Row:
    """A row of the table: test similarity by persona in percent, and what was searched for it.

    validation: similarity of the recipe on the examples that it was chosen by, percent.
    """

    name: str
    by_persona: Mapping[str, float]
    trials: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    validation: float | None = None

    def mean(self, names: Iterable[str] | None = None) -> float:
        """Over all personas, or these."""
        return float(np.mean([self.by_persona[name] for name in names or self.by_persona]))


@dataclass(frozen=True)
class Learned(Row):
    """A trained router. folder: where it lies. record: its router.json. seconds: of its training."""

    folder: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def before(self) -> Mapping[str, float]:
        """Loss, validation and entropy before training."""
        found: Mapping[str, float] = self.record["history"][0]
        return found

    @property
    def after(self) -> Mapping[str, float]:
        """The same after the epoch that was kept."""
        found: Mapping[str, float] = self.record["history"][self.record["best_epoch"]]
        return found

    def candidates(self) -> NDArray[np.int64]:
        """Numbers of each persona's candidates, (personas, candidates), -1 where there are fewer."""
        table = storage.read_parquet(storage.join(self.folder, "candidates.parquet"))
        (people, rows), (_, numbers) = (
            np.unique(np.array(table.column(name).to_pylist()), return_inverse=True) for name in ("persona", "expert")
        )
        found = np.full((len(people), np.bincount(rows).max()), -1, dtype=np.int64)
        for row in range(len(found)):
            own = numbers[rows == row]
            found[row, : len(own)] = own
        return found


class RouterBench:
    """A world and the projects on it. Everything is below `out`, and what is there already is not made again."""

    def __init__(self, out: Path, world: Path | None) -> None:
        self.world = out / "world"
        if not (self.world / "raymerge.yaml").exists():
            make_world(self.world, world)
            _keep_search(self.world, world)
        self.location = str(self.world / "raymerge.yaml")

    def project(self, name: str, **sections: Any) -> str:
        """Write a project of this name, other than the world's in these sections. Returns its location."""
        written = yaml.safe_load(Path(self.location).read_text())
        runs = Path(self.world, written.get("output", "runs"))
        written |= {"output": f"made/{name}", "recipes": {}, **sections}
        location, shared = self.world / f"{name}.yaml", self.world / "made" / name / "_shared"
        location.write_text(yaml.safe_dump(written, sort_keys=False))
        if not shared.exists():
            shutil.copytree(runs / "_shared", shared, ignore=shutil.ignore_patterns("timings.jsonl"))
        return str(location)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the world's project file as it is written there."""
        return dict(yaml.safe_load(Path(self.location).read_text()).get(name, {}))

    def router(self, name: str, settings: Mapping[str, Any], **sections: Any) -> Learned:
        """`raymerge router` in a project of this name. settings: of the section `router`."""
        plain = {**self.section("search"), "ranks": []}
        location = self.project(name, router=dict(settings), search=plain, **sections)
        self.command("router", location)
        folder = open_project(location).project.router_folder()
        return _learned(location, **_searched(read_summary(storage.join(folder, "tuning"))))

    def trained(self, name: str, settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> Learned:
        """A router that is only trained, and scored by a recipe that another one was tuned to."""
        location = self.project(name, router=dict(settings))
        opened = open_project(location)
        with connected():
            result = train_router(opened, check_router(opened), local=False)
            if result.failed:
                sys.exit(f"{name}: {next(iter(result.failed.values()))}")
            score_on_test(opened, {LEARNED: recipe})
        return _learned(location, recipe=dict(recipe))

    def tuned(self, name: str, search: Mapping[str, Any], *, output: str = "", **sections: Any) -> Row:
        """The recipe that a search finds, on test examples. search: the section of the project file.

        output: of the project, by default the row's name.
        """
        location = self.project(output or name, search={**search, "ranks": []}, **sections)
        opened = open_project(location)
        with connected():  # once for the search and the scoring
            found = find(prepare(opened, restart=False, local=False), local=False)
            score_on_test(opened, {name: found.written})
        return Row(name, scores_on_test(location, name), **_searched(found.summary))

    def as_it_is(self, name: str, recipe: Mapping[str, Any], *, output: str, **sections: Any) -> Row:
        """A recipe on test examples, nothing of it searched."""
        location = self.project(output, **sections)
        score_on_test(open_project(location), {name: recipe})
        return Row(name, scores_on_test(location, name), 0, recipe)

    def searched(self, trials: int) -> Row:
        """The winner of the world's own search, else of one over the same space with so many trials."""
        folder = Path(open_project(self.location).project.search_folder())
        if (folder / "search.json").exists() and (folder.parent / "searched" / "evaluation").exists():
            summary = read_summary(str(folder))
            return Row("searched", scores_on_test(self.location, "searched"), **_searched(summary))
        return self.tuned("searched", {**self.section("search"), "trials": trials})

    def command(self, *arguments: str) -> None:
        """Run a command of the command line to its end; what it prints goes to a file beside the world."""
        log = self.world.parent / "commands.log"
        with open(log, "a") as file:
            done = subprocess.run([sys.executable, "-m", "raymerge.cli", *arguments], stdout=file, stderr=file)
        if done.returncode != 0:
            sys.exit(f"raymerge {' '.join(arguments)}: exit status {done.returncode}; see {log}")


def score_on_test(opened: Opened, written: Mapping[str, Mapping[str, Any]]) -> None:
    """Merge recipes and score them on test examples, each as a run of the project's output."""
    recipes = parse_recipes(written, centred=opened.project.embedding.centred)
    steps = Steps(merge=True, evaluate=True)
    result = run_steps(replace(opened, recipes=recipes), steps, local=False, title=", ".join(recipes))
    if result.failed:
        name, why = next(iter(result.failed.items()))
        sys.exit(f"{name}: {why}")


def scores_on_test(location: str, run: str) -> dict[str, float]:
    """Mean similarity of a run by persona, percent."""
    project = open_project(location).project
    table = storage.read_parquet(storage.join(project.run_folder(run), "evaluation", "metrics.parquet"))
    means = table.group_by("persona").aggregate([("similarity", "mean")]).to_pylist()
    return {row["persona"]: 100 * float(row["similarity_mean"]) for row in means}


def mean_of(rows: Sequence[Row]) -> dict[str, float]:
    """By persona, the mean over rows: of one thing with several seeds."""
    return {name: float(np.mean([row.by_persona[name] for row in rows])) for name in rows[0].by_persona}


def paired(one: Mapping[str, float], other: Mapping[str, float], names: Iterable[str] | None = None) -> list[float]:
    """Mean difference over personas that both have, or these, and its 95 % interval by the paired bootstrap."""
    both = sorted(set(one) & set(other) if names is None else names)
    found = against("", *(np.array([row[name] for name in both]) for row in (one, other)))
    return [found.difference, found.low, found.high]


def headline(name: str, beside: Mapping[str, Sequence[float]]) -> str:
    """What the differences from other rows (mean, low, high) come to: better is what has its lower end above 0."""
    behind = {
        other: f"{mean:+.2f}, {low:+.2f} to {high:+.2f}" for other, (mean, low, high) in beside.items() if not low > 0
    }
    if behind:
        return f"not better: {name} does not beat " + ", ".join(f"{other} ({said})" for other, said in behind.items())
    return f"{name} beats each of {', '.join(beside)} by more than its interval"


def _learned(location: str, **searched: Any) -> Learned:
    project = open_project(location).project
    timings, folder = read_timings(project.shared_folder()), project.router_folder()
    return Learned(
        name=LEARNED,
        by_persona=scores_on_test(location, LEARNED),
        folder=folder,
        record=storage.read_json(storage.join(folder, "router.json")),
        seconds=sum(timing.seconds for item, timing in timings.items() if item.startswith("router")),
        **searched,
    )


def _searched(summary: Summary) -> dict[str, Any]:
    return {
        "trials": int(summary.budget["trials"]), "recipe": dict(summary.recipe), "validation": summary.similarity
    }  # fmt: skip


def _keep_search(folder: Path, source: Path | None) -> None:
    """Take the search that a world has along, and no router: the benchmark trains its own."""
    runs = yaml.safe_load((folder / "raymerge.yaml").read_text()).get("output", "runs")
    for name in ("search", "searched") if source is not None else ():
        if (source / runs / name).exists():
            shutil.copytree(source / runs / name, folder / runs / name)
    for path in (folder / runs / "router", folder / runs / LEARNED):
        if path.exists():
            shutil.rmtree(path)
