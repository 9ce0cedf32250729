"""The trainings of a run, counted: adapters that are missing, and the trials that choose their numbers of epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raymerge import storage
from raymerge.config import Grouping, Training
from raymerge.manifest import read_manifest
from raymerge.pipelines.checking import operations
from raymerge.pipelines.checking.adapters import is_there
from raymerge.pipelines.checking.estimate import ITEM_S, Step, measured_items, measured_training
from raymerge.pipelines.checking.known import Known
from raymerge.pipelines.checking.merges import contributors
from raymerge.pipelines.checking.operations import Rows, padded, rows_of
from raymerge.pipelines.own_trainings import settings_of
from raymerge.pipelines.trainings import is_foreign
from raymerge.pipelines.trials import NEIGHBOURHOOD, neighbourhoods_of, sample_of, spread, trials_of
from raymerge.recipes import Recipe
from raymerge.runtime.tasks import TrainGroup, Trial


def training_step(known: Known, grouping: Grouping) -> Step:
    """One grouping: the adapters that are missing of it, and their trials. Of several numbers of epochs the most is
    taken to be chosen."""
    project = known.opened.project
    settings = project.training.of(grouping)
    members = _members(known, grouping)
    groups = [TrainGroup(name, project.adapter_location(name), personas) for name, personas in members.items()]
    missing = [group.name for group in groups if not is_there(group.folder)]
    work = {name: _work(known, settings, grouping, members[name]) for name in members}
    most = max(settings.choices)
    tried = _sample(known, settings, [g for g in groups if not is_foreign(g.folder)]) if missing else []
    trials = [
        (group.name, trial.epochs)
        for trial in trials_of(known.opened, grouping, settings.choices)
        for group in _still_to_try(settings, tried, trial)
    ]
    alone = grouping != "persona" or min(settings.adapters_per_item, len(groups)) == 1
    copied = {group.name for group in tried} if alone else set()  # from the trial that was chosen
    trained = [*((name, most) for name in missing if name not in copied), *trials]
    to_do = sum(work[name] * epochs for name, epochs in trained)
    items = math.ceil(len(missing) / settings.adapters_per_item) if grouping == "persona" else len(missing)
    total = sum(work[name] for name in missing) or 1.0
    largest = 1 / items if grouping == "persona" and items else max((work[n] for n in missing), default=0.0) / total
    written = [(name, epochs * _steps(known, settings, members[name]))
               for name, epochs in [*((name, most) for name in missing), *trials]]  # fmt: skip
    nbytes = sum(operations.adapter_bytes(known.layers.targets, settings.rank, steps) for _, steps in written)
    measured = measured_training(known.timings, {name: work[name] * most for name in members}, to_do)
    return Step(
        f"train {grouping}", "model", len(missing), items, len(members) - len(missing), to_do, nbytes, largest,
        fixed_s=ITEM_S * (items + len({epochs for _, epochs in trials})), measured_s=measured,
    )  # fmt: skip


def own_training_step(known: Known, recipe: Recipe) -> Step:
    """What a recipe trains for itself, and its trials: on the rows of each persona's experts, or a prefix for each."""
    opened = known.opened
    settings = settings_of(opened, recipe)
    is_prefix = recipe.strategy == "prefix"
    groups = _own_groups(known, recipe)
    makes, each = len(groups), 1 if is_prefix else contributors(known, recipe).each
    there = min(makes, _whole_in(storage.join(opened.project.run_folder(recipe.name), "trained")))
    missing = makes - there
    sample = len(_sample(known, settings, groups)) if missing else 0
    trials = [(trial.epochs, max(0, sample - _whole_in(trial.adapters)))
              for trial in trials_of(opened, recipe.name, settings.choices)]  # fmt: skip
    alone = not is_prefix and min(settings.adapters_per_item, makes) == 1
    most = max(settings.choices)
    rows = sum(known.training_rows.values()) / max(len(known.training_rows), 1) * each
    grouping: Grouping = "persona" if is_prefix else "cluster"
    passes = most * max(0, missing - (sample if alone and trials else 0)) + sum(n * count for n, count in trials)
    adapted = 0 if is_prefix else known.adapted(settings)
    nbytes = 0
    for epochs, count in [(most, missing), *trials]:
        steps = epochs * math.ceil(rows / _batch(settings))
        if is_prefix:
            nbytes += count * operations.prefix_bytes(known.layers, recipe.strategy_parameters["tokens"], steps)
        else:
            nbytes += count * operations.adapter_bytes(known.layers.targets, settings.rank, steps)
    items = math.ceil(missing / settings.adapters_per_item)
    tries = sum(1 for _, count in trials if count)
    return Step(
        f"train {recipe.name}", "model", missing, items, there,
        _per_row(known, settings, grouping, adapted) * rows * passes, nbytes, 1 / max(items, 1),
        fixed_s=ITEM_S * (items + tries),
        measured_s=None if tries else measured_items([known.timings], (f"train/{recipe.name}/",), items),
    )  # fmt: skip


