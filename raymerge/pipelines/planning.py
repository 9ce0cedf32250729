"""From a project to items: whom to embed, and which rows to merge.

Items are cut by the plan alone, never by what is missing, so that the bytes of a result do not depend on
interruptions; each item looks for itself whether its result is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge import storage
from raymerge.errors import ProjectError, RecipeError, unknown
from raymerge.merging.scale import parse_scale, scaled
from raymerge.pipelines.opening import Opened, base_location
from raymerge.pipelines.trainings import maker_of
from raymerge.recipes import Recipe
from raymerge.routing.table import MergeGroup, RoutingTable
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import EmbedTask, ExpertRef, MergeTask, SketchTask

PERSONAS_PER_EMBEDDING = 100
ADAPTERS_PER_SKETCH = 50
SKETCH_DIMENSIONS = 4096
FROM_FILE = "a file of vectors"  # a kind of embedding
TRAINS_ITS_OWN = ("neighbours_trained", "prefix")  # recipes that train something for each of their rows


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
            for number, part in enumerate(cut(opened.trainable, PERSONAS_PER_EMBEDDING))
        ]  # fmt: skip
    return [
        Item(
            f"embed/{number:04d}", "merge", "sketch",
            SketchTask(
                storage.join(folder, f"deltas-{number:04d}"),
                tuple((name, opened.project.adapter_location(name)) for name in part), SKETCH_DIMENSIONS, 0,
                base_location(opened.project),
            ),
            after=makers_of([opened.project.adapter_location(name) for name in part], trained),
        )
        for number, part in enumerate(cut(list(experts), ADAPTERS_PER_SKETCH))
    ]  # fmt: skip


def embedding_kind(opened: Opened) -> str:
    """What vectors are made of, in words: those of one kind lie in one space."""
    source = embedding_source(opened)
    if source == "texts":
        return f"texts by {opened.project.embedding.model}"
    return "deltas" if source == "deltas" else FROM_FILE


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


def cut(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Values in portions of a size, in their order."""
    return [values[start : start + size] for start in range(0, len(values), size)]


@dataclass(frozen=True)
class Merges:
    """The merges of a run by adapter name, and what needs none: name -> location. prefixes: whether these are no LoRA
    adapters but prefixes."""

    tasks: Mapping[str, MergeTask]
    as_they_are: Mapping[str, str]
    prefixes: bool = False

    @property
    def locations(self) -> dict[str, str]:
        """Where each adapter of the run lies or will lie."""
        return {**self.as_they_are, **{adapter: task.folder for adapter, task in self.tasks.items()}}


def merges_of(opened: Opened, recipe: Recipe, table: RoutingTable) -> Merges:
    """What becomes of each row of a routing table. Raises RecipeError for offsets of a cluster that there is not."""
    base = base_location(opened.project)
    folder = storage.join(opened.project.run_folder(recipe.name), "adapters")
    tasks: dict[str, MergeTask] = {}
    as_they_are: dict[str, str] = {}
    for group in table.groups():
        if not group.experts:
            continue
        experts = _experts(opened, recipe, group)
        if is_as_it_is(recipe, experts):
            as_they_are[group.adapter] = experts[0].location
            continue
        where = storage.join(folder, group.adapter)
        tasks[group.adapter] = MergeTask(
            group.adapter, where, experts, _merges_in(recipe, group, table), opened.project.workspace, base
        )
    return Merges(tasks, as_they_are, prefixes=recipe.strategy == "prefix")


def _merges_in(recipe: Recipe, group: MergeGroup, table: RoutingTable) -> dict[str, Any]:
    """`Recipe.merges` of a row: what its cluster adds to the scale is in the scale, as if it had been written there."""
    merges = recipe.merges
    offsets = dict(merges.pop("scale_offsets", {}))
    by_cluster = offsets.pop("clusters", None)
    if offsets:
        merges["scale_offsets"] = offsets
    if by_cluster is None:
        return merges
    clusters = table.clusters or {}
    strange = sorted(by_cluster.keys() - set(clusters.values()))
    if strange:
        raise RecipeError(
            f"recipe {recipe.name}: scale_offsets: {unknown('cluster', strange[0], set(clusters.values()))}"
        )
    offset = by_cluster.get(clusters.get(group.personas[0]), 0.0)  # a row is of one cluster, see `Placed.route`
    return {**merges, "scale": scaled(merges["scale"], math.exp(offset))}


def _experts(opened: Opened, recipe: Recipe, group: MergeGroup) -> tuple[ExpertRef, ...]:
    """Whose adapters make a row's: its contributors', or the one that was trained for it."""
    if recipe.strategy in TRAINS_ITS_OWN:
        return (ExpertRef(group.adapter, trained_folder(opened, recipe, group), 1.0),)
    return tuple(
        ExpertRef(name, opened.project.adapter_location(name), weight) for name, weight in sorted(group.experts)
    )


def trained_folder(opened: Opened, recipe: Recipe, group: MergeGroup) -> str:
    """Where the adapter lies that a recipe trains for a row."""
    return storage.join(opened.project.run_folder(recipe.name), "trained", group.adapter)


def is_as_it_is(recipe: Recipe, experts: Sequence[ExpertRef]) -> bool:
    """Whether a row is an adapter as it is: one contributor at weight 1, unscaled, uncompressed."""
    plain = parse_scale(recipe.scale)[0] == 1.0 and recipe.rank in ("keep", "exact") and recipe.dtype is None
    return plain and recipe.scale_offsets is None and len(experts) == 1 and experts[0].weight == 1.0


def merge_items(
    opened: Opened, recipe: Recipe, tasks: Mapping[str, MergeTask], trained: Mapping[str, str]
) -> list[Item]:
    """One item for each merge of a run; it waits for the trainings of its experts and of its anchor alone."""
    anchor = maker_of(opened.project, recipe.anchor, trained)
    return [
        Item(
            f"merge/{recipe.name}/{name}", "merge", "merge", task,
            after=anchor | makers_of([e.location for e in task.experts], trained),
        )
        for name, task in tasks.items()
    ]  # fmt: skip


def makers_of(locations: Iterable[str], trained: Mapping[str, str]) -> frozenset[str]:
    """The items that train the adapters at some locations, as far as any does."""
    return frozenset(trained[place] for place in locations if place in trained)
