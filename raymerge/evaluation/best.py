"""Which row is best for each persona, and how much of that would be so on other examples of the same persona.

The best of many rows looks better than it is: some row is always lucky. So the examples of each persona are halved,
the best row is picked on one half and looked at on the other; what repeats there is what a choice per persona is worth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raymerge.evaluation.scores import Aligned, RunScores
from raymerge.evaluation.statistics import Values

SPLITS = 10
SERVED = frozenset({"recipe", "reference", "baseline", "external"})  # a ceiling or a control is nothing to serve


@dataclass(frozen=True)
class BestCount:
    """A row: for how many personas it is the best one.

    share: of personas. gain: its mean difference to the reference there, points. again: of the personas for which one
    half of the examples picks it, the share for which the other half does too; by_chance: the share that would, if
    picks did not depend on the persona. None where no persona has two examples, or the row is never picked.
    """

    row: str
    personas: int
    share: float
    gain: float | None
    again: float | None
    by_chance: float | None


@dataclass(frozen=True)
class Best:
    """The best row of every persona, among those that can be served.

    row: place of the best row for each persona; gain: its difference to the reference in points, empty without one.
    counts: rows that are best for somebody, most personas first. halved: personas with two examples or more. again,
    by_chance: as in BestCount, over all rows. optimistic: mean gain of the best rows over the reference, on the
    examples that picked them; repeated: on the other half of the examples; single, single_row: mean gain of the one
    row that is best for all, on the same personas. Points; None without a reference or without halves.
    """

    row: tuple[int, ...]
    gain: tuple[float, ...]
    counts: tuple[BestCount, ...]
    halved: int
    again: float | None
    by_chance: float | None
    optimistic: float | None
    repeated: float | None
    single: float | None
    single_row: str


def best_rows(
    runs: Sequence[RunScores],
    aligned: Aligned,
    scores: Values,
    place: int | None,
    kinds: frozenset[str] = SERVED,
    seed: int = 0,
) -> Best | None:
    """The best row of each persona; of equal ones the one that is better on average. None where there are fewer
    than two rows to choose from.

    scores: (runs, personas), points, runs best first. place: the reference row, or None. kinds: of the rows to choose
    from. seed: of the halves.
    """
    served = np.array([i for i, run in enumerate(runs) if run.kind in kinds or i == place], dtype=np.int64)
    if len(served) < 2:
        return None
    best = served[scores[served].argmax(axis=0)]
    gain = scores[best, np.arange(scores.shape[1])] - scores[place] if place is not None else np.empty(0)
    picked = _halves(aligned, served, place, seed)
    counts = [
        _count(runs[row].name, best == row, gain, picked, int(np.flatnonzero(served == row)[0])) for row in served
    ]
    counts = sorted((count for count in counts if count.personas), key=lambda count: -count.personas)
    agreed = picked.first == picked.second
    known = picked.personas > 0
    return Best(
        row=tuple(best.tolist()),
        gain=tuple(gain.tolist()),
        counts=tuple(counts),
        halved=picked.personas,
        again=float(agreed.mean()) if known else None,
        by_chance=_agreement_by_chance(picked, len(served)) if known else None,
        optimistic=float(gain.mean()) if place is not None else None,
        repeated=picked.repeated if known and place is not None else None,
        single=float((scores[served[0]] - scores[place]).mean()) if place is not None else None,
        single_row=runs[served[0]].name,
    )


@dataclass(frozen=True)
class _Picked:
    """Place among the served rows that each half of a persona's examples picks (splits, personas with two examples),
    and the mean gain over the reference that a half's pick has on the other half, points."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    personas: int
    repeated: float | None


def _halves(aligned: Aligned, served: NDArray[np.int64], place: int | None, seed: int) -> _Picked:
    count = np.bincount(aligned.person, minlength=len(aligned.personas))
    enough = np.flatnonzero(count >= 2)
    if not len(enough):
        nothing = np.empty((0, 0), dtype=np.int64)
        return _Picked(nothing, nothing, 0, None)
    generator = np.random.default_rng([seed, 3])
    values = 100 * aligned.metrics["similarity"][served]
    base = None if place is None else int(np.flatnonzero(served == place)[0])
    firsts, seconds, gains = [], [], []
    for _ in range(SPLITS):
        left = _left_half(aligned.person, count, generator)
        halves = [_means(values, aligned.person[half], half, enough) for half in (left, ~left)]
        picks = [half.argmax(axis=0) for half in halves]
        firsts.append(picks[0])
        seconds.append(picks[1])
        if base is not None:
            for pick, other in zip(picks, reversed(halves), strict=True):
                gains.append(float((other[pick, np.arange(len(enough))] - other[base]).mean()))
    repeated = float(np.mean(gains)) if gains else None
    return _Picked(np.stack(firsts), np.stack(seconds), len(enough), repeated)


def _left_half(
    person: NDArray[np.int64], count: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.bool_]:
    """A random half of each persona's examples, rounded down: (E,)."""
    order = np.lexsort((generator.random(len(person)), person))
    starts = np.cumsum(count) - count
    rank = np.empty(len(person), dtype=np.int64)
    rank[order] = np.arange(len(person)) - starts[person[order]]
    return np.asarray(rank < count[person] // 2)


def _means(values: Values, person: NDArray[np.int64], half: NDArray[np.bool_], enough: NDArray[np.int64]) -> Values:
    """Means over the examples of a half: (rows, personas with two examples or more)."""
    number = np.bincount(person, minlength=int(enough[-1]) + 1)[enough]
    sums = np.stack([np.bincount(person, weights=row[half], minlength=int(enough[-1]) + 1)[enough] for row in values])
    return np.asarray(sums / number)


def _count(name: str, mine: NDArray[np.bool_], gain: Values, picked: _Picked, place: int) -> BestCount:
    chosen, other = picked.first == place, picked.second == place
    times = int(chosen.sum() + other.sum())
    return BestCount(
        row=name,
        personas=int(mine.sum()),
        share=float(mine.mean()),
        gain=float(gain[mine].mean()) if len(gain) and mine.any() else None,
        again=float(2 * (chosen & other).sum() / times) if times else None,
        by_chance=times / (2 * chosen.size) if times else None,
    )


def _agreement_by_chance(picked: _Picked, rows: int) -> float:
    """How often two halves would pick the same row if they were halves of different personas."""
    one = np.bincount(picked.first.ravel(), minlength=rows) / picked.first.size
    other = np.bincount(picked.second.ravel(), minlength=rows) / picked.second.size
    return float(one @ other)