def _own_groups(known: Known, recipe: Recipe) -> list[TrainGroup]:
    """A group for each adapter that a recipe will train, of the personas it is for, before anything is routed."""
    if recipe.strategy == "prefix":
        return [TrainGroup(name, "", (name,)) for name in known.training_rows]
    count = contributors(known, recipe).merges
    if count == len(known.opened.names):
        return [TrainGroup(name, "", (name,)) for name in known.opened.names]
    served = _members(known, "unified" if count == 1 else "cluster")
    return [TrainGroup(name, "", personas) for name, personas in served.items()]


def _sample(known: Known, settings: Training, groups: Sequence[TrainGroup]) -> list[TrainGroup]:
    """The groups that several numbers of epochs are tried on."""
    if len(settings.choices) < 2:
        return []
    sample = sample_of(known.opened, groups, lambda group: group.personas).groups
    if not settings.tries_neighbours:
        return list(sample)
    return spread(sample, NEIGHBOURHOOD * neighbourhoods_of(len(sample)))


def _still_to_try(settings: Training, tried: Sequence[TrainGroup], trial: Trial) -> Sequence[TrainGroup]:
    """Those of a sample that a trial has still to train. Who are neighbours is known with the embeddings alone, so of
    neighbourhoods those there are only counted."""
    if settings.tries_neighbours:
        return tried[_whole_in(trial.adapters) :]
    return [group for group in tried if not _is_whole(storage.join(trial.adapters, group.name))]


def _is_whole(location: str) -> bool:
    return read_manifest(location) is not None


def _whole_in(folder: str) -> int:
    """How many adapters or prefixes lie in a folder with their markers."""
    return sum(_is_whole(storage.join(folder, name)) for name in storage.list_folders(folder))


def _batch(settings: Training) -> int:
    assert not isinstance(settings.batch_size, dict)  # of one grouping
    return settings.batch_size


def _steps(known: Known, settings: Training, personas: Sequence[str]) -> int:
    """Steps of one pass over the rows of some personas."""
    return math.ceil(sum(known.training_rows[name] for name in personas) / _batch(settings))


def _members(known: Known, grouping: Grouping) -> dict[str, tuple[str, ...]]:
    """Adapter -> personas whose rows it is trained on. Unknown clusters are taken to be of equal size."""
    trained = tuple(known.training_rows)
    if grouping == "persona":
        return {name: (name,) for name in trained}
    if grouping == "unified":
        return {"unified": trained} if trained else {}
    found: dict[str, list[str]] = {}
    for number, name in enumerate(trained):
        label = known.clusters.get(name) or f"cluster_{number % known.cluster_count:02d}"
        found.setdefault(label, []).append(name)
    return {label: tuple(names) for label, names in sorted(found.items())}


def _work(known: Known, settings: Training, grouping: Grouping, personas: Sequence[str]) -> float:
    """Operations of one pass over the rows of some personas, by the mean row of this grouping."""
    rows = known.training_rows
    return _per_row(known, settings, grouping, known.adapted(settings)) * sum(rows[name] for name in personas)


def _per_row(known: Known, settings: Training, grouping: Grouping, adapted: int) -> float:
    """Operations of a row, on average. adapted: numbers that are trained beside the linear layers."""
    lengths = known.lengths.of("train")
    owners = lengths.owner if grouping == "persona" else np.zeros_like(lengths.owner)
    widths = padded(lengths.prompt + lengths.answer, owners, _batch(settings), together=False)
    rows: Rows = rows_of(widths, lengths.answer, lengths.weight)
    done = operations.training_operations(known.layers, adapted, rows)
    return done / max(float(lengths.weight.sum()), 1.0)
