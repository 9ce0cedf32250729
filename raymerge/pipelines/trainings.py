"""Trainings: which groupings a job needs, what each begins from, and the items that carry them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from raymerge import manifest, storage
from raymerge.adapters.catalogue import Catalogue
from raymerge.config import GROUPINGS, Grouping, Project
from raymerge.errors import AdapterError, PersonaError, ProjectError
from raymerge.pipelines.opening import Opened
from raymerge.runtime.bases import base_digest
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import TrainGroup, TrainTask


def all_groupings(opened: Opened) -> tuple[Grouping, ...]:
    """The groupings whose adapters the recipes ask for, as far as there are examples to train them on."""
    if opened.personas is None:
        return ()
    recipes = opened.recipes.values()
    needs: frozenset[str] = frozenset().union(*(recipe.needs for recipe in recipes))
    wanted = {"persona": "own" in needs, "cluster": "cluster_adapters" in needs, "unified": "unified" in needs}
    starts = [start_of(opened, grouping) for grouping in GROUPINGS if wanted[grouping]]
    if any(is_unified(opened.project, place) for place in [*starts, *(recipe.anchor for recipe in recipes)]):
        wanted["unified"] = True
    return tuple(grouping for grouping in GROUPINGS if wanted[grouping])


def is_unified(project: Project, place: str | None) -> bool:
    """Whether a location of the project file is the unified adapter's."""
    return place is not None and project.path(place) == project.adapter_location("unified")


def start_of(opened: Opened, grouping: Grouping) -> str | None:
    """What a grouping's training begins from: `start_from`, or else what its adapters that are there began from.

    The unified adapter does not begin from itself. Raises ProjectError if adapters that are there began from different
    ones.
    """
    start = opened.project.training.start_from
    if start is None:
        start = _recorded_start(opened, grouping)
    return None if grouping == "unified" and is_unified(opened.project, start) else start


def _recorded_start(opened: Opened, grouping: Grouping) -> str | None:
    project = opened.project
    names: Sequence[str] = ("unified",)
    if grouping == "persona":
        names = opened.adapters
    elif grouping == "cluster":
        names = Catalogue.from_template(project.path(project.cluster_adapters)).names
    starts: dict[str | None, str] = {}
    for name in names:
        known = manifest.read_manifest(project.adapter_location(name))
        if known is not None and known.get("grouping") == grouping:
            starts.setdefault(known["training"]["start_from"], name)
    if len(starts) > 1:
        listed = ", ".join(f"{name} from {start or 'nothing'}" for start, name in starts.items())
        raise ProjectError(
            f"{project.location}: adapters that are there began from different ones: {listed}.\n"
            "Set training.start_from, and those that began elsewhere are trained anew."
        )
    return next(iter(starts), None)


def check_training(opened: Opened, starts: Mapping[Grouping, str | None]) -> None:
    """Raise now if something cannot be trained: no base, no examples, no adapter to start from.

    starts: what each grouping to train begins from.
    """
    if not starts:
        return
    opened.need_base("training")
    personas = opened.need_personas("training")
    if not opened.trainable:
        raise PersonaError(f"{personas.location}: nobody has training examples.\nAdd rows with split train.")
    for start in starts.values():
        if start is None or ("unified" in starts and is_unified(opened.project, start)):
            continue
        location = opened.project.path(start)
        if not storage.exists(storage.join(location, "adapter_config.json")):
            raise AdapterError(
                f"{location}: there is no adapter to start from.\n"
                f"`raymerge train {opened.project.location} --group-by unified` makes the unified one."
            )


def training_items(
    opened: Opened,
    grouping: Grouping,
    clusters: Mapping[str, str] | None,
    *,
    start: str | None,
    trained: Mapping[str, str],
) -> list[Item]:
    """Items that train one grouping: equal-sized personas side by side, `adapters_per_item` at a time; clusters and
    the unified adapter one per item, the largest first.

    clusters: persona -> label, needed for grouping `cluster`. start: what training begins from. trained: see
    `trained_by`, of the items before, which those that begin from one of their adapters wait for.
    """
    project = opened.project
    personas = opened.need_personas("training")
    settings = project.training.of(grouping)
    groups = _train_groups(opened, grouping, clusters)
    sizes = {g.name: sum(len(personas.examples(p, "train")) for p in g.personas) for g in groups}
    whole = TrainTask(
        groups=(),
        grouping=grouping,
        personas=personas.source,
        training={**settings.model_dump(mode="json"), "start_from": start},
        prompt_format=project.generation.prompt_format,
        base_digest=base_digest(opened.need_base("training")),
        workspace=project.workspace,
        folder="",
    )
    after = maker_of(project, start, trained)
    items = []
    for number, portion in enumerate(_portions(groups, sizes, settings.adapters_per_item)):
        label = "unified" if grouping == "unified" else portion[0].name if grouping == "cluster" else f"{number:04d}"
        name = f"train/{label}" if grouping == "unified" else f"train/{grouping}/{label}"
        place = storage.join(project.shared_folder(), "training", name.removeprefix("train/"))
        task = replace(whole, groups=tuple(portion), folder=place)
        items.append(Item(name, "model", "train", task, after=after, alone=True))
    return items


def _train_groups(opened: Opened, grouping: Grouping, clusters: Mapping[str, str] | None) -> list[TrainGroup]:
    project = opened.project
    members: dict[str, list[str]] = {}
    for name in opened.trainable:
        label = {"unified": "unified", "persona": name}.get(grouping) or (clusters or {}).get(name)
        if label is None:
            raise ProjectError(f"{project.location}: {name} is in no cluster, so none can be trained with it.")
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


def maker_of(project: Project, place: str | None, trained: Mapping[str, str]) -> frozenset[str]:
    """The item that trains the adapter at a location of the project file, if one does."""
    if place is None or not trained:
        return frozenset()
    location = project.path(place)
    return frozenset(item for name, item in trained.items() if project.adapter_location(name) == location)
