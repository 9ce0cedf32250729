"""`raymerge compare`: the runs of a project side by side: a table, plots, one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raymerge import storage
from raymerge.config import Project, load_project
from raymerge.errors import EvaluationError
from raymerge.evaluation.comparison import Comparison
from raymerge.evaluation.comparison import compare as compare_scores
from raymerge.evaluation.router_weights import Learned, read_learned
from raymerge.evaluation.scores import LEARNED, Costs, RunScores
from raymerge.evaluation.search_panel import Searched, read_searched
from raymerge.manifest import read_manifest
from raymerge.pipelines.artefacts import Artefact, Artefacts
from raymerge.pipelines.job import Timing, read_timings
from raymerge.pipelines.other_seeds import read_other_seeds
from raymerge.pipelines.planning import TRAINS_ITS_OWN

NOT_RUNS = ("plots",)


@dataclass(frozen=True)
class Compared:
    """A comparison, where its page lies, and the project's search and its learned router, if there are any."""

    comparison: Comparison
    page: str
    searched: Searched | None = None
    learned: Learned | None = None


def compare_runs(location: str, runs: Sequence[str] = ()) -> Compared:
    """Compare a project's evaluated runs, all of them if none is named, and write page, plots and JSON.

    Raises EvaluationError if a named run was not evaluated or none was.
    """
    from raymerge.evaluation.report import render_report

    project = load_project(location)
    output = project.path(project.output)
    names = list(runs) or evaluated_runs(project)
    if not names:
        raise EvaluationError(f"{output}: no run has been evaluated.\n`raymerge run {location}` makes them.")
    for name in names:
        if not _evaluated(project, name):
            raise EvaluationError(
                f"{output}: run {name} has not been evaluated.\n`raymerge evaluate {location} --run {name}` does it."
            )
    artefacts = Artefacts()
    scores = [read_scores(project, name, artefacts) for name in names]
    comparison = compare_scores(
        scores,
        clusters=_clusters(project),
        similarity_model=project.evaluation.similarity_model,
        routing_model=project.embedding.model,
        curves=artefacts.curves(),
        project=storage.name_of(project.location),
        unified_adapter=project.unified_adapter,
        recipes=project.recipes,
    )
    searched = read_searched(project.search_folder())
    learned = read_learned(project.router_folder(), project.run_folder(LEARNED))
    title = storage.name_of(project.workspace)
    for name, data in render_report(comparison, title=title, searched=searched, learned=learned).items():
        storage.write_bytes(storage.join(output, *(["plots"] if name.endswith(".png") else []), name), data)
    return Compared(comparison, storage.join(output, "report.html"), searched, learned)


def compare(location: str, *, runs: Sequence[str] = (), as_json: bool = False) -> int:
    """Compare and print: the table, or the comparison as JSON. Returns the exit status."""
    from raymerge.evaluation.report import encode_comparison

    compared = compare_runs(location, runs)
    if as_json:
        print(encode_comparison(compared.comparison).decode(), end="")
    else:
        show(compared)
    return 0


def show(compared: Compared) -> None:
    """Print a comparison's table and where its page lies."""
    from rich.console import Console

    from raymerge.evaluation.terminal import terminal_table

    console = Console()
    console.print(terminal_table(compared.comparison, console.width, compared.searched, compared.learned))
    console.print(f"Report: {compared.page}", soft_wrap=True, highlight=False)


def evaluated_runs(project: Project) -> list[str]:
    """Names of a project's runs that have test scores."""
    folders = storage.list_folders(project.path(project.output))
    return [name for name in folders if _is_run(name) and _evaluated(project, name)]


def _is_run(name: str) -> bool:
    return not name.startswith((".", "_")) and name not in NOT_RUNS


def _evaluated(project: Project, name: str) -> bool:
    return read_manifest(storage.join(project.run_folder(name), "evaluation")) is not None


def read_scores(project: Project, name: str, artefacts: Artefacts | None = None) -> RunScores:
    """A run as the comparison takes it. artefacts: of adapters that were read before, to which more are added."""
    artefacts = Artefacts() if artefacts is None else artefacts
    folder = project.run_folder(name)
    evaluation = storage.join(folder, "evaluation")
    summary = storage.read_json(storage.join(evaluation, "summary.json"))
    failed = summary["failed"]
    notes = tuple(f"{persona}: {why}" for persona, why in failed.items())
    routing = storage.read_parquet(storage.join(folder, "routing.parquet"))
    recipe = storage.read_json(storage.join(folder, "recipe.json"))
    adapters = _assigned(project, folder)
    served = [artefacts.read(place) for place in adapters.values()]
    parts = list(_parts(project, artefacts, recipe, folder, routing).values())
    by_seed, left_out = read_other_seeds(project, name, recipe, parts, artefacts)
    tuning = storage.join(folder, "tuning", "tuning.json")
    shared = read_timings(project.shared_folder())
    return RunScores(
        name=name,
        recipe=recipe,
        metrics=storage.read_parquet(storage.join(evaluation, "metrics.parquet")),
        generations=storage.read_parquet(storage.join(evaluation, "generations.parquet")),
        routing=routing,
        costs=Costs(
            train_s=_trained(shared, name, recipe["strategy"], parts),
            merge_s=_merged(project, shared, name, adapters),
            evaluate_s=_scored(project, name),
            bytes=_sum([None if one is None else one.bytes for one in served]),
            adapters=len(served),
            steps=_sum([None if one is None else one.steps for one in parts]),
            epochs=_epochs(parts),
        ),
        compression_error=_mean([one.error for one in served if one is not None and one.error is not None]),
        validation_similarity=_similarity(storage.join(folder, "validation", "summary.json")),
        notes=(*notes, *left_out),
        tuned=storage.read_json(tuning) if storage.exists(tuning) else None,
        by_seed=by_seed,
    )


