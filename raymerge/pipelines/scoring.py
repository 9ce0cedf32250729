"""From a run to items that answer and score it.

Items are cut by the plan alone, never by what is missing, so that the bytes of a result do not depend on interruptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from raymerge import storage
from raymerge.personas import Split
from raymerge.pipelines.opening import Opened, base_location
from raymerge.pipelines.planning import Merges, cut, makers_of
from raymerge.pipelines.trainings import maker_of
from raymerge.recipes import Recipe
from raymerge.routing.table import MergeGroup, RoutingTable
from raymerge.runtime.bases import base_digest
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import AnswerSource, Asking, EvaluateTask, GatherTask, Retrieval


@dataclass(frozen=True)
class Scoring:
    """Which examples of a run are answered and scored, and the folder of the run that the scores go into.

    in_memory: merge on the worker (`rank: exact` as a mixture) instead of reading the adapters of the run folder.
    """

    folder: str
    split: Split
    in_memory: bool = False


@dataclass(frozen=True)
class Answering:
    """What answers for a persona, and the items that make it."""

    source: AnswerSource
    after: frozenset[str]


def evaluation_items(
    opened: Opened,
    recipe: Recipe,
    table: RoutingTable,
    merges: Merges,
    trained: Mapping[str, str],
    scoring: Scoring,
) -> list[Item]:
    """Items that answer and score a run, each waiting for the adapters of its own personas, and one that joins them."""
    folder = storage.join(opened.project.run_folder(recipe.name), scoring.folder)
    step = "validate" if scoring.split == "validation" else "evaluate"
    answering = answering_of(opened, recipe, table, merges, trained, in_memory=scoring.in_memory)
    asking = asking_of(opened, scoring.split, retrieval_of(opened, recipe))
    return scoring_items(
        opened, asking, folder, answering, f"{step}/{recipe.name}", f"gather/{recipe.name}/{scoring.folder}"
    )


def scoring_items(
    opened: Opened, asking: Asking, folder: str, answering: Mapping[str, Answering], step: str, gather: str
) -> list[Item]:
    """Items that answer and score in portions, and one that joins these. step, gather: how their ids begin, or are."""
    without = set(opened.need_personas("evaluation").missing(asking.split))
    scored = [name for name in sorted(answering) if name not in without]
    items = []
    for number, part in enumerate(cut(scored, opened.project.evaluation.personas_per_item)):
        place = storage.join(folder, "parts", f"{number:04d}")
        task = EvaluateTask(place, tuple(answering[name].source for name in part), **vars(asking))
        items.append(Item(f"{step}/{number:04d}", "model", "evaluate", task, after=waits_for(answering, part)))
    joined = GatherTask(folder, tuple(item.payload.folder for item in items))
    return [*items, Item(gather, "merge", "gather", joined, {i.id for i in items})]


def waits_for(answering: Mapping[str, Answering], personas: Sequence[str]) -> frozenset[str]:
    """The items that make what answers for some personas."""
    return frozenset().union(*(answering[name].after for name in personas))


def asking_of(opened: Opened, split: Split, retrieval: Retrieval | None = None, most: int | None = None) -> Asking:
    """How the examples of a split are answered and scored, whoever answers."""
    project = opened.project
    return Asking(
        personas=opened.need_personas("evaluation").source,
        split=split,
        generation=project.generation.model_dump(mode="json"),
        similarity_model=project.evaluation.similarity_model,
        batch_size=project.evaluation.batch_size,
        base_digest=base_digest(opened.need_base("evaluation")),
        retrieval=retrieval,
        most=most,
    )


def retrieval_of(opened: Opened, recipe: Recipe) -> Retrieval | None:
    """What a recipe puts before its prompts, None for plain ones."""
    if recipe.retrieval is None:
        return None
    return Retrieval(recipe.retrieval["examples"], recipe.retrieval["format"], opened.project.embedding.model)


def answering_of(
    opened: Opened,
    recipe: Recipe,
    table: RoutingTable,
    merges: Merges,
    trained: Mapping[str, str],
    *,
    in_memory: bool,
) -> dict[str, Answering]:
    """Persona -> what answers for it."""
    anchor = maker_of(opened.project, recipe.anchor, trained)
    base, workspace = base_location(opened.project), opened.project.workspace
    as_it_is = AnswerSource("", "adapter", base=base, anchor=recipe.anchor, workspace=workspace)
    found = {}
    for group in table.groups():
        task = merges.tasks.get(group.adapter) if group.experts else None
        if task is not None and not in_memory:
            waits = frozenset({f"merge/{recipe.name}/{group.adapter}"})
        elif task is not None:
            waits = anchor | makers_of([e.location for e in task.experts], trained)
        else:
            waits = makers_of([merges.as_they_are.get(group.adapter, "")], trained)
            waits |= anchor if in_memory and group.experts else frozenset()  # what tuning measures them from
        for persona in group.personas:
            source = _source(recipe, replace(as_it_is, persona=persona), group, merges, in_memory)
            found[persona] = Answering(source, waits)
    return found


def _source(recipe: Recipe, as_it_is: AnswerSource, group: MergeGroup, merges: Merges, in_memory: bool) -> AnswerSource:
    """as_it_is: an adapter of the persona that is not merged, where it lies left open."""
    persona = as_it_is.persona
    if not group.experts:
        return AnswerSource(persona, "base")
    if group.adapter in merges.as_they_are:
        place = merges.as_they_are[group.adapter]
        if merges.prefixes:
            return AnswerSource(persona, "prefix", location=place)
        return replace(as_it_is, location=place)
    task = merges.tasks[group.adapter]
    if not in_memory:
        return AnswerSource(persona, "adapter", location=task.folder)
    varies = "layers" in (recipe.scale_offsets or {})  # with the depth, which one weight in a mixture cannot
    mixed = recipe.rank == "exact" and recipe.method == "linear" and recipe.dtype is None and not varies
    return AnswerSource(persona, "mixture" if mixed else "merge", merge=task)
