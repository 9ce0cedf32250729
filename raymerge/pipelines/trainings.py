"""Trainings: which groupings a job needs, what each begins from, and the items that carry them out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from raymerge import manifest, storage
from raymerge.adapters.catalogue import Catalogue
from raymerge.config import GROUPINGS, Grouping, Project, Training
from raymerge.errors import AdapterError, PersonaError, ProjectError, unknown
from raymerge.pipelines.opening import Opened
from raymerge.runtime.bases import base_digest
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import PrefixTask, TrainGroup, TrainTask, Trial


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
    for grouping in starts:
        check_validation(opened, f"training ({grouping})", opened.project.training.of(grouping), grouping)
    for start in starts.values():
        if start is None or ("unified" in starts and is_unified(opened.project, start)):
            continue
        location = opened.project.path(start)
        if not storage.exists(storage.join(location, "adapter_config.json")):
            raise AdapterError(
                f"{location}: there is no adapter to start from.\n"
                f"`raymerge train {opened.project.location} --group-by unified` makes the unified one."
            )


def check_validation(opened: Opened, what: str, settings: Training, grouping: Grouping | None = None) -> None:
    """Raise PersonaError now if a training looks at validation examples and there are none.

    grouping: whose adapters are trained, those of `persona` each stopped by their own examples; None for what a recipe
    trains. Adapters that somebody else made are not trained, and need none.
    """
    personas = opened.need_personas(what)
    without = set(personas.missing("validation")) & set(opened.trainable)
    if not without or (len(settings.choices) < 2 and settings.patience is None):
        return
    trained = to_train(opened, grouping)
    lacking = [name for name in trained if name in without]
    why = "several numbers of epochs to choose from" if len(settings.choices) > 1 else "`patience`"
    if lacking and len(lacking) == len(trained):
        nobody = "nobody" if len(trained) == len(opened.trainable) else "nobody who is to be trained"
        raise PersonaError(f"{what}: has {why}, and {nobody} has validation examples.\nAdd rows with split validation.")
    if lacking and settings.patience is not None and grouping == "persona":
        raise PersonaError(
            f"{what}: has `patience`, and {lacking[0]} has no validation examples ({len(lacking)} such personas).\n"
            "Add rows with split validation for each, or leave patience out."
        )


def to_train(opened: Opened, grouping: Grouping | None) -> list[str]:
    """Personas whose examples a training takes. grouping: as in `check_validation`.

    Whose adapter somebody else made is left out; that of a cluster is not known yet.
    """

    def is_made_elsewhere(persona: str) -> bool:
        name = {"persona": persona, "unified": "unified"}.get(grouping or "")
        return name is not None and is_foreign(opened.project.adapter_location(name))

    return [name for name in opened.trainable if not is_made_elsewhere(name)]


def training_items(
    opened: Opened,
    grouping: Grouping,
    groups: Sequence[TrainGroup],
    *,
    start: str | None,
    trials: Sequence[Trial] = (),
    after: Collection[str] = (),
) -> list[Item]:
    """Items that train one grouping: personas side by side, `adapters_per_item` at a time; clusters and the unified
    adapter one per item. The largest come first.

    start: what training begins from. trials: what chooses where several numbers of epochs are given. after: ids of
    items that must be settled before.
    """
    whole = training_task(opened, grouping, opened.project.training.of(grouping), start, trials)
    items = []
    for number, portion in enumerate(portions(opened, groups)):
        label = "unified" if grouping == "unified" else portion[0].name if grouping == "cluster" else f"{number:04d}"
        name = label if grouping == "unified" else f"{grouping}/{label}"
        items.append(training_item(opened, f"train/{name}", replace(whole, groups=tuple(portion)), after))
    return items


def training_task(
    opened: Opened, grouping: str, settings: Training, start: str | None, trials: Sequence[Trial] = ()
) -> TrainTask:
    """What all items of a grouping have in common; groups and folder are still to be filled in."""
    return TrainTask(
        groups=(),
        grouping=grouping,
        personas=opened.need_personas("training").source,
        training={**settings.model_dump(mode="json"), "start_from": start},
        prompt_format=opened.project.generation.prompt_format,
        base_digest=base_digest(opened.need_base("training")),
        workspace=opened.project.workspace,
        folder="",
        trials=tuple(trials),
    )


def training_item(opened: Opened, name: str, task: TrainTask, after: Collection[str]) -> Item:
    """An item that trains a task's groups."""
    task = replace(task, folder=folder_of_item(opened, name))
    return Item(name, "model", "train", task, after=frozenset(after), alone=True)


