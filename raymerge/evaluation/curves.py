"""Training curves: the losses of many adapters as one line with a band, by the share of training done."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raymerge.evaluation.statistics import Values

POINTS = 60


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of one training, thinned: nats per answer token.

    training: (POINTS,), means over equal shares of its steps. validation: (POINTS,), between the steps where it was
    measured, NaN before the first; None where it never was. steps: optimiser steps made.
    """

    training: Values
    validation: Values | None
    steps: int


@dataclass(frozen=True, eq=False)
class TrainingCurve:
    """The trainings of one grouping: mean loss over adapters (POINTS,), and the range that holds the middle 80 %.

    share: of training done, 0 to 1. validation: mean over adapters, NaN where none is known; None without any.
    steps: fewest and most steps of an adapter.
    """

    grouping: str
    adapters: int
    steps: tuple[int, int]
    share: Values
    mean: Values
    low: Values
    high: Values
    validation: Values | None


def thin_losses(
    losses: Sequence[float], validation: Sequence[tuple[int, float]] = (), points: int = POINTS
) -> Losses | None:
    """A training's losses as means over equal shares of its steps, exact where a share ends within a step.

    losses: one per step. validation: (step, loss) in the order of steps. None where no step is known.
    """
    values = np.asarray(losses, dtype=np.float64)
    if not len(values):
        return None
    edges = np.linspace(0, len(values), points + 1)
    summed = np.interp(edges, np.arange(len(values) + 1), np.concatenate([[0.0], np.cumsum(values)]))
    measured = None
    if len(validation):
        steps, found = np.asarray(validation, dtype=np.float64).T
        middles = (edges[1:] + edges[:-1]) / 2
        ends = edges[1:]
        measured = np.where(ends >= steps[0], np.interp(middles, steps, found), np.nan)
    return Losses(np.diff(summed) / np.diff(edges), measured, len(values))


def curve_of(grouping: str, trainings: Sequence[Losses]) -> TrainingCurve:
    """The curve of a grouping from the losses of its trainings, at least one."""
    training = np.stack([one.training for one in trainings])
    low, high = np.quantile(training, [0.1, 0.9], axis=0)
    steps = [one.steps for one in trainings]
    points = training.shape[1]
    return TrainingCurve(
        grouping=grouping,
        adapters=len(trainings),
        steps=(min(steps), max(steps)),
        share=(np.arange(points) + 0.5) / points,
        mean=training.mean(axis=0),
        low=low,
        high=high,
        validation=_mean_of_known([one.validation for one in trainings if one.validation is not None]),
    )


def _mean_of_known(values: Sequence[Values]) -> Values | None:
    if not values:
        return None
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    number = known.sum(axis=0)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, number, out=np.full(len(number), np.nan), where=number > 0))