def _parts(
    project: Project, artefacts: Artefacts, recipe: Mapping[str, Any], folder: str, routing: pa.Table
) -> dict[str, Artefact | None]:
    """The trained adapters that a run is made of, by location: those it serves, or the experts that they were merged
    from; of a choice, those of all that it chose from, since they had to be trained to be tried."""
    among = recipe["strategy_parameters"].get("among", {}) if recipe["strategy"] == "selective" else {}
    if among:
        found: dict[str, Artefact | None] = {}
        for name in among:
            place = project.run_folder(name)
            if not storage.exists(storage.join(place, "routing.parquet")):
                return {place: None}  # it was chosen from, and what it took is not known
            inner = storage.read_json(storage.join(place, "recipe.json"))
            table = storage.read_parquet(storage.join(place, "routing.parquet"))
            found.update(_parts(project, artefacts, inner, place, table))
        return found
    served = {place: artefacts.read(place) for place in _assigned(project, folder).values()}
    if served and all(one is not None and one.is_trained for one in served.values()):
        return served
    if recipe["strategy"] in TRAINS_ITS_OWN:
        trained = storage.join(folder, "trained")
        places = [storage.join(trained, name) for name in storage.list_folders(trained)]
    else:
        experts = [expert for expert in routing.column("expert").unique().to_pylist() if expert]
        places = [project.adapter_location(expert) for expert in sorted(experts)]
    return {place: artefacts.read(place) for place in places}


def _similarity(location: str) -> float | None:
    """Mean similarity of a summary, 0 to 100; None where the run was not scored so, or nobody could answer."""
    mean = storage.read_json(location)["mean"]["similarity"] if storage.exists(location) else None
    return 100 * float(mean) if mean is not None else None


def _assigned(project: Project, folder: str) -> dict[str, str]:
    """The adapters of a run, by name: where each lies."""
    table = storage.read_parquet(storage.join(folder, "assignments.parquet"))
    pairs = zip(table.column("adapter").to_pylist(), table.column("location").to_pylist(), strict=True)
    return {name: project.path(place) for name, place in sorted({(n, p) for n, p in pairs if p is not None})}


def _merged(project: Project, shared: Mapping[str, Timing], name: str, adapters: Mapping[str, str]) -> float | None:
    folder = project.run_folder(name)
    written = storage.join(folder, "adapters", "")
    merges = [f"merge/{name}/{a}" for a, place in adapters.items() if place.startswith(written)]
    if not merges and any(item.startswith(f"train/{name}/") for item in shared):
        return 0.0
    return _seconds(read_timings(folder), merges)


def _scored(project: Project, name: str) -> float | None:
    folder = project.run_folder(name)
    parts = storage.list_folders(storage.join(folder, "evaluation", "parts"))
    items = [*(f"evaluate/{name}/{part}" for part in parts), f"gather/{name}/evaluation"]
    return _seconds(read_timings(folder), items)


def _seconds(timings: Mapping[str, Timing], items: Sequence[str]) -> float | None:
    """What items took, as far as all of it is known: a part of the seconds would be taken for the whole."""
    return sum(timings[item].seconds for item in items) if all(item in timings for item in items) else None


def _trained(shared: Mapping[str, Timing], name: str, strategy: str, parts: Sequence[Artefact | None]) -> float | None:
    """Seconds of training the groupings that a run is made of, of trying their epochs too; None if those of one of its
    adapters are not noted."""
    if any(part is None or part.name is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    groupings = {name} if strategy in TRAINS_ITS_OWN else {part.grouping for part in known}
    begin = tuple(f"train/{grouping}" + ("" if grouping == "unified" else "/") for grouping in groupings)
    used = [timing for item, timing in shared.items() if item.startswith(begin)]
    made = {adapter for timing in used for adapter in timing.adapters}
    tried = [t for item, t in shared.items() if item.startswith(tuple(f"try/{grouping}-" for grouping in groupings))]
    return sum(t.seconds for t in [*used, *tried]) if {part.name for part in known} <= made else None


def _epochs(parts: Sequence[Artefact | None]) -> str | None:
    """The epochs of a run's adapters in words, those of each grouping where they differ."""
    found = sorted({(part.epochs or "", part.grouping or "") for part in parts if part is not None and part.epochs})
    if len({epochs for epochs, _ in found}) < 2:
        return found[0][0] if found else None
    return ", ".join(f"{epochs} {grouping}" for epochs, grouping in found)


def _clusters(project: Project) -> dict[str, str]:
    location = storage.join(project.shared_folder(), "clusters", "clusters.json")
    return dict(storage.read_json(location)) if storage.exists(location) else {}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
