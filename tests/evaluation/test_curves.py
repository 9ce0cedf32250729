"""Training curves keep the mean of the losses, whatever the number of steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.evaluation.curves import curve_of, thin_losses

LOSSES = st.lists(st.floats(0, 10), min_size=1, max_size=300)


@given(LOSSES)
def test_the_mean_loss_stays(losses: list[float]) -> None:
    thin = thin_losses(losses)
    assert thin.training.mean() == pytest.approx(np.mean(losses), abs=1e-9)
    assert thin.training.min() >= min(losses) - 1e-9
    assert thin.training.max() <= max(losses) + 1e-9
    assert thin.steps == len(losses)


@given(LOSSES, st.integers(2, 4))
def test_a_loss_that_lasts_longer_is_the_same_curve(losses: list[float], times: int) -> None:
    assert thin_losses(np.repeat(losses, times)).training == pytest.approx(thin_losses(losses).training, abs=1e-9)


def test_sixty_steps_are_kept_as_they_are() -> None:
    losses = np.random.default_rng(0).random(60)
    assert thin_losses(losses).training == pytest.approx(losses)
    assert thin_losses(losses).validation is None
    assert thin_losses([]) is None


def test_validation_begins_where_it_was_first_measured() -> None:
    thin = thin_losses([1.0] * 100, [(50, 2.0), (100, 1.0)], points=10)
    assert np.isnan(thin.validation[:4]).all()
    assert thin.validation[4:].tolist() == pytest.approx([2.0, 1.9, 1.7, 1.5, 1.3, 1.1])


def test_the_band_holds_the_middle_of_the_adapters() -> None:
    trainings = [thin_losses([level] * 20) for level in np.linspace(0, 1, 11)]
    trainings.append(thin_losses([0.5] * 40, [(40, 3.0)]))
    curve = curve_of("persona", trainings)
    assert (curve.adapters, curve.steps) == (12, (20, 40))
    assert curve.mean == pytest.approx(np.full(60, 0.5))
    levels = [*np.linspace(0, 1, 11), 0.5]
    assert curve.low == pytest.approx(np.full(60, np.quantile(levels, 0.1)))
    assert curve.high == pytest.approx(np.full(60, np.quantile(levels, 0.9)))
    assert curve.validation[-1] == 3.0  # of the one that has it
    assert np.isnan(curve.validation[0])
    assert curve.share[0] == pytest.approx(1 / 120)
