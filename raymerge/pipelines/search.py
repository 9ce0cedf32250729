"""`raymerge search PROJECT`: which recipe is best, found on validation examples on all the cluster's workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import ValidationError

from raymerge import storage
from raymerge.adapters.formats import adapter_digest, format_of
from raymerge.config import Search
from raymerge.errors import AdapterError, EvaluationError, ProjectError, RankError, unknown
from raymerge.evaluation.scores import LEARNED
from raymerge.manifest import content_digest
from raymerge.merging.rank import parse_rank
from raymerge.pipelines.compare import compare_runs, evaluated_runs
from raymerge.pipelines.job import JobResult, carry_out, finish, pool_options, worker_kinds
from raymerge.pipelines.learned import check_router, place_of, router_digest
from raymerge.pipelines.opening import Opened, base_location, open_project
from raymerge.pipelines.placing import Placed, Placing, check_placing, embeddings_are_there, place
from raymerge.pipelines.planning import embedding_items
from raymerge.pipelines.searching import winner
from raymerge.pipelines.searching.aim import Aim, aim_of
from raymerge.pipelines.searching.chosen import Chosen, beside_others, choose, score_at_ranks, show, write_results
from raymerge.pipelines.searching.live import Live
from raymerge.pipelines.searching.scorer import RecipeScorer, order_of, subset_sizes
from raymerge.routing.named import experts_in
from raymerge.routing.strategies import STRATEGIES
from raymerge.runtime.bases import base_digest
from raymerge.runtime.broker import CarryOut
from raymerge.runtime.connection import connected
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.tune import Then, search_here, search_on_ray
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
        """Its settings."""
        return self.scorer.aim.section


def search(
    location: str, *, settings: Mapping[str, Any] | None = None, restart: bool = False, local: bool = False
) -> int:
    """Search a project's recipe and compare what won. settings: of the project's `search`, given on the command line.
    restart: forget the trials there are; what was scored stays known. Returns the exit status.
    """
    opened = with_settings(open_project(location), settings or {})
    aim = aim_of(opened.project)
    winner.check_names(opened, aim)
    with nullcontext() if local else connected():  # once for all that follows
        chosen, result = pursue(opened, aim, restart=restart, local=local)
    show(chosen, aim)
    if evaluated_runs(opened.project):
        print(f"Report: {compare_runs(location).page}", flush=True)
    return finish(result)


def pursue(opened: Opened, aim: Aim, *, restart: bool, local: bool) -> tuple[Chosen, JobResult]:
    """Search, score the winner and its controls on test examples, and write what was found."""
    sought = prepare(opened, aim, restart=restart, local=local)
    chosen = find(sought, local=local)
    rows, notes = winner.rows_of(opened, aim, chosen.written)
    result = winner.score_on_test(opened, aim, rows, local=local)
    beside = winner.beside(opened, aim, evaluated_runs(opened.project))
    chosen = beside_others(chosen, aim, winner.score_on_test_examples(opened, aim), beside, notes)
    write_results(sought.scorer, sought.study, chosen)
    return chosen, result


def find(sought: Sought, *, local: bool) -> Chosen:
    """Search, choose, and write what was found, so far without test scores."""
    found: list[Chosen] = []

    def conclude(carry_out: CarryOut) -> None:
        chosen = choose(sought.scorer, sought.study)
        write_results(sought.scorer, sought.study, chosen)
        found.append(score_at_ranks(sought.scorer, chosen, carry_out))
        write_results(sought.scorer, sought.study, found[0])

    run_trials(sought, conclude, local=local)
    return found[0]


def with_settings(
    opened: Opened, settings: Mapping[str, Any], section: Literal["search", "router"] = "search"
) -> Opened:
    """The same with other settings of a section. Raises ProjectError for values that cannot be."""
    if not settings:
        return opened
    try:
        written = getattr(opened.project, section)
        changed = type(written)(**{**written.model_dump(exclude_unset=True), **settings})
    except ValidationError as error:
        [problem, *_] = error.errors()
        where = ".".join(str(part) for part in problem["loc"]).replace("_", "-")
        raise ProjectError(f"--{where} {problem['input']}: {problem['msg']}.") from error
    return replace(opened, project=opened.project.model_copy(update={section: changed}))


def prepare(opened: Opened, aim: Aim | None = None, *, restart: bool, local: bool) -> Sought:
    """Check a search, embed the personas if nobody did, and open what is known of its trials. aim: by default that of
    the project file.

    Raises ProjectError, PersonaError, AdapterError and RecipeError for what cannot work, before the first trial.
    """
    project = opened.project
    aim = aim or aim_of(project)
    section = aim.section
    opened.need_base(aim.title)
    check_ranks(section.ranks, f"{project.location}: search.ranks")
    names = order_of(opened, section, aim.left_out)
    rungs = subset_sizes(section, len(names), project.location)
    expected = space_of(opened, aim, ("cluster_00", "cluster_01"))  # before anything is embedded and labels are known
    if not {*opened.adapters, *project.experts}:
        raise AdapterError(
            f"{project.path(project.adapters)}: there is no adapter to search recipes of.\n"
            f"`raymerge run {project.location}` trains them."
        )
    check_router(project, router_asked(opened, expected), f"{project.location}: search")
    placing = placing_of(opened, expected)
    placed = placed_for(opened, placing, title=aim.title, local=local)
    clusters = sorted(set((placed.clusters or {}).values()))
    space = space_of(opened, aim, clusters)
    check_adapters(opened, space, clusters)
    scorer = RecipeScorer(opened, aim, placed, space, names, rungs, storage.join(aim.folder, "evaluations"))
    inputs = inputs_digest(opened, placed, names, space)
    study = Study(space, section, rungs, aim.folder, inputs, restart=restart, replaces=aim.replaces, first=aim.first)
    kinds = [kind for kind in worker_kinds(project, base_location(project)) if kind.name == "model"]
    return Sought(scorer, study, tuple(kinds))


def space_of(opened: Opened, aim: Aim, clusters: list[str] | tuple[str, ...]) -> Space:
    """The space of a search. Raises ProjectError."""
    project = opened.project
    personas = opened.need_personas(aim.title)
    counted = {name: len(personas.examples(name, "validation")) for name in personas.names}
    return parse_space(
        aim.section, project.recipes, project.location, clusters=clusters, validation=counted,
        centred=project.embedding.centred,
    )  # fmt: skip


def placed_for(opened: Opened, placing: Placing, *, title: str, local: bool) -> Placed:
    """Where everybody is, as far as it is asked for; embedded now if it was not done before."""
    check_placing(opened, placing, refit=False)
    if placing.embeddings and not embeddings_are_there(opened, placing.experts):
        items = embedding_items(opened, placing.experts, {})
        result = carry_out(opened.without_recipes(), items, local=local, title=f"{title}: embeddings")
        for name, why in result.failed.items():
            raise EvaluationError(f"{name}: {why}")
    return place(opened, placing, refit=False)


def placing_of(opened: Opened, space: Space) -> Placing:
    """What some strategy of a space asks to know of the personas."""
    needs = needs_of_space(space)
    clusters = "clusters" in needs or any(parameter.path[:2] == OF_CLUSTERS for parameter in space.parameters)
    embedded = "embeddings" in needs or (clusters and opened.project.clusters.file is None)
    return Placing(experts=opened.adapters, embeddings=embedded, clusters=clusters)


def needs_of_space(space: Space) -> frozenset[str]:
    """What the strategies of a space need, see `routing.strategies.Strategy`."""
    return frozenset().union(*(STRATEGIES[name].needs for name in strategies_of(space)))


def strategies_of(space: Space) -> list[str]:
    """The strategies that a search tries; that of its recipe only where it may be tried."""
    searched = next((one for one in space.parameters if one.name == "strategy"), None)
    return list(searched.choices) if searched and not searched.when else space.tried("strategy")


def check_adapters(opened: Opened, space: Space, clusters: Sequence[str]) -> None:
    """Raise what trials would fail by: an adapter that is not there. A search trains nothing.

    ProjectError for weights of an unknown expert, AdapterError for the unified adapter, a cluster's or a further
    expert's that is missing.
    """
    project, needs = opened.project, needs_of_space(space)
    weighted = {one.path[-1] for one in space.parameters if one.path[0] == "weights"}
    weighted |= {*experts_in(space.base.get("weights") or {})}
    known = {*project.experts, *opened.adapters, "unified", *clusters}
    for name in sorted(weighted - known):
        raise ProjectError(f"{project.location}: search: weights: {unknown('expert', name, known)}")
    asked = {*(weighted - {*opened.adapters}), *(["unified"] if "unified" in needs else ())}
    for name in sorted(asked | ({*clusters} if "cluster_adapters" in needs else set())):
        format_of(project.adapter_location(name), name)


def router_asked(opened: Opened, space: Space) -> str | None:
    """Where the router lies that a search asks; None if it tries no strategy that does."""
    return place_of(opened.project, space.base.get("router")) if LEARNED in strategies_of(space) else None


def check_ranks(ranks: Iterable[Any], where: str) -> None:
    """Raise ProjectError for what is no rank. where: it is written."""
    for rank in ranks:
        try:
            parse_rank(rank)
        except RankError as error:
            raise ProjectError(f"{where}: {error}") from error


def inputs_digest(opened: Opened, placed: Placed, names: tuple[str, ...], space: Space) -> str:
    """Of all that decides scores beside the recipe: adapters, examples, the base, how answers are made and compared."""
    project, personas = opened.project, opened.need_personas("search")
    trained = [n for n in ("unified", *set((placed.clusters or {}).values())) if _is_there(project.adapter_location(n))]
    experts = {name: project.adapter_location(name) for name in (*opened.adapters, *project.experts, *trained)}
    vectors = placed.inputs.embeddings
    return storage.digest_value(
        {
            "experts": {name: _content(place, name) for name, place in experts.items()},
            "examples": {name: [e.content for e in personas.examples(name, "validation")] for name in names},
            "base": base_digest(opened.need_base("search")),
            "generation": project.generation.model_dump(mode="json"),
            "similarity_model": project.evaluation.similarity_model,
            "hardware": [project.hardware.dtype, project.hardware.quantization],
            "embeddings": None if vectors is None else storage.digest_bytes(vectors.vectors.tobytes()),
            "clusters": dict(placed.clusters or {}),
            **({"router": router_digest(asked)} if (asked := router_asked(opened, space)) else {}),
        }
    )


def _is_there(place: str) -> bool:
    try:
        format_of(place)
    except AdapterError:
        return False
    return True


def _content(place: str, name: str) -> str:
    """Of an adapter, by its files; at a URI by its marker, where it has one, rather than reading all of them here."""
    return (content_digest(place) if storage.is_uri(place) else None) or adapter_digest(place, name)


def run_trials(sought: Sought, then: Then, *, local: bool) -> None:
    """Carry out trials until the budget is spent. then: comes after the last, with the workers that were held."""
    search, study = sought.search, sought.study
    may_go_on = budget(search, study)
    total = search.trials if search.sampler != "grid" else min(search.trials, len(sought.scorer.space.grid()))
    title, told = sought.scorer.aim.title, sought.scorer.space.told
    with Live(search, lambda: study.best, title=title, total=total, finished_before=study.finished, told=told) as live:

        def conclude(carry_out: CarryOut) -> None:
            if search.ranks:
                live.say(f"{study.finished} trials; the winner is scored at rank {', '.join(map(str, search.ranks))}")
            then(carry_out)

        if local:
            search_here(study, sought.scorer, sought.kinds, may_go_on=may_go_on, watch=live, then=conclude)
            return
        search_on_ray(
            study, sought.scorer, sought.kinds, concurrency=search.concurrency, may_go_on=may_go_on, watch=live,
            then=conclude, **pool_options(sought.scorer.opened.project),
        )  # fmt: skip


def budget(search: Search, study: Study, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """Whether another trial may begin: minutes of this call, answers of all calls. Trials are counted by the study."""
    started = clock()

    def may_go_on() -> bool:
        answers = sum(figures.answers for trial in study.trials for figures in trial.rungs)
        in_time = search.minutes is None or clock() - started < 60 * search.minutes
        return in_time and (search.evaluations is None or answers < search.evaluations)

    return may_go_on
