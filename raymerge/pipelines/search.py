"""`raymerge search PROJECT`: which recipe is best, found on validation examples on all the cluster's workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from raymerge import storage
from raymerge.config import Search
from raymerge.errors import AdapterError, EvaluationError, ProjectError
from raymerge.manifest import content_digest
from raymerge.pipelines.compare import compare_runs
from raymerge.pipelines.job import carry_out, finish, worker_kinds
from raymerge.pipelines.opening import Opened, base_location, open_project
from raymerge.pipelines.placing import Placed, Placing, check_placing, embeddings_are_there, place
from raymerge.pipelines.planning import embedding_items
from raymerge.pipelines.searching import winner
from raymerge.pipelines.searching.chosen import Chosen, beside_others, choose, score_at_ranks, show, write_results
from raymerge.pipelines.searching.live import Live
from raymerge.pipelines.searching.scorer import RecipeScorer, order_of, subset_sizes
from raymerge.routing.strategies import STRATEGIES
from raymerge.runtime.bases import base_digest
from raymerge.runtime.held import HeldWorkers
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.tune import search_here, search_on_ray
from raymerge.search.space import Space, parse_space
from raymerge.search.study import Study

OF_CLUSTERS = ("scale_offsets", "clusters")  # where a recipe has the offsets that need clusters


@dataclass(frozen=True)
class Sought:
    """A search, ready to run: everything that could be checked was."""

    scorer: RecipeScorer
    study: Study
    kinds: tuple[WorkerKind, ...]

    @property
    def search(self) -> Search:
        """The section of the project file."""
        return self.scorer.opened.project.search


def search(
    location: str, *, settings: Mapping[str, Any] | None = None, restart: bool = False, local: bool = False
) -> int:
    """Search a project's recipe and compare what won. settings: of the project's `search`, given on the command line.
    restart: forget the trials there are; what was scored stays known. Returns the exit status.
    """
    opened = with_settings(open_project(location), settings or {})
    winner.check_names(opened, opened.project.recipes)
    chosen, sought = find(opened, restart=restart, local=local)
    rows, notes = winner.rows_of(opened, chosen.written)
    result = winner.score_on_test(opened, rows, local=local)
    beside = winner.beside(opened, winner.evaluated_runs(opened))
    chosen = beside_others(chosen, winner.test_score(opened), beside, notes)
    write_results(sought.scorer, sought.study, chosen)
    show(chosen, opened.project)
    compare_runs(location)
    return finish(result)


def find(opened: Opened, *, restart: bool, local: bool) -> tuple[Chosen, Sought]:
    """Search, choose, and write what was found, so far without test scores."""
    sought = prepare(opened, restart=restart, local=local)
    run_trials(sought, local=local)
    chosen = choose(sought.scorer, sought.study)
    write_results(sought.scorer, sought.study, chosen)
    with _held(sought, local=local) as held:
        ranks = score_at_ranks(sought.scorer, chosen, held.carry_out)
    chosen = replace(chosen, summary=replace(chosen.summary, ranks=ranks))
    write_results(sought.scorer, sought.study, chosen)
    return chosen, sought


def with_settings(opened: Opened, settings: Mapping[str, Any]) -> Opened:
    """The same with other settings of the search. Raises ProjectError for values that cannot be."""
    if not settings:
        return opened
    try:
        changed = Search(**{**opened.project.search.model_dump(exclude_unset=True), **settings})
    except ValidationError as error:
        [problem, *_] = error.errors()
        where = ".".join(str(part) for part in problem["loc"])
        raise ProjectError(f"--{where} {problem['input']}: {problem['msg']}.") from error
    return replace(opened, project=opened.project.model_copy(update={"search": changed}))


def prepare(opened: Opened, *, restart: bool, local: bool) -> Sought:
    """Check a search, embed the personas if nobody did, and open what is known of its trials.

    Raises ProjectError, PersonaError, AdapterError and RecipeError for what cannot work, before the first trial.
    """
    project, section = opened.project, opened.project.search
    opened.need_base("search")
    names = order_of(opened, section)
    rungs = subset_sizes(section, len(names), project.location)
    expected = space_of(opened, ("cluster_00", "cluster_01"))  # said before anything is embedded and labels are known
    if not {*opened.adapters, *project.experts}:
        raise AdapterError(
            f"{project.path(project.adapters)}: there is no adapter to search recipes of.\n"
            f"`raymerge run {project.location}` trains them."
        )
    placed = placed_for(opened, expected, local=local)
    clusters = sorted(set((placed.clusters or {}).values()))
    space = space_of(opened, clusters)
    folder = project.search_folder()
    scorer = RecipeScorer(opened, placed, space, names, rungs, storage.join(folder, "evaluations"))
    study = Study(space, section, rungs, folder, inputs_digest(opened, placed, names), restart=restart)
    kinds = [kind for kind in worker_kinds(project, base_location(project)) if kind.name == "model"]
    return Sought(scorer, study, tuple(kinds))


def space_of(opened: Opened, clusters: list[str] | tuple[str, ...]) -> Space:
    """The search space of a project. Raises ProjectError."""
    project = opened.project
    personas = opened.need_personas("search")
    counted = {name: len(personas.examples(name, "validation")) for name in personas.names}
    return parse_space(
        project.search, project.recipes, project.location, clusters=clusters, validation=counted,
        centred=project.embedding.centred,
    )  # fmt: skip


def placed_for(opened: Opened, space: Space, *, local: bool) -> Placed:
    """Where everybody is, as far as some strategy of the space asks; embedded now if it was not done before."""
    placing = _placing(opened, space)
    check_placing(opened, placing, refit=False)
    if placing.embeddings and not embeddings_are_there(opened, placing.experts):
        items = embedding_items(opened, placing.experts, {})
        result = carry_out(opened.without_recipes(), items, local=local, title="search: embeddings")
        for name, why in result.failed.items():
            raise EvaluationError(f"{name}: {why}")
    return place(opened, placing, refit=False)


def _placing(opened: Opened, space: Space) -> Placing:
    searched = {parameter.name: parameter for parameter in space.parameters}
    tried = searched["strategy"].choices if "strategy" in searched else (space.base["strategy"],)
    needs = frozenset().union(*(STRATEGIES[str(strategy)].needs for strategy in tried))
    clusters = "clusters" in needs or any(parameter.path[:2] == OF_CLUSTERS for parameter in space.parameters)
    embedded = "embeddings" in needs or (clusters and opened.project.clusters.file is None)
    return Placing(experts=opened.adapters, embeddings=embedded, clusters=clusters)


def inputs_digest(opened: Opened, placed: Placed, names: tuple[str, ...]) -> str:
    """Of all that decides scores beside the recipe: adapters, examples, the base, how answers are made and compared."""
    project, personas = opened.project, opened.need_personas("search")
    experts = {name: project.adapter_location(name) for name in (*opened.adapters, *project.experts)}
    vectors = placed.inputs.embeddings
    return storage.digest_value(
        {
            "experts": {name: content_digest(place) or _size(place) for name, place in experts.items()},
            "examples": {name: [e.content for e in personas.examples(name, "validation")] for name in names},
            "base": base_digest(opened.need_base("search")),
            "generation": project.generation.model_dump(mode="json"),
            "similarity_model": project.evaluation.similarity_model,
            "hardware": [project.hardware.dtype, project.hardware.quantization],
            "embeddings": None if vectors is None else storage.digest_bytes(vectors.vectors.tobytes()),
            "clusters": dict(placed.clusters or {}),
        }
    )


def _size(place: str) -> int | None:
    """Of an adapter that somebody else made: it is read when it is used, and its content compared there."""
    file = storage.join(place, "adapter_model.safetensors")
    return storage.file_info(file).size if storage.exists(file) else None


def run_trials(sought: Sought, *, local: bool) -> None:
    """Carry out trials until the budget is spent."""
    search, study = sought.search, sought.study
    may_go_on = budget(search, study)
    with Live(search, lambda: study.best, finished_before=study.finished) as live:
        if local:
            search_here(study, sought.scorer, sought.kinds, may_go_on=may_go_on, watch=live)
            return
        hardware = sought.scorer.opened.project.hardware
        search_on_ray(
            study, sought.scorer, sought.kinds, concurrency=search.concurrency, may_go_on=may_go_on, watch=live,
            ready_deadline_s=hardware.ready_deadline, max_attempts=hardware.max_attempts,
            autoscaling=hardware.autoscaling,
        )  # fmt: skip


def budget(search: Search, study: Study, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """Whether another trial may begin: minutes of this call, answers of all calls. Trials are counted by the study."""
    started = clock()

    def may_go_on() -> bool:
        answers = sum(figures.answers for trial in study.trials for figures in trial.rungs)
        in_time = search.minutes is None or clock() - started < 60 * search.minutes
        return in_time and (search.evaluations is None or answers < search.evaluations)

    return may_go_on


def _held(sought: Sought, *, local: bool) -> HeldWorkers:
    hardware = sought.scorer.opened.project.hardware
    return HeldWorkers(
        sought.kinds, local=local, ready_deadline_s=hardware.ready_deadline, max_attempts=hardware.max_attempts,
        autoscaling=hardware.autoscaling,
    )  # fmt: skip
