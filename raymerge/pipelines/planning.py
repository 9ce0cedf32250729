"""From a project to items: which adapters to train, which rows to merge, which answers to score.

Items are cut by the plan alone, never by what is missing, so that the bytes of a result do not depend on
interruptions; each item looks for itself whether its result is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymerge import manifest, storage
from raymerge.config import Grouping
from raymerge.errors import PersonaError, ProjectError
from raymerge.personas import Personas, Split
from raymerge.pipelines.opening import Opened, base_digest
from raymerge.recipes import Recipe
from raymerge.routing.table import MergeGroup, RoutingTable
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import (
    AnswerSource,
    EmbedTask,
    EvaluateTask,
    ExpertRef,
    GatherTask,
    MergeTask,
    SketchTask,
    TrainGroup,
    TrainTask,
)

PERSONAS_PER_EMBEDDING = 100
ADAPTERS_PER_SKETCH = 50
SKETCH_DIMENSIONS = 4096


def training_items(
    opened: Opened, grouping: Grouping, clusters: Mapping[str, str] | None, *, after: frozenset[str] = frozenset()
) -> list[Item]:
    """Items that train one grouping: equal-sized personas side by side, `adapters_per_item` at a time; clusters and
    the unified adapter one per item, the largest first.

    clusters: persona -> label, needed for grouping `cluster`.
    """
    project = opened.project
    personas = opened.need_personas("training")
    settings = project.training.of(grouping)
    groups = _train_groups(opened, personas, grouping, clusters)
    sizes = {g.name: sum(len(personas.examples(p, "train")) for p in g.personas) for g in groups}
    start = settings.start_from if grouping == "persona" else None
    whole = TrainTask(
        groups=(),
        grouping=grouping,
        personas=personas.location,
        training={**settings.model_dump(mode="json"), "start_from": start},
        prompt_format=project.generation.prompt_format,
        base_digest=base_digest(opened.need_base("training")),
        workspace=project.workspace,
    )
    items = []
    for number, portion in enumerate(_portions(groups, sizes, settings.adapters_per_item)):
        label = "unified" if grouping == "unified" else portion[0].name if grouping == "cluster" else f"{number:04d}"
        name = f"train/{label}" if grouping == "unified" else f"train/{grouping}/{label}"
        items.append(Item(name, "model", "train", replace(whole, groups=tuple(portion)), after=after, alone=True))
    return items


def _train_groups(
    opened: Opened, personas: Personas, grouping: Grouping, clusters: Mapping[str, str] | None
) -> list[TrainGroup]:
    project = opened.project
    members: dict[str, list[str]] = {}
    for name in personas.names:
        if grouping == "cluster" and clusters is None:
            raise ProjectError(f"{project.location}: training by cluster needs clusters.")
        label = {"unified": "unified", "persona": name}.get(grouping) or (clusters or {})[name]
        members.setdefault(label, []).append(name)
    return [
        TrainGroup(label, project.adapter_location(label), tuple(members[label]))
        for label in sorted(members)
        if not is_foreign(project.adapter_location(label))
    ]


def is_foreign(location: str) -> bool:
    """Whether an adapter is there that `raymerge train` did not make: it is used as it is and never trained over."""
    if not storage.exists(storage.join(location, "adapter_config.json")):
        return False
    if not storage.exists(storage.join(location, manifest.NAME)):
        return True
    known = manifest.read_manifest(location)
    return known is not None and "grouping" not in known


def _portions(groups: Sequence[TrainGroup], sizes: Mapping[str, int], most: int) -> list[list[TrainGroup]]:
    by_size: dict[int, list[TrainGroup]] = {}
    for group in groups:
        by_size.setdefault(sizes[group.name], []).append(group)
    return [
        same[start : start + most]
        for _, same in sorted(by_size.items(), reverse=True)
        for start in range(0, len(same), most)
    ]


def trained_by(items: Iterable[Item]) -> dict[str, str]:
    """Adapter name -> id of the item that trains it."""
    return {g.name: item.id for item in items if isinstance(item.payload, TrainTask) for g in item.payload.groups}


def embedding_items(opened: Opened, experts: Sequence[str], trained: Mapping[str, str]) -> list[Item]:
    """Items that embed the personas by their texts, or the adapters by their deltas."""
    folder = storage.join(opened.project.shared_folder(), "embeddings")
    if embedding_source(opened) == "texts":
        personas = opened.need_personas("embedding")
        named = [n for n in personas.names if personas.examples(n, "train")]
        model = opened.project.embedding.model
        return [
            Item(
                f"embed/{number:04d}", "model", "embed",
                EmbedTask(storage.join(folder, f"texts-{number:04d}"), personas.location, tuple(part), model),
            )
            for number, part in enumerate(_cut(named, PERSONAS_PER_EMBEDDING))
        ]  # fmt: skip
    return [
        Item(
            f"embed/{number:04d}", "merge", "sketch",
            SketchTask(
                storage.join(folder, f"deltas-{number:04d}"),
                tuple((name, opened.project.adapter_location(name)) for name in part), SKETCH_DIMENSIONS, 0,
            ),
            after=frozenset(trained[name] for name in part if name in trained),
        )
        for number, part in enumerate(_cut(list(experts), ADAPTERS_PER_SKETCH))
    ]  # fmt: skip


def embedding_source(opened: Opened) -> str:
    """`texts` or `deltas`."""
    source = opened.project.embedding.source
    return source if source != "auto" else "texts" if opened.personas is not None else "deltas"


def _cut(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def is_reference(recipe: Recipe, experts: Sequence[tuple[str, float]]) -> bool:
    """Whether a row is an adapter as it is: one contributor at weight 1, unscaled, uncompressed."""
    return (
        len(experts) == 1
        and experts[0][1] == 1.0
        and recipe.scale in (1.0, "match_norm")
        and recipe.rank in ("keep", "exact")
        and recipe.dtype is None
    )


def merge_tasks(opened: Opened, recipe: Recipe, table: RoutingTable) -> tuple[dict[str, MergeTask], dict[str, str]]:
    """The merges of a run by adapter name, and adapters that need none: name -> location."""
    folder = storage.join(opened.project.run_folder(recipe.name), "adapters")
    tasks: dict[str, MergeTask] = {}
    as_they_are: dict[str, str] = {}
    for group in table.groups():
        if not group.experts:
            continue
        if is_reference(recipe, group.experts):
            as_they_are[group.adapter] = opened.project.adapter_location(group.experts[0][0])
            continue
        experts = tuple(
            ExpertRef(name, opened.project.adapter_location(name), weight) for name, weight in sorted(group.experts)
        )
        where = storage.join(folder, group.adapter)
        tasks[group.adapter] = MergeTask(group.adapter, where, experts, recipe.merges, opened.project.workspace)
    return tasks, as_they_are


def merge_items(recipe: Recipe, tasks: Mapping[str, MergeTask], trained: Mapping[str, str]) -> list[Item]:
    """One item for each merge of a run; it waits for the trainings of its experts alone."""
    return [
        Item(
            f"merge/{recipe.name}/{name}", "merge", "merge", task,
            after=frozenset(trained[e.name] for e in task.experts if e.name in trained),
        )
        for name, task in tasks.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class Scoring:
    """Which examples of a run are answered and scored, and the folder of the run that the scores go into.

    in_memory: merge on the worker (`rank: exact` as a mixture) instead of reading the adapters of the run folder.
    """

    folder: str
    split: Split
    in_memory: bool = False


def evaluation_items(
    opened: Opened, recipe: Recipe, table: RoutingTable, trained: Mapping[str, str], scoring: Scoring
) -> list[Item]:
    """Items that answer and score a run, each waiting for the adapters of its own personas, and one that joins them."""
    project = opened.project
    personas = opened.need_personas("evaluation")
    scored = [name for name in table.personas if personas.examples(name, scoring.split)]
    if not scored:
        raise PersonaError(f"{personas.location}: nobody has examples of split {scoring.split}, so nothing is scored.")
    folder = storage.join(project.run_folder(recipe.name), scoring.folder)
    whole = EvaluateTask(
        folder=folder,
        sources=(),
        personas=personas.location,
        split=scoring.split,
        generation=project.generation.model_dump(mode="json"),
        similarity_model=project.evaluation.similarity_model,
        batch_size=project.evaluation.batch_size,
        base_digest=base_digest(opened.need_base("evaluation")),
    )
    sources = _sources(opened, recipe, table, trained, scoring)
    items = []
    for number, part in enumerate(_cut(scored, project.evaluation.personas_per_item)):
        place = storage.join(folder, "parts", f"{number:04d}")
        task = replace(whole, folder=place, sources=tuple(sources[name][0] for name in part))
        waits = frozenset().union(*(sources[name][1] for name in part))
        step = "validate" if scoring.folder == "validation" else "evaluate"
        items.append(Item(f"{step}/{recipe.name}/{number:04d}", "model", "evaluate", task, after=waits))
    gather = GatherTask(folder, tuple(item.payload.folder for item in items))
    return [*items, Item(f"gather/{recipe.name}/{scoring.folder}", "merge", "gather", gather, {i.id for i in items})]


def _sources(
    opened: Opened, recipe: Recipe, table: RoutingTable, trained: Mapping[str, str], scoring: Scoring
) -> dict[str, tuple[AnswerSource, frozenset[str]]]:
    """Persona -> what answers for it, and the items that make that."""
    tasks, as_they_are = merge_tasks(opened, recipe, table)
    found = {}
    for group in table.groups():
        waits = frozenset(trained[name] for name, _ in group.experts if name in trained)
        if group.adapter in tasks and not scoring.in_memory:
            waits = frozenset({f"merge/{recipe.name}/{group.adapter}"})
        for persona in group.personas:
            source = _source(recipe, persona, group, tasks, as_they_are, scoring.in_memory)
            found[persona] = (source, waits)
    return found


def _source(
    recipe: Recipe, persona: str, group: MergeGroup, tasks: Mapping[str, MergeTask], as_they_are: Mapping[str, str],
    in_memory: bool,
) -> AnswerSource:  # fmt: skip
    if not group.experts:
        return AnswerSource(persona, "base")
    if group.adapter in as_they_are:
        return AnswerSource(persona, "adapter", location=as_they_are[group.adapter])
    task = tasks[group.adapter]
    if not in_memory:
        return AnswerSource(persona, "adapter", location=task.folder)
    mixed = recipe.rank == "exact" and recipe.method == "linear" and recipe.dtype is None
    return AnswerSource(persona, "mixture" if mixed else "merge", merge=task)
