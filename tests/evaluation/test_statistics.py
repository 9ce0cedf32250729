"""Statistics against plain references, scipy, and simulations of what they promise."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from raymerge.evaluation import statistics
from raymerge.evaluation.statistics import (
    bootstrap_means,
    correlation,
    holm,
    interval,
    regressions,
    share_improved,
    sign_flip_p,
    smallest_detectable,
)


def test_bootstrap_interval_agrees_with_scipys() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=(400, 2))
    low, high = interval(bootstrap_means(values, seed=5), 400)
    for column in range(2):
        oracle = stats.bootstrap(
            (values[:, column],), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(1)
        ).confidence_interval
        width = oracle.high - oracle.low
        assert low[column] == pytest.approx(oracle.low, abs=0.04 * width)
        assert high[column] == pytest.approx(oracle.high, abs=0.04 * width)


@pytest.mark.parametrize(("personas", "scale"), [(12, 1.0), (60, 1.0)])
@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_interval_covers_the_truth_as_often_as_it_says(personas: int, scale: float, skewed: bool) -> None:
    generator = np.random.default_rng(personas)
    studies = 600
    shape = (personas, studies)
    values = generator.exponential(scale, shape) - scale if skewed else generator.normal(0, scale, shape)
    low, high = interval(bootstrap_means(values, resamples=2000, seed=1), personas)
    covered = ((low <= 0) & (high >= 0)).mean()
    assert (0.88 if skewed else 0.925) <= covered <= 0.975


def test_the_same_personas_are_drawn_for_all_columns() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    shifted = np.column_stack([values[:, 0], values[:, 0] + 2.5, values[:, 0] * 0 + 7])
    means = bootstrap_means(shifted, resamples=500)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 2.5, atol=1e-12)
    assert (means[:, 2] == 7).all()


def test_chunks_do_not_change_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(40, 2))
    whole = bootstrap_means(values, resamples=300, seed=9)
    whole_p = sign_flip_p(values, resamples=300, seed=9)
    monkeypatch.setattr(statistics, "CELLS_AT_ONCE", 40 * 7)
    np.testing.assert_allclose(bootstrap_means(values, resamples=300, seed=9), whole, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(sign_flip_p(values, resamples=300, seed=9), whole_p)
    assert not np.allclose(bootstrap_means(values, resamples=300, seed=8), whole)


def test_one_persona_has_no_interval() -> None:
    low, high = interval(bootstrap_means(np.array([[3.0]]), resamples=10), 1)
    assert np.isnan(low).all()
    assert np.isnan(high).all()
    assert np.isnan(smallest_detectable(np.array([[3.0]]))).all()


def test_sign_flip_is_exact_for_few_personas() -> None:
    differences = np.round(np.random.default_rng(2).normal(0.4, 1, size=(9, 4)), 1)
    for column, found in enumerate(sign_flip_p(differences)):
        values = differences[:, column]
        sums = [abs(np.dot(signs, values)) for signs in itertools.product([1, -1], repeat=9)]
        assert found == pytest.approx(np.mean(np.array(sums) >= abs(values.sum()) - 1e-9))


def test_sign_flip_agrees_with_scipys_permutation_test() -> None:
    differences = np.random.default_rng(4).normal(0.25, 1, size=(60, 1))
    oracle = stats.permutation_test(
        (differences[:, 0], np.zeros(60)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    )
    assert sign_flip_p(differences)[0] == pytest.approx(oracle.pvalue, abs=0.012)


def test_sign_flip_rejects_a_true_null_as_often_as_it_says() -> None:
    differences = np.random.default_rng(6).standard_t(4, size=(40, 1500))
    p = sign_flip_p(differences, resamples=2000)
    for level in (0.01, 0.05, 0.2):
        assert abs((p <= level).mean() - level) < 3 * np.sqrt(level * (1 - level) / 1500) + 0.001


@given(st.integers(1, 30))
def test_no_difference_has_p_one_and_p_is_never_zero(personas: int) -> None:
    differences = np.column_stack([np.zeros(personas), np.full(personas, 1e6)])
    p = sign_flip_p(differences, resamples=500)
    assert p[0] == 1
    assert p[1] > 0


@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.02, 0.04, 0.3, 0.9, 1.0]), min_size=1, max_size=9))
def test_holm_against_its_definition(values: list[float]) -> None:
    p = np.array(values)
    found = holm(p)
    for alpha in np.linspace(0.0005, 0.9995, 60):
        rejected = set()
        for step, index in enumerate(np.argsort(p, kind="stable")):  # stops at the first that is not rejected
            if p[index] > alpha / (len(p) - step):
                break
            rejected.add(int(index))
        assert rejected == set(np.flatnonzero(found <= alpha).tolist())


def test_holm_of_nothing() -> None:
    assert holm(np.zeros(0)).shape == (0,)


@given(st.lists(st.integers(-30, 30), min_size=1, max_size=10))
def test_chance_is_the_mean_over_all_signs(values: list[int]) -> None:
    differences = np.array(values, dtype=np.float64)
    signs = np.array(list(itertools.product([1, -1], repeat=len(values))))
    flipped = signs * differences
    share, fallen = share_improved(differences), regressions(differences, 10.0)
    assert share.observed == np.mean(differences > 0)
    assert share.expected == pytest.approx((flipped > 0).mean())
    assert fallen.observed == (differences < -10).sum()
    assert fallen.expected == pytest.approx((flipped < -10).sum(axis=1).mean())
    counts = (flipped < -10).sum(axis=1)
    assert np.mean((counts >= fallen.low) & (counts <= fallen.high)) >= 0.95
    shares = (flipped > 0).mean(axis=1)
    assert np.mean((shares >= share.low - 1e-12) & (shares <= share.high + 1e-12)) >= 0.95


@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_the_smallest_detectable_difference_is_found_four_times_in_five(alpha: float) -> None:
    generator = np.random.default_rng(8)
    noise = generator.normal(0, 3, size=(50, 1500))
    true = float(np.mean(smallest_detectable(noise, alpha=alpha)))
    p = stats.ttest_1samp(noise + true, 0).pvalue
    assert (p < alpha).mean() == pytest.approx(0.8, abs=0.04)


def test_correlation_is_scipys_and_unknown_where_nothing_varies() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 30))
    assert correlation(first, second) == pytest.approx(stats.pearsonr(first, second).statistic)
    assert correlation(first, np.ones(30)) is None
    assert correlation(first[:2], second[:2]) is None
