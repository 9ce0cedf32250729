"""Weights and densities that differ by layer and by module."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.merging.settings import checked, depths, unmatched, value_at

PATHS = ["embed_tokens", "layers.0.q_proj", "layers.1.q_proj", "layers.2.v_proj", "layers.4.q_proj", "lm_head"]


def test_depth_runs_from_the_first_layer_to_the_last():
    assert depths(PATHS) == {
        "embed_tokens": 0.0, "layers.0.q_proj": 0.0, "layers.1.q_proj": 0.25, "layers.2.v_proj": 0.5,
        "layers.4.q_proj": 1.0, "lm_head": 1.0,
    }  # fmt: skip


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.floats(0, 1))
def test_a_list_is_interpolated_between_its_ends(values, depth):
    found = value_at(values, "x", depth, 9.0)
    assert min(values) - 1e-12 <= found <= max(values) + 1e-12
    assert value_at(values, "x", 0.0, 9.0) == values[0]
    assert value_at(values, "x", 1.0, 9.0) == values[-1]


def test_a_list_of_three_bends_in_the_middle():
    assert [value_at([0.0, 1.0, 0.0], "x", depth, 9.0) for depth in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]


def test_the_first_pattern_that_fits_counts():
    setting = {"*.v_proj": 0.8, "layers.4.*": [0.0, 1.0], "*": 0.1}
    assert value_at(setting, "layers.2.v_proj", 0.5, 9.0) == 0.8
    assert value_at(setting, "layers.4.q_proj", 1.0, 9.0) == 1.0
    assert value_at(setting, "lm_head", 1.0, 9.0) == 0.1
    assert value_at({"*.v_proj": 0.8}, "lm_head", 1.0, 9.0) == 9.0


def test_a_pattern_that_fits_nothing_is_found():
    assert unmatched({"*.v_proj": 0.8, "*.w_proj": 1.0}, PATHS) == ["*.w_proj"]
    assert unmatched([0.1, 0.2], PATHS) == []


@pytest.mark.parametrize("wrong", [True, "0.5", float("nan"), [], {}, [0.5, 1.5], {"*": [0.5, None]}, None])
def test_a_setting_outside_its_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a share"):
        checked(wrong, lambda value: 0 <= value <= 1, "a share")
