"""Trials: a few numbers of epochs are tried on a part of the adapters, and validation examples choose.

A trial is an ordinary training with its own schedule and an ordinary evaluation, so that fewer epochs are not judged by
a snapshot in the middle of a longer schedule. The training itself waits for them and reads what they found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

from raymerge import storage
from raymerge.pipelines.opening import Opened
from raymerge.pipelines.scoring import Answering, asking_of, scoring_items
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tasks import AnswerSource, TrainGroup, Trial

ADAPTERS_TRIED = 24  # of many small ones; enough that the mean of their answers can choose
PERSONAS_SCORED = 100

T = TypeVar("T")
MakeItem = Callable[[str, tuple[TrainGroup, ...], int, Collection[str]], Item]


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
    groups: Sequence[TrainGroup],
    trials: Sequence[Trial],
    make_item: MakeItem,
    *,
    served: Callable[[TrainGroup], Sequence[str]],
    after: Collection[str] = (),
    kind: Literal["adapter", "prefix"] = "adapter",
) -> list[Item]:
    """Items that train a sample of the groups with each number of epochs, and score them on validation examples.

    make_item: from a name, groups, epochs and what to wait for to the item that trains. served: the personas that a
    group's adapter is for.
    """
    items: list[Item] = []
    sample = sample_of(opened, groups, served)
    for trial in trials:
        tried = tuple(replace(g, folder=storage.join(trial.adapters, g.name)) for g in sample)
        name = f"try/{label}-{trial.epochs}"
        training = make_item(f"{name}/train", tried, trial.epochs, after)
        waits = frozenset({training.id})
        answering = {
            persona: Answering(AnswerSource(persona, kind, location=group.folder), waits)
            for group in tried
            for persona in spread(served(group), PERSONAS_SCORED)
        }
        asking = asking_of(opened, "validation", most=opened.project.evaluation.tuning_examples)
        items += [
            training,
            *scoring_items(opened, asking, trial.evaluation, answering, f"{name}/score", f"{name}/gather"),
        ]
    return items


def sample_of(
    opened: Opened, groups: Sequence[TrainGroup], served: Callable[[TrainGroup], Sequence[str]]
) -> list[TrainGroup]:
    """Groups to try: of adapters for one persona some, evenly chosen; of adapters for many the one of median size."""
    without = set(opened.need_personas("training").missing("validation"))
    usable = [g for g in groups if any(persona not in without for persona in served(g))]
    if usable and all(len(served(g)) == 1 for g in usable):
        return spread(usable, ADAPTERS_TRIED)
    ordered = sorted(usable, key=lambda g: (len(g.personas), g.name))
    return ordered[len(ordered) // 2 : len(ordered) // 2 + 1]


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, evenly chosen."""
    if len(values) <= most:
        return list(values)
    return [values[i * len(values) // most] for i in range(most)]
