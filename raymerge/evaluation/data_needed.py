"""How much more test data would show a difference: examples of each persona, or personas."""

from dataclasses import dataclass

import numpy as np

from raymerge.evaluation.criteria import POINTS_ASKED
from raymerge.evaluation.scores import Aligned

MOST_TIMES = 25.0  # as much test data as there is; more is nothing to ask for


@dataclass(frozen=True)
class Noise:
    """Where the differences of a row to the reference vary, in squared points: between examples of a persona, and
    between personas beyond that. examples: test examples of a persona (harmonic mean)."""

    within: float
    between: float
    examples: float


@dataclass(frozen=True)
class DataNeeded:
    """Test data that would show a difference of `shown` points: examples of a persona, else personas.

    times: as many examples, or personas, as there are now. words: such as `23 test examples a persona instead of 6`.
    """

    shown: float
    times: float
    more_personas: bool
    words: str


def noise_of(aligned: Aligned, row: int | None, place: int | None) -> Noise | None:
    """How a row's difference to the reference varies within and between personas; None without both, and where no
    persona has two examples."""
    if row is None or place is None:
        return None
    values = 100 * (aligned.metrics["similarity"][row] - aligned.metrics["similarity"][place])
    count = np.bincount(aligned.person)
    mean = np.bincount(aligned.person, weights=values) / count
    freedom = int((count - 1).sum())
    if freedom < 1 or len(count) < 2:
        return None
    within = float(((values - mean[aligned.person]) ** 2).sum() / freedom)
    examples = float(len(count) / (1 / count).sum())
    return Noise(within, max(0.0, float(mean.var(ddof=1)) - within / examples), examples)


def data_needed(difference: float, smallest_detectable: float, noise: Noise | None, personas: int) -> DataNeeded | None:
    """What would show a difference, None where it is large enough to be seen with the data that is there.

    A difference below the points asked need not be shown as it is: that it is smaller than those is enough.
    noise: None where personas have one example each, so that only more personas can be asked for.
    """
    if not smallest_detectable > abs(difference):  # NaN too
        return None
    shown = max(abs(difference), smallest_detectable / MOST_TIMES**0.5)
    if smallest_detectable > POINTS_ASKED:
        shown = max(shown, POINTS_ASKED)
    times = (smallest_detectable / shown) ** 2  # as much as there is, where personas are added
    if noise is not None:
        room = (noise.between + noise.within / noise.examples) / times - noise.between
        if room > 0 and noise.within / room <= 2 * MOST_TIMES * noise.examples:
            words = f"{noise.within / room:.0f} test examples a persona instead of {noise.examples:.0f}"
            return DataNeeded(shown, noise.within / room / noise.examples, False, words)
    return DataNeeded(shown, times, True, f"{times * personas:,.0f} personas instead of {personas:,}")
