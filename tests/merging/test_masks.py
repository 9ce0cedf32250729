"""Random numbers that depend on what they are for alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.merging.masks import ROWS, WHOLE, Draw


@given(st.lists(st.integers(1, 150), min_size=1, max_size=5), st.sampled_from([1, 3, 8, 37]))
def test_numbers_do_not_depend_on_how_rows_are_grouped(heights, columns):
    draw = Draw.of(3, "anna", "layers.0.q")
    stops = np.cumsum(heights).tolist()
    parts = [draw.numbers(slice(a, b), columns) for a, b in zip([0, *stops], stops, strict=False)]
    assert np.array_equal(np.concatenate(parts), draw.numbers(slice(0, stops[-1]), columns))


def test_numbers_depend_on_seed_expert_module_and_tile():
    rows = slice(0, ROWS)
    drawn = [Draw.of(*what).numbers(rows, 16) for what in ((0, "a", "m"), (1, "a", "m"), (0, "b", "m"), (0, "a", "n"))]
    drawn.append(Draw.of(0, "a", "m").numbers(slice(ROWS, 2 * ROWS), 16))
    assert len({numbers.tobytes() for numbers in drawn}) == len(drawn)
    assert np.array_equal(drawn[0], Draw.of(0, "a", "m").numbers(rows, 16))


def test_a_name_with_the_separator_of_another_is_another():
    assert Draw.of(1, "ab", "c") != Draw.of(1, "a", "bc")
    assert Draw.of(1, "1", "c") != Draw.of(11, "", "c")


def test_the_draw_of_a_seed_is_the_same_on_every_machine():
    first = Draw.of(7, "anna", "layers.0.q").numbers(slice(0, 1), 4)
    assert first.tolist() == [[1957498021, 1782907733, 3642751862, 2024990845]]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_numbers_are_evenly_distributed(share):
    numbers = Draw.of(0, "a", "m").numbers(slice(0, 1000), 500)
    error = float((numbers < share * WHOLE).mean()) - share
    assert abs(error) < 5 * np.sqrt(share * (1 - share) / numbers.size)
    neighbours = np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(numbers.size)
