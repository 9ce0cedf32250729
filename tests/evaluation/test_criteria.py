"""What was asked is met, or not, only where the whole interval says so."""

import numpy as np
import pytest
from scipy import stats

from raymerge.evaluation.criteria import judge_criteria
from raymerge.evaluation.statistics import bootstrap_means

NAMES = ("soft", "unified", "own")


def criteria(soft: np.ndarray, own: np.ndarray | None = None, *, unified: bool = True, level: float = 0.95):
    """Criteria for differences to unified, points; unified is at 50."""
    rows = [50 + soft, np.full(len(soft), 50.0), 50 + (own if own is not None else np.zeros(len(soft)))]
    scores = np.array(rows)
    means = bootstrap_means(scores.T, resamples=2000)
    found = judge_criteria(
        scores, means, 0, 1 if unified else None, None if own is None else 2, names=NAMES, reference="unified",
        level=level, resamples=2000, seed=0,
    )  # fmt: skip
    return {criterion.name: criterion for criterion in found}


def spread(mean: float, sd: float, count: int = 200) -> np.ndarray:
    """Values of exactly this mean and standard deviation."""
    values = np.random.default_rng(3).normal(size=count)
    return mean + sd * (values - values.mean()) / values.std(ddof=1)


@pytest.mark.parametrize(("mean", "outcome"), [(4.5, "met"), (3.2, "cannot be told"), (1.5, "not met")])
def test_similarity_is_met_above_three_points(mean: float, outcome: str) -> None:
    found = criteria(spread(mean, 8))["similarity"]
    assert found.outcome == outcome
    assert found.value == pytest.approx(mean)
    expected = stats.t.interval(0.95, 199, mean, 8 / np.sqrt(200))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.15)
    assert found.asked == "+3 points"


@pytest.mark.parametrize(("improved", "outcome"), [(156, "met"), (144, "cannot be told"), (110, "not met")])
def test_the_share_improved_is_met_at_seventy_percent(improved: int, outcome: str) -> None:
    found = criteria(np.where(np.arange(200) < improved, 5.0, -1.0))["improved"]
    assert found.outcome == outcome
    assert found.value == improved / 200
    half = 1.96 * np.sqrt(found.value * (1 - found.value) / 200)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.012)


def test_a_persona_that_does_not_move_did_not_improve() -> None:
    assert criteria(np.where(np.arange(200) < 150, 0.0, 5.0))["improved"].value == 0.25


@pytest.mark.parametrize("count", [5, 40])
def test_all_improved_is_as_sure_as_the_number_of_personas_allows(count: int) -> None:
    found = criteria(np.full(count, 5.0))["improved"]
    exact = stats.binomtest(count, count).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.outcome == ("met" if count == 40 else "cannot be told")
    none = criteria(np.full(count, -5.0))["improved"]
    assert none.outcome == "not met"
    assert none.high == pytest.approx(stats.binomtest(0, count).proportion_ci(0.95, "exact").high)


def falls(*which: range) -> np.ndarray:
    difference = np.full(200, 5.0)
    for places in which:
        difference[list(places)] = -20.0
    return difference


@pytest.mark.parametrize(
    ("soft", "own", "outcome"),
    [
        (falls(range(5)), falls(range(40)), "met"),
        (falls(range(40)), falls(range(5)), "not met"),
        (falls(range(8)), falls(), "not met"),
        (falls(range(10)), falls(range(10, 22)), "cannot be told"),
        (falls(range(10)), falls(range(10)), "cannot be told"),
        (falls(), falls(), "cannot be told"),
    ],
)
def test_regressions_are_counted_against_own(soft: np.ndarray, own: np.ndarray, outcome: str) -> None:
    found = criteria(soft, own)["regressions"]
    assert found.outcome == outcome
    assert found.value == (soft < -10).sum() - (own < -10).sum()
    assert found.low <= found.value <= found.high


def test_regressions_are_paired() -> None:
    """The same personas falling in both rows say nothing of a difference; others add to its spread."""
    same = criteria(falls(range(40)), falls(range(45)))["regressions"]
    other = criteria(falls(range(40)), falls(range(100, 145)))["regressions"]
    assert same.value == other.value == -5
    assert same.high - same.low < 0.5 * (other.high - other.low)


def test_a_wider_level_is_harder_to_meet() -> None:
    usual, wide = criteria(spread(4.3, 8)), criteria(spread(4.3, 8), level=0.999)
    assert usual["similarity"].outcome == "met"
    assert wide["similarity"].outcome == "cannot be told"
    assert wide["similarity"].level == 0.999


def test_missing_rows_are_named() -> None:
    without_own = criteria(spread(5, 8))
    assert without_own["regressions"].said == "needs the row own, which is not here"
    assert without_own["similarity"].outcome == "met"
    assert without_own["regressions"].outcome == "cannot be told"
    for criterion in criteria(spread(5, 8), unified=False).values():
        assert criterion.said == "needs the row unified, which is not here"
        assert criterion.value is None


def test_one_persona_cannot_be_told() -> None:
    assert {c.outcome for c in criteria(np.array([9.0]), np.array([-20.0])).values()} == {"cannot be told"}
