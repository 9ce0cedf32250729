"""From a project to items: whom to embed, which rows to merge, which answers to score.

Items are cut by the plan alone, never by what is missing, so that the bytes of a result do not depend on
interruptions; each item looks for itself whether its result is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymerge import storage
from raymerge.errors import ProjectError, unknown
from raymerge.personas import Split
from raymerge.pipelines.opening import Opened, base_location
from raymerge.pipelines.trainings import maker_of
from raymerge.recipes import Recipe
from raymerge.routing.table import MergeGroup, RoutingTable
from raymerge.runtime.bases import base_digest
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import (
    AnswerSource,
    EmbedTask,
    EvaluateTask,
    ExpertRef,
    GatherTask,
    MergeTask,
    SketchTask,
)

PERSONAS_PER_EMBEDDING = 100
ADAPTERS_PER_SKETCH = 50
SKETCH_DIMENSIONS = 4096


def embedding_items(opened: Opened, experts: Sequence[str], trained: Mapping[str, str]) -> list[Item]:
    """Items that embed the personas by their texts, or the adapters by their deltas; none where a file has vectors."""
    folder = storage.join(opened.project.shared_folder(), "embeddings")
    source = embedding_source(opened)
    if source not in ("texts", "deltas"):
        return []
    if source == "texts":
        personas = opened.need_personas("embedding")
        model = opened.project.embedding.model
        return [
            Item(
                f"embed/{number:04d}", "model", "embed",
                EmbedTask(storage.join(folder, f"texts-{number:04d}"), personas.source, tuple(part), model),
            )
            for number, part in enumerate(_cut(opened.trainable, PERSONAS_PER_EMBEDDING))
        ]  # fmt: skip
    return [
        Item(
            f"embed/{number:04d}", "merge", "sketch",
            SketchTask(
                storage.join(folder, f"deltas-{number:04d}"),
                tuple((name, opened.project.adapter_location(name)) for name in part), SKETCH_DIMENSIONS, 0,
                base_location(opened.project),
            ),
            after=frozenset(trained[name] for name in part if name in trained),
        )
        for number, part in enumerate(_cut(list(experts), ADAPTERS_PER_SKETCH))
    ]  # fmt: skip


def embedding_source(opened: Opened) -> str:
    """`texts`, `deltas`, or the location of a parquet file of vectors. Raises ProjectError for anything else."""
    source = opened.project.embedding.source
    if source == "auto":
        return "texts" if opened.personas is not None else "deltas"
    if source.endswith(".parquet"):
        return opened.project.path(source)
    if source not in ("texts", "deltas"):
        allowed = ("auto", "texts", "deltas", "FILE.parquet")
        raise ProjectError(f"{opened.project.location}: {unknown('embedding.source', source, allowed)}")
    return source


def _cut(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def is_reference(recipe: Recipe, group: MergeGroup) -> bool:
    """Whether a row is an adapter as it is: one contributor at weight 1, unscaled, uncompressed."""
    plain = recipe.scale in (1.0, "match_norm") and recipe.rank in ("keep", "exact") and recipe.dtype is None
    return group.single is not None and plain


@dataclass(frozen=True)
class Merges:
    """The merges of a run by adapter name, and adapters that need none: name -> location."""

    tasks: Mapping[str, MergeTask]
    as_they_are: Mapping[str, str]

    @property
    def locations(self) -> dict[str, str]:
        """Where each adapter of the run lies or will lie."""
        return {**self.as_they_are, **{adapter: task.folder for adapter, task in self.tasks.items()}}


def merges_of(opened: Opened, recipe: Recipe, table: RoutingTable) -> Merges:
    """What becomes of each row of a routing table."""
    base = base_location(opened.project)
    folder = storage.join(opened.project.run_folder(recipe.name), "adapters")
    tasks: dict[str, MergeTask] = {}
    as_they_are: dict[str, str] = {}
    for group in table.groups():
        if not group.experts:
            continue
        if is_reference(recipe, group):
            as_they_are[group.adapter] = opened.project.adapter_location(group.experts[0][0])
            continue
        experts = tuple(
            ExpertRef(name, opened.project.adapter_location(name), weight) for name, weight in sorted(group.experts)
        )
        where = storage.join(folder, group.adapter)
        tasks[group.adapter] = MergeTask(group.adapter, where, experts, recipe.merges, opened.project.workspace, base)
    return Merges(tasks, as_they_are)


def merge_items(
    opened: Opened, recipe: Recipe, tasks: Mapping[str, MergeTask], trained: Mapping[str, str]
) -> list[Item]:
    """One item for each merge of a run; it waits for the trainings of its experts and of its anchor alone."""
    anchor = maker_of(opened.project, recipe.anchor, trained)
    return [
        Item(
            f"merge/{recipe.name}/{name}", "merge", "merge", task,
            after=anchor | {trained[e.name] for e in task.experts if e.name in trained},
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
    opened: Opened,
    recipe: Recipe,
    table: RoutingTable,
    merges: Merges,
    trained: Mapping[str, str],
    scoring: Scoring,
) -> list[Item]:
    """Items that answer and score a run, each waiting for the adapters of its own personas, and one that joins them."""
    project = opened.project
    personas = opened.need_personas("evaluation")
    without = set(personas.missing(scoring.split))
    scored = [name for name in table.personas if name not in without]
    folder = storage.join(project.run_folder(recipe.name), scoring.folder)
    whole = EvaluateTask(
        folder=folder,
        sources=(),
        personas=personas.source,
        split=scoring.split,
        generation=project.generation.model_dump(mode="json"),
        similarity_model=project.evaluation.similarity_model,
        batch_size=project.evaluation.batch_size,
        base_digest=base_digest(opened.need_base("evaluation")),
    )
    sources = _sources(opened, recipe, table, merges, trained, scoring)
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
    opened: Opened,
    recipe: Recipe,
    table: RoutingTable,
    merges: Merges,
    trained: Mapping[str, str],
    scoring: Scoring,
) -> dict[str, tuple[AnswerSource, frozenset[str]]]:
    """Persona -> what answers for it, and the items that make that."""
    base = base_location(opened.project)
    anchor = maker_of(opened.project, recipe.anchor, trained)
    found = {}
    for group in table.groups():
        waits = anchor | {trained[name] for name, _ in group.experts if name in trained}
        if group.adapter in merges.tasks and not scoring.in_memory:
            waits = frozenset({f"merge/{recipe.name}/{group.adapter}"})
        for persona in group.personas:
            source = _source(recipe, persona, group, merges, scoring.in_memory, base)
            found[persona] = (source, waits)
    return found


def _source(
    recipe: Recipe, persona: str, group: MergeGroup, merges: Merges, in_memory: bool, base: str | None
) -> AnswerSource:
    if not group.experts:
        return AnswerSource(persona, "base")
    if group.adapter in merges.as_they_are:
        return AnswerSource(persona, "adapter", location=merges.as_they_are[group.adapter], base=base)
    task = merges.tasks[group.adapter]
    if not in_memory:
        return AnswerSource(persona, "adapter", location=task.folder)
    mixed = recipe.rank == "exact" and recipe.method == "linear" and recipe.dtype is None
    return AnswerSource(persona, "mixture" if mixed else "merge", merge=task)
