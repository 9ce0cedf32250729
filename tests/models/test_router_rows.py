"""Shards and steps of a router's training: nobody is left out, nothing is too much, and draws repeat."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import ModelError
from raymerge.models.router_rows import Shard, cut_shards, steps_of_epoch


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 6), st.integers(0, 10), st.integers(0, 9))
def test_each_persona_has_all_of_its_candidates_in_its_shard(
    personas: int, experts: int, candidates: int, spare: int, seed: int
) -> None:
    dice = np.random.default_rng(seed)
    candidates = min(candidates, experts)
    chosen = np.array([dice.permutation(experts)[:candidates] for _ in range(personas)])
    chosen[dice.random(chosen.shape) < 0.2] = -1
    learning = np.flatnonzero((chosen >= 0).any(1) & (dice.random(personas) < 0.8))
    shards = cut_shards(chosen, learning, candidates + spare)
    assert sorted(p for shard in shards for p in shard.personas.tolist()) == learning.tolist()
    for shard in shards:
        assert shard.personas.tolist() == sorted(shard.personas.tolist())
        asked = chosen[shard.personas]
        assert np.array_equal(shard.experts, np.unique(asked[asked >= 0]))
        assert len(shard.experts) <= candidates + spare
    (whole,) = cut_shards(chosen, learning, None)
    assert whole.personas.tolist() == learning.tolist()


def test_those_who_share_their_candidates_meet() -> None:
    groups = np.arange(60) % 6
    dice = np.random.default_rng(0)
    chosen = np.array([group * 20 + dice.permutation(20)[:8] for group in groups])
    shards = cut_shards(chosen, np.arange(60), 40)
    assert len(shards) == 3
    assert all(len(set(groups[shard.personas])) == 2 for shard in shards)
    with pytest.raises(ModelError, match=r"the 8 candidates of one persona .* room for 7 experts in router\.exp"):
        cut_shards(chosen, np.arange(60), 7)


@given(
    st.lists(st.integers(0, 13), min_size=2, max_size=20).filter(lambda rows: max(rows) > 0),
    st.integers(1, 7), st.integers(1, 5), st.integers(0, 3), st.integers(0, 5),
)  # fmt: skip
def test_an_epoch_takes_every_row_once(rows: list[int], together: int, height: int, seed: int, epoch: int) -> None:
    half = len(rows) // 2
    shards = [Shard(np.arange(half), np.arange(3)), Shard(np.arange(half, len(rows)), np.arange(2, 6))]
    steps = steps_of_epoch(shards, rows, together, height, seed, epoch)
    taken = sorted((p, rank) for step in steps for p, ranks in step.taken for rank in ranks.tolist())
    assert taken == [(p, rank) for p, count in enumerate(rows) for rank in range(count)]
    for step in steps:
        personas = [p for p, _ in step.taken]
        assert len(set(personas)) == len(personas) <= together
        assert set(personas) <= set(shards[step.shard].personas.tolist())
        assert max(len(ranks) for _, ranks in step.taken) <= height
    visited = [step.shard for step in steps]
    assert sum(one != other for one, other in itertools.pairwise(visited)) <= 1  # each shard once
    assert len(steps_of_epoch(shards, rows, together, height, seed, epoch + 1)) == len(steps)


def test_company_changes_from_epoch_to_epoch_and_the_seed_decides_it() -> None:
    shards = [Shard(np.arange(12), np.arange(3))]

    def company(seed: int, epoch: int) -> list[list[int]]:
        return [[p for p, _ in step.taken] for step in steps_of_epoch(shards, [4] * 12, 4, 2, seed, epoch)]

    assert company(0, 0) == company(0, 0)
    assert company(0, 0) != company(0, 1)
    assert company(0, 0) != company(1, 0)
