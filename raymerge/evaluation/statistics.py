"""What a difference between two rows is worth, with personas as the unit that is sampled.

All functions take one column per row of the comparison and treat all columns with the same resamples, so that figures
of one table belong together. Randomness comes from the seed alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]

RESAMPLES = 10_000
CELLS_AT_ONCE = 2_000_000  # drawn indices held in memory: 16 MB, whatever the number of personas


@dataclass(frozen=True)
class Chance:
    """A share or count, beside what random signs of the same differences would give (mean, 95 % range)."""

    observed: float
    expected: float
    low: float
    high: float


def bootstrap_means(values: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Values:
    """Means of personas drawn with replacement: values (personas, columns) -> (resamples, columns).

    Each resample draws the same personas for all columns, which is what makes differences of columns paired.
    """
    count, columns = values.shape
    generator = np.random.default_rng([seed, 1])
    means = np.empty((resamples, columns))
    centre = values.mean(axis=0)  # taken out before the product, so that a constant column stays exactly constant
    centred = values - centre
    for start, stop in _chunks(resamples, count):
        drawn = generator.integers(0, count, size=(stop - start, count))
        drawn += np.arange(stop - start)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=(stop - start) * count).reshape(-1, count)
        means[start:stop] = times.astype(np.float64) @ centred
    return np.asarray(centre + means / count)


def interval(means: Values, personas: int, level: float = 0.95) -> tuple[Values, Values]:
    """Bounds (columns,) of the bootstrap interval from bootstrap means (resamples, columns).

    The percentiles are taken a little further out than level says, by the ratio of Student's t to the normal
    distribution: plain percentiles are too narrow for few personas (Hesterberg 2015, 'expanded percentile').
    NaN if there is one persona only.
    """
    if personas < 2:
        nothing = np.full(means.shape[1], np.nan)
        return nothing, nothing
    reach = stats.t.ppf((1 + level) / 2, personas - 1) * np.sqrt(personas / (personas - 1))
    tail = float(stats.norm.sf(reach))
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high


@dataclass(frozen=True)
class Against:
    """A row against another over the same personas, in points: similarity of the other, mean difference, and its 95 %
    interval (NaN for one persona)."""

    name: str
    similarity: float
    difference: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """`better`, `worse`, or `not better` where the interval holds 0 or cannot be known."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not better"


def against(name: str, own: Values, other: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Against:
    """A row's similarity by persona against that of another, of this name, both (personas,) in percent."""
    differences = (own - other)[:, None]
    low, high = interval(bootstrap_means(differences, resamples=resamples, seed=seed), len(own))
    return Against(name, float(other.mean()), float(differences.mean()), float(low[0]), float(high[0]))


def sign_flip_p(differences: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Values:
    """Two-sided p (columns,) of the paired sign-flip test on the mean of differences (personas, columns).

    Under the null hypothesis a persona's difference is as likely to have the other sign. All sign patterns are tried
    where there are no more of them than resamples; otherwise random ones, and the observed one counts as one of them,
    so that p is never 0 (Phipson and Smyth 2010).
    """
    count = differences.shape[0]
    observed = np.abs(differences.sum(axis=0))
    threshold = observed - 1e-9 * np.abs(differences).sum(axis=0)  # equal sums differ by rounding
    if 2**count <= resamples:
        patterns = np.arange(2**count, dtype=np.int64)[:, None] >> np.arange(count)
        sums = (1.0 - 2.0 * (patterns & 1)) @ differences
        return np.asarray((np.abs(sums) >= threshold).mean(axis=0))
    generator = np.random.default_rng([seed, 2])
    as_large = np.zeros(differences.shape[1])
    for start, stop in _chunks(resamples, count):
        bits = generator.integers(0, 2, size=(stop - start, count), dtype=np.int8)
        sums = (1.0 - 2.0 * bits) @ differences
        as_large += (np.abs(sums) >= threshold).sum(axis=0)
    return np.asarray((1 + as_large) / (1 + resamples))


def holm(p_values: Values) -> Values:
    """p values (n,) corrected for the number of tests, step-down (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    remaining = np.arange(len(p_values), 0, -1)
    stepped = np.minimum(np.maximum.accumulate(p_values[order] * remaining), 1.0)
    corrected = np.empty_like(stepped)
    corrected[order] = stepped
    return corrected


def share_improved(differences: Values) -> Chance:
    """Share of personas whose difference (personas,) is above 0, beside the sign-flip null. 0 is no improvement."""
    count = len(differences)
    moved = int(np.count_nonzero(differences))
    low, high = stats.binom.ppf([0.025, 0.975], moved, 0.5) if moved else (0.0, 0.0)
    return Chance(
        float(np.count_nonzero(differences > 0)) / count, moved / 2 / count, float(low) / count, float(high) / count
    )


def regressions(differences: Values, threshold: float) -> Chance:
    """Number of personas whose difference (personas,) is below -threshold, beside the sign-flip null."""
    large = int(np.count_nonzero(np.abs(differences) > threshold))
    low, high = stats.binom.ppf([0.025, 0.975], large, 0.5) if large else (0.0, 0.0)
    return Chance(float(np.count_nonzero(differences < -threshold)), large / 2, float(low), float(high))


def smallest_detectable(differences: Values, alpha: float = 0.05, power: float = 0.8) -> Values:
    """The true mean difference (columns,) that a two-sided test at alpha finds with the given power.

    differences: (personas, columns). NaN if there is one persona only.
    """
    count = differences.shape[0]
    if count < 2:
        return np.full(differences.shape[1], np.nan)
    reach = stats.t.ppf(1 - alpha / 2, count - 1) + stats.t.ppf(power, count - 1)
    return np.asarray(reach * differences.std(axis=0, ddof=1) / np.sqrt(count))


def correlation(first: Values, second: Values) -> float | None:
    """Pearson's correlation of two vectors (n,); None where one of them is constant or n is below 3."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _chunks(resamples: int, count: int) -> Iterator[tuple[int, int]]:
    step = max(1, CELLS_AT_ONCE // count)
    for start in range(0, resamples, step):
        yield start, min(start + step, resamples)
