"""`raymerge compare`: the runs of a project side by side: a table, plots, one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raymerge import storage
from raymerge.config import Project, load_project
from raymerge.errors import EvaluationError
from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.comparison import compare as compare_scores
from raymerge.evaluation.scores import Costs, RunScores
from raymerge.manifest import read_manifest
from raymerge.pipelines.job import read_timings

NOT_RUNS = ("_shared", "plots")


@dataclass(frozen=True)
class Compared:
    """A comparison and where its page lies."""

    comparison: Comparison
    page: str


def compare_runs(location: str, runs: Sequence[str] = ()) -> Compared:
    """Compare a project's evaluated runs, all of them if none is named, and write page, plots and JSON.

    Raises EvaluationError if a named run was not evaluated or none was.
    """
    from raymerge.evaluation.report import render_report

    project = load_project(location)
    output = project.path(project.output)
    names = list(runs) or [n for n in storage.list_folders(output) if n not in NOT_RUNS and _evaluated(project, n)]
    if not names:
        raise EvaluationError(f"{output}: no run has been evaluated.\n`raymerge run {location}` makes them.")
    for name in names:
        if not _evaluated(project, name):
            raise EvaluationError(
                f"{output}: run {name} has not been evaluated.\n`raymerge evaluate {location} --run {name}` does it."
            )
    scores = [read_scores(project, name) for name in names]
    comparison = compare_scores(
        scores,
        clusters=_clusters(project),
        similarity_model=project.evaluation.similarity_model,
        routing_model=project.embedding.model,
    )
    for name, data in render_report(comparison, title=storage.name_of(project.workspace)).items():
        storage.write_bytes(storage.join(output, *(["plots"] if name.endswith(".png") else []), name), data)
    return Compared(comparison, storage.join(output, "report.html"))


def compare(location: str, *, runs: Sequence[str] = (), as_json: bool = False) -> int:
    """Compare and print: the table, or the comparison as JSON. Returns the exit status."""
    compared = compare_runs(location, runs)
    if as_json:
        print(storage.encode_json(compared.comparison.to_json()).decode(), end="")
    else:
        show(compared)
    return 0


def show(compared: Compared) -> None:
    """Print a comparison's table and where its page lies."""
    from rich.console import Console

    from raymerge.evaluation.terminal import terminal_table

    console = Console()
    console.print(terminal_table(compared.comparison))
    console.print(f"Report: {compared.page}", soft_wrap=True, highlight=False)


def _evaluated(project: Project, name: str) -> bool:
    return read_manifest(storage.join(project.run_folder(name), "evaluation")) is not None


def read_scores(project: Project, name: str) -> RunScores:
    """A run as the comparison takes it."""
    folder = project.run_folder(name)
    evaluation = storage.join(folder, "evaluation")
    summary = storage.read_json(storage.join(evaluation, "summary.json"))
    failed = summary["failed"]
    notes = tuple(f"{persona}: {why}" for persona, why in failed.items())
    manifests = [read_manifest(where) for where in _adapter_folders(project, folder)]
    merged = [m for m in manifests if m is not None and "experts" in m]
    return RunScores(
        name=name,
        recipe=storage.read_json(storage.join(folder, "recipe.json")),
        metrics=storage.read_parquet(storage.join(evaluation, "metrics.parquet")),
        generations=storage.read_parquet(storage.join(evaluation, "generations.parquet")),
        routing=storage.read_parquet(storage.join(folder, "routing.parquet")),
        costs=_costs(project, folder, manifests),
        compression_error=_mean([float(m["error"]) for m in merged]),
        validation_similarity=_validated(folder),
        notes=notes,
    )


def _validated(folder: str) -> float | None:
    """Mean similarity on validation examples, 0 to 100, where the run was scored on them."""
    location = storage.join(folder, "validation", "summary.json")
    return 100 * float(storage.read_json(location)["mean"]["similarity"]) if storage.exists(location) else None


def _adapter_folders(project: Project, folder: str) -> list[str]:
    assigned = storage.read_parquet(storage.join(folder, "assignments.parquet")).column("location").to_pylist()
    return [project.path(place) for place in sorted({p for p in assigned if p is not None})]


def _costs(project: Project, folder: str, manifests: Sequence[Any]) -> Costs:
    own = read_timings(folder)
    training = {k: v for k, v in read_timings(project.shared_folder()).items() if k.startswith("train/")}
    groupings = _groupings(folder)
    used = sum(s for item, s in training.items() if any(item.startswith(f"train/{g}") for g in groupings))
    known = [m for m in manifests if m is not None]
    return Costs(
        train_s=used if training and groupings else 0.0 if not groupings else None,
        merge_s=sum(s for item, s in own.items() if item.startswith("merge/")),
        evaluate_s=sum(s for item, s in own.items() if item.startswith(("evaluate/", "gather/"))),
        bytes=sum(entry["bytes"] for m in known for entry in m["files"].values()) if known else 0,
        adapters=len(manifests),
    )


def _groupings(folder: str) -> set[str]:
    experts = storage.read_parquet(storage.join(folder, "routing.parquet")).column("expert").unique().to_pylist()
    return {"unified" if e == "unified" else "cluster" if e.startswith("cluster_") else "persona" for e in experts if e}


def _clusters(project: Project) -> dict[str, str]:
    location = storage.join(project.shared_folder(), "clusters", "clusters.json")
    return dict(storage.read_json(location)) if storage.exists(location) else {}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
