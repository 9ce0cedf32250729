"""Trials: a few numbers of epochs are tried on a part of the adapters, and validation examples choose.

A trial is an ordinary training with its own schedule and an ordinary evaluation, so that fewer epochs are not judged by
a snapshot in the middle of a longer schedule. The training itself waits for them and reads what they found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from raymerge import storage
from raymerge.config import Grouping
from raymerge.errors import ProjectError, RoutingError
from raymerge.pipelines.opening import Opened, base_location
from raymerge.pipelines.placing import Placed
from raymerge.pipelines.planning import embedding_source
from raymerge.pipelines.scoring import Answering, asking_of, scoring_items
from raymerge.recipes import Recipe
from raymerge.routing.inputs import Space, make_space
from raymerge.routing.similarity import nearest
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import AnswerSource, ExpertRef, MergeTask, TrainGroup, Trial

ADAPTERS_TRIED = 24  # of many small ones; enough that the mean of their answers can choose
PERSONAS_SCORED = 100
NEIGHBOURHOOD = 8  # adapters of a merge that is tried: about as many as recipes merge
MIXED = Recipe("neighbours", "simple_average", rank="exact").merges  # how they are merged: no weight, nothing lost

T = TypeVar("T")
MakeItem = Callable[[str, tuple[TrainGroup, ...], int, Collection[str]], Item]
Served = Callable[[TrainGroup], Sequence[str]]


@dataclass(frozen=True)
class Sample:
    """Adapters that numbers of epochs are tried on, and who is scored.

    answered_by: persona -> names of the adapters that answer for it: one as it is, several by their merge.
    """

    groups: tuple[TrainGroup, ...]
    answered_by: Mapping[str, tuple[str, ...]]


def check_trials(opened: Opened, groupings: Collection[Grouping]) -> None:
    """Raise ProjectError now if neighbours are asked for before anything can tell who they are."""
    settings = opened.project.training.of("persona")
    if "persona" in groupings and settings.tries_neighbours and embedding_source(opened) == "deltas":
        raise ProjectError(
            f"{opened.project.location}: training.epochs_chosen_by: neighbours are wanted before anything is trained.\n"
            "Found embedding.source: deltas, and there are none before training. Expected texts, or a parquet file of "
            "vectors.\nGive one of these, or choose by `own`."
        )


def trials_of(opened: Opened, label: str, epochs: Sequence[int]) -> tuple[Trial, ...]:
    """Where each trial of a training is scored; none where there is nothing to choose."""
    if len(epochs) < 2:
        return ()
    places = {n: storage.join(opened.project.shared_folder(), "tries", f"{label}-{n}") for n in epochs}
    return tuple(
        Trial(n, adapters=storage.join(place, "adapters"), evaluation=storage.join(place, "evaluation"))
        for n, place in places.items()
    )


def trial_items(
    opened: Opened,
    label: str,
    sample: Sample,
    trials: Sequence[Trial],
    make_item: MakeItem,
    *,
    after: Collection[str] = (),
    kind: Literal["adapter", "prefix"] = "adapter",
) -> list[Item]:
    """Items that train a sample with each number of epochs, and score it on validation examples.

    make_item: from a name, groups, epochs and what to wait for to the item that trains.
    """
    items: list[Item] = []
    for trial in trials:
        tried = tuple(replace(g, folder=storage.join(trial.adapters, g.name)) for g in sample.groups)
        name = f"try/{label}-{trial.epochs}"
        training = make_item(f"{name}/train", tried, trial.epochs, after)
        waits = frozenset({training.id})
        sources = _sources(opened, sample, {group.name: group.folder for group in tried}, kind)
        answering = {source.persona: Answering(source, waits) for source in sources}
        asking = asking_of(opened, "validation", most=opened.project.evaluation.tuning_examples)
        items += [
            training,
            *scoring_items(opened, asking, trial.evaluation, answering, f"{name}/score", f"{name}/gather"),
        ]
    return items


def _sources(
    opened: Opened, sample: Sample, folders: Mapping[str, str], kind: Literal["adapter", "prefix"]
) -> list[AnswerSource]:
    """What answers for each persona of a sample. folders: name of an adapter -> where the trial has it."""
    base, workspace = base_location(opened.project), opened.project.workspace
    found = []
    for persona, names in sample.answered_by.items():
        if len(names) == 1:
            found.append(AnswerSource(persona, kind, location=folders[names[0]]))
            continue
        experts = tuple(ExpertRef(name, folders[name], 1 / len(names)) for name in names)
        merge = MergeTask("neighbours", "", experts, MIXED, workspace, base)  # in memory: it has no folder
        found.append(AnswerSource(persona, "mixture", merge=merge))
    return found


def sample_of(opened: Opened, groups: Sequence[TrainGroup], served: Served) -> Sample:
    """Groups to try, each by its own answers: of adapters for one persona some, evenly chosen; of adapters for many the
    one of median size. served: the personas that a group's adapter is for."""
    usable = _scorable(opened, groups, served)
    if usable and all(len(served(g)) == 1 for g in usable):
        chosen = spread(usable, ADAPTERS_TRIED)
    else:
        ordered = sorted(usable, key=lambda g: (len(g.personas), g.name))
        chosen = ordered[len(ordered) // 2 : len(ordered) // 2 + 1]
    return Sample(tuple(chosen), {p: (g.name,) for g in chosen for p in spread(served(g), PERSONAS_SCORED)})


def sample_of_neighbours(opened: Opened, groups: Sequence[TrainGroup], placed: Placed) -> Sample:
    """Personas' groups to try in neighbourhoods, each persona answered by the merge of its neighbourhood.

    A persona without validation examples or an embedding is in none. Raises RoutingError where nobody has both.
    """
    by_name = {group.name: group for group in _scorable(opened, groups, lambda group: group.personas)}
    embedded = set(placed.inputs.embeddings.names) if placed.inputs.embeddings is not None else set()
    names = sorted(by_name.keys() & embedded)
    if not groups:
        return Sample((), {})
    if not names:
        raise RoutingError(
            f"{opened.project.location}: training.epochs_chosen_by is neighbours, and no persona can have any.\n"
            "Expected an embedding and validation examples of somebody to train; or choose by `own`."
        )
    inputs = replace(placed.inputs, personas=names, experts=names)
    space, _ = make_space(inputs, opened.project.embedding.centred)
    found = neighbourhoods(space)
    return Sample(tuple(by_name[n] for hood in found for n in hood), {n: hood for hood in found for n in hood})


def neighbourhoods(space: Space) -> list[tuple[str, ...]]:
    """An evenly chosen persona with the most similar others, for as many as are tried, nobody in two; names sorted.

    space: of personas who are experts themselves. All are of one size, so that no merge is tried for having more
    experts; what does not fill another is left out.
    """
    left = list(range(len(space.personas)))
    found = []
    for place in spread(left, neighbourhoods_of(len(left))):
        centre = min((i for i in left if i >= place), default=left[0])  # the next where that one is taken
        rows, itself = np.array(left), np.array([left.index(centre)])
        [near] = nearest(space.queries[[centre]], space.keys[rows], NEIGHBOURHOOD - 1, exclude=itself)
        members = {centre, *rows[near.indices].tolist()}
        left = [i for i in left if i not in members]
        found.append(tuple(space.personas[i] for i in sorted(members)))
    return found


def neighbourhoods_of(personas: int) -> int:
    """Into how many neighbourhoods so many personas are cut; one where they fill none."""
    return max(1, min(personas, ADAPTERS_TRIED) // NEIGHBOURHOOD)


def _scorable(opened: Opened, groups: Sequence[TrainGroup], served: Served) -> list[TrainGroup]:
    """Groups whose adapter is for somebody with validation examples."""
    without = set(opened.need_personas("training").missing("validation"))
    return [g for g in groups if any(persona not in without for persona in served(g))]


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly chosen."""
    if len(values) <= most:
        return list(values)
    return [values[i * len(values) // most] for i in range(most)]
