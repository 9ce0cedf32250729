"""`raymerge compare`: the runs of a project side by side: a table, plots, one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge import storage
from raymerge.config import Project, load_project
from raymerge.errors import EvaluationError
from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.comparison import compare as compare_scores
from raymerge.evaluation.scores import Costs, RunScores
from raymerge.manifest import read_manifest
from raymerge.pipelines.job import Timing, read_timings

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
    adapters = _assigned(project, folder)
    manifests = [read_manifest(where) for where in adapters.values()]
    merged = [m for m in manifests if m is not None and "experts" in m]
    return RunScores(
        name=name,
        recipe=storage.read_json(storage.join(folder, "recipe.json")),
        metrics=storage.read_parquet(storage.join(evaluation, "metrics.parquet")),
        generations=storage.read_parquet(storage.join(evaluation, "generations.parquet")),
        routing=storage.read_parquet(storage.join(folder, "routing.parquet")),
        costs=_costs(project, name, adapters, manifests),
        compression_error=_mean([float(m["error"]) for m in merged]),
        validation_similarity=_validated(folder),
        notes=notes,
    )


def _validated(folder: str) -> float | None:
    """Mean similarity on validation examples, 0 to 100, where the run was scored on them."""
    location = storage.join(folder, "validation", "summary.json")
    mean = storage.read_json(location)["mean"]["similarity"] if storage.exists(location) else None
    return 100 * float(mean) if mean is not None else None  # none where nobody could answer


def _assigned(project: Project, folder: str) -> dict[str, str]:
    """The adapters of a run, by name: where each lies."""
    table = storage.read_parquet(storage.join(folder, "assignments.parquet"))
    pairs = zip(table.column("adapter").to_pylist(), table.column("location").to_pylist(), strict=True)
    return {name: project.path(place) for name, place in sorted({(n, p) for n, p in pairs if p is not None})}


def _costs(project: Project, name: str, adapters: Mapping[str, str], manifests: Sequence[Any]) -> Costs:
    """What a run took, as far as all of it is known: a part of the seconds would be taken for the whole."""
    folder = project.run_folder(name)
    own = read_timings(folder)
    merges = [f"merge/{name}/{a}" for a, place in adapters.items() if place.startswith(storage.join(folder, ""))]
    parts = storage.list_folders(storage.join(folder, "evaluation", "parts"))
    known = [m for m in manifests if m is not None]
    return Costs(
        train_s=_trained(project, folder),
        merge_s=_sum(own, merges),
        evaluate_s=_sum(own, [*(f"evaluate/{name}/{part}" for part in parts), f"gather/{name}/evaluation"]),
        bytes=_bytes(known) if len(known) == len(manifests) else None,
        adapters=len(manifests),
    )


def _sum(timings: Mapping[str, Timing], items: Sequence[str]) -> float | None:
    return sum(timings[item].seconds for item in items) if all(item in timings for item in items) else None


def _bytes(manifests: Sequence[Any]) -> int:
    return sum(entry["bytes"] for m in manifests for entry in m["files"].values())


def _trained(project: Project, folder: str) -> float | None:
    """Seconds of training the groupings a run's experts belong to; None if an expert's own are not noted."""
    table = storage.read_parquet(storage.join(folder, "routing.parquet"))
    experts = {expert for expert in table.column("expert").unique().to_pylist() if expert}
    groupings = {"unified" if e == "unified" else "cluster" if e.startswith("cluster_") else "persona" for e in experts}
    shared = read_timings(project.shared_folder())
    used = [t for item, t in shared.items() if any(item.startswith(f"train/{g}") for g in groupings)]
    made = {name for timing in used for name in timing.adapters}
    return sum(timing.seconds for timing in used) if experts <= made else None


def _clusters(project: Project) -> dict[str, str]:
    location = storage.join(project.shared_folder(), "clusters", "clusters.json")
    return dict(storage.read_json(location)) if storage.exists(location) else {}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
