"""What was asked of merging, and whether the recipe that the verdict speaks of reaches it.

Three criteria: similarity 3 points above unified, 70 to 80 % of the personas improved, and fewer regressions than with
the personas' own adapters. Each is met or not met only where its whole interval lies on that side of what was asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raymerge.evaluation import statistics
from raymerge.evaluation.rows import REGRESSION
from raymerge.evaluation.statistics import Values
from raymerge.evaluation.wording import number, percent, signed

POINTS_ASKED = 3.0
SHARE_ASKED = 0.70  # the lower end of what was asked

Outcome = Literal["met", "not met", "cannot be told"]


@dataclass(frozen=True)
class Criterion:
    """One thing asked for, and what was found: a value with its interval, NaN where it has none.

    what, asked: in words. said: the figures in words, or which row is missing. value: points, a share from 0 to 1, or
    a difference in the number of regressions; None where a row is missing.
    """

    name: Literal["similarity", "improved", "regressions"]
    what: str
    asked: str
    outcome: Outcome
    said: str
    value: float | None
    low: float | None
    high: float | None
    level: float


def judge_criteria(
    scores: Values,
    means: Values,
    row: int | None,
    place: int | None,
    own: int | None,
    *,
    names: Sequence[str],
    reference: str,
    level: float,
    resamples: int,
    seed: int,
) -> tuple[Criterion, ...]:
    """The three criteria for a row against the reference at `place` and the personas' own adapters at `own`.

    scores: (rows, personas), points. means: bootstrap means (resamples, rows). names: of the rows. reference: the name
    of the row that `place` would be. level: of the intervals, 0.95 for a row that these scores did not choose.
    """
    personas = scores.shape[1]
    if row is None or place is None:
        missing = "no recipe with plain prompts was compared" if row is None else _missing(reference)
        return (
            _unknown("similarity", level, missing),
            _unknown("improved", level, missing),
            _unknown("regressions", level, missing),
        )
    difference = scores[row] - scores[place]
    low, high = statistics.interval(means[:, [row]] - means[:, [place]], personas, level)
    first = _similarity(float(difference.mean()), float(low[0]), float(high[0]), level)
    columns = [(difference > 0).astype(np.float64)]
    if own is not None:
        theirs = scores[own] - scores[place]
        columns.append((difference < -REGRESSION).astype(np.float64) - (theirs < -REGRESSION))
    drawn = statistics.bootstrap_means(np.stack(columns, axis=1), resamples=resamples, seed=seed)
    lows, highs = statistics.interval(drawn, personas, level)
    share = _improved(columns[0], float(lows[0]), float(highs[0]), level)
    if own is None:
        return first, share, _unknown("regressions", level, _missing("own"))
    counts = (int((difference < -REGRESSION).sum()), int((theirs < -REGRESSION).sum()))
    bounds = (float(lows[1]) * personas, float(highs[1]) * personas)
    return first, share, _regressions(counts, bounds, bool(columns[1].any()), names[own], level)


_WORDS = {
    "similarity": ("similarity over unified", f"{signed(POINTS_ASKED, 0)} points"),
    "improved": ("personas improved", "70 to 80 %"),
    "regressions": ("regressions against own", "fewer"),
}


def _similarity(value: float, low: float, high: float, level: float) -> Criterion:
    what, asked = _WORDS["similarity"]
    said = f"{signed(value)} [{signed(low)} {signed(high)}]"
    return Criterion(
        "similarity", what, asked, _outcome(low >= POINTS_ASKED, high < POINTS_ASKED), said, value, low, high, level
    )


def _improved(improved: Values, low: float, high: float, level: float) -> Criterion:
    what, asked = _WORDS["improved"]
    low, high = _with_binomial(improved, low, high, level)
    share = float(improved.mean())
    said = f"{percent(share)} [{number(100 * low, 0)} {number(100 * high, 0)}]"
    return Criterion(
        "improved", what, asked, _outcome(low >= SHARE_ASKED, high < SHARE_ASKED), said, share, low, high, level
    )


def _regressions(
    counts: tuple[int, int], bounds: tuple[float, float], discordant: bool, own: str, level: float
) -> Criterion:
    """discordant: whether any persona regresses in one of the rows alone; where none does, nothing can be told."""
    what, asked = _WORDS["regressions"]
    low, high = bounds
    said = f"{counts[0]}, {own} {counts[1]}: {signed(counts[0] - counts[1], 0)} [{signed(low, 0)} {signed(high, 0)}]"
    outcome = _outcome(high < 0, low >= 0) if discordant else "cannot be told"
    return Criterion("regressions", what, asked, outcome, said, float(counts[0] - counts[1]), low, high, level)


def _outcome(met: bool, unmet: bool) -> Outcome:
    return "met" if met else "not met" if unmet else "cannot be told"


def _with_binomial(improved: Values, low: float, high: float, level: float) -> tuple[float, float]:
    """The bootstrap has no spread where all personas improved, or none: the exact binomial bound stands in for it
    (Clopper and Pearson 1934)."""
    tail = ((1 - level) / 2) ** (1 / len(improved))
    if improved.all():
        return tail, 1.0
    return (0.0, 1 - tail) if not improved.any() else (low, high)


def _missing(row: str) -> str:
    return f"needs the row {row}, which is not here"


def _unknown(name: Literal["similarity", "improved", "regressions"], level: float, said: str) -> Criterion:
    what, asked = _WORDS[name]
    return Criterion(name, what, asked, "cannot be told", said, None, None, None, level)