def folder_of_item(opened: Opened, name: str) -> str:
    """Where a training item has its checkpoints and its progress."""
    return storage.join(opened.project.shared_folder(), "training", name.removeprefix("train/"))


def train_groups(opened: Opened, grouping: Grouping, clusters: Mapping[str, str] | None) -> list[TrainGroup]:
    """The adapters of a grouping that are to be trained, by name; those that somebody else made are used as they are.

    clusters: persona -> label, needed for grouping `cluster`. Raises ProjectError for a persona without a cluster.
    """
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


def only_cluster(groups: Sequence[TrainGroup], wanted: str | None) -> list[TrainGroup]:
    """The group of one cluster, by label or number; all where none is wanted.

    Raises ProjectError if it is not there, or holds one persona.
    """
    if wanted is None:
        return list(groups)
    label = f"cluster_{int(wanted):02d}" if wanted.isdecimal() else wanted
    chosen = [group for group in groups if group.name == label]
    if not chosen:
        raise ProjectError(f"--cluster {wanted}: {unknown('cluster', label, [g.name for g in groups])}")
    if len(chosen[0].personas) == 1:
        raise ProjectError(f"--cluster {wanted}: {_alone(label, chosen[0].personas[0])}")
    return chosen


def alone_in_cluster(groups: Sequence[TrainGroup]) -> list[str]:
    """What is to be said of clusters of one persona, one line each."""
    return [_alone(group.name, group.personas[0]) for group in groups if len(group.personas) == 1]


def _alone(cluster: str, persona: str) -> str:
    return f"{cluster} holds {persona} alone, so its adapter is that persona's own under another name"


def is_foreign(location: str) -> bool:
    """Whether an adapter is there that `raymerge train` did not make: it is used as it is and never trained over."""
    if not storage.exists(storage.join(location, "adapter_config.json")):
        return False
    if not storage.exists(storage.join(location, manifest.NAME)):
        return True
    known = manifest.read_manifest(location)
    return known is not None and "grouping" not in known


def portions(opened: Opened, groups: Sequence[TrainGroup]) -> list[list[TrainGroup]]:
    """Groups dealt to items, the largest first, those of like size together: adapters of many personas alone, others
    `adapters_per_item` at a time."""
    personas = opened.need_personas("training")
    sizes = {g.name: sum(len(personas.examples(p, "train")) for p in g.personas) for g in groups}
    ordered = sorted(groups, key=lambda g: (-sizes[g.name], g.name))
    shared = {"unified", *(g.name for g in groups if g.name.startswith("cluster_"))}
    most = 1 if any(g.name in shared for g in groups) else opened.project.training.adapters_per_item
    return [ordered[start : start + most] for start in range(0, len(ordered), most)]


def trained_by(items: Iterable[Item]) -> dict[str, str]:
    """Folder of an adapter -> id of the item that trains it."""
    return {
        g.folder: item.id
        for item in items
        if isinstance(item.payload, TrainTask | PrefixTask)
        for g in item.payload.groups
    }


def maker_of(project: Project, place: str | None, trained: Mapping[str, str]) -> frozenset[str]:
    """The item that trains the adapter at a location of the project file, if one does."""
    maker = trained.get(project.path(place)) if place is not None else None
    return frozenset() if maker is None else frozenset({maker})
