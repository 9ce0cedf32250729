"""Exact places of a sorted matrix, from tiles of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.merging import thresholds
from raymerge.merging.thresholds import largest


def tiles_of(values, rows, seen=None):
    def tiles():
        if seen is not None:
            seen.append(1)
        buffer = torch.empty(rows, values.shape[1], dtype=values.dtype)
        for part in values.split(rows):
            yield buffer[: len(part)].copy_(part)  # as the real ones do: each overwrites the one before

    return tiles


def sorted_down(values):
    return values.flatten().sort(descending=True).values


@given(
    st.integers(0, 1000), st.sampled_from([torch.float32, torch.float64]), st.floats(0, 1), st.floats(0, 1),
    st.booleans(), st.integers(1, 40),
)  # fmt: skip
def test_places_are_exact(seed, dtype, first, second, sampled, rows):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(60, 50, generator=generator, dtype=dtype).abs()
    values[values < 0.1] = 0.0  # many that are equal
    values[values > 1.5] = 1.5
    places = [max(round(share * 3000), 1) for share in (first, second)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "FEW", 0)
        sample = values.flatten()[torch.randint(3000, (400,), generator=generator)] if sampled else None
        found = largest(tiles_of(values, rows), 3000, places, sample)
    assert found == [float(sorted_down(values)[place - 1]) for place in places]


@pytest.mark.parametrize("place", [1, 200_000, 600_000])
def test_a_bracket_collects_few_and_one_pass_is_enough(place, monkeypatch):
    values = torch.randn(600, 1000, generator=torch.Generator().manual_seed(0)).abs()
    sample = values.flatten()[torch.randint(600_000, (2**14,), generator=torch.Generator().manual_seed(1))]
    collected, seen = [], []
    concatenate = np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda parts: collected.append(sum(map(len, parts))) or concatenate(parts))
    assert largest(tiles_of(values, 64, seen), 600_000, [place], sample) == [float(sorted_down(values)[place - 1])]
    assert len(seen) == 1
    assert sum(collected) < 25_000


@pytest.mark.parametrize("shift", [0.0, 10.0], ids=["too small", "too large"])
@pytest.mark.parametrize("place", [30_000, 150_000, 290_000])
def test_a_sample_that_misleads_costs_a_pass_and_no_more(place, shift):
    values = torch.rand(300, 1000, generator=torch.Generator().manual_seed(0)) + 1
    sample = torch.full((1000,), shift)
    seen = []
    assert largest(tiles_of(values, 64, seen), 300_000, [place], sample) == [float(sorted_down(values)[place - 1])]
    assert len(seen) == 2


@pytest.mark.parametrize("place", [1999, 2000, 2001])
def test_the_last_value_above_a_bracket_and_the_first_below_it(place, monkeypatch):
    monkeypatch.setattr(thresholds, "FEW", 0)
    values = torch.arange(1.0, 3001.0).reshape(60, 50)
    sample = torch.full((1000,), 1000.5)  # 2000 values are larger
    assert largest(tiles_of(values, 7), 3000, [place], sample) == [3001.0 - place]
