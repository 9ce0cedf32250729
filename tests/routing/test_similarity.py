"""The most similar by blocks: the same as a full sort, whatever the block; and no personas x experts in memory."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.routing import similarity
from raymerge.routing.similarity import nearest, project, softmax, unit

seeds = st.integers(0, 10_000)


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(1, 500))
def test_blocks_find_what_a_full_sort_finds(seed, queries, keys, k, block):
    dice = np.random.default_rng(seed)
    q, x = unit(dice.normal(size=(queries, 5))), unit(dice.normal(size=(keys, 5)))
    exclude = dice.integers(-1, keys, size=queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "BLOCK", block)
        found = nearest(q, x, k, exclude=exclude)
    for i, near in enumerate(found):
        exact = q[i].astype(np.float64) @ x.T.astype(np.float64)
        order = [j for j in np.argsort(-exact) if j != exclude[i]][:k]
        assert len(near.indices) == len(order)
        np.testing.assert_allclose(near.similarities, exact[order], atol=2e-6)
        np.testing.assert_allclose(exact[near.indices], near.similarities, atol=1e-12)
        assert exclude[i] not in near.indices


@given(seeds, st.floats(0.01, 3.0))
def test_mass_keeps_the_fewest_that_make_it_up(seed, temperature):
    dice = np.random.default_rng(seed)
    q, x = unit(dice.normal(size=(6, 4))), unit(dice.normal(size=(30, 4)))
    exclude = np.array([0, 1, 2, -1, -1, -1])
    for i, near in enumerate(nearest(q, x, 30, exclude=exclude, temperature=temperature, mass=0.9)):
        exact = q[i].astype(np.float64) @ x.T.astype(np.float64)
        if exclude[i] >= 0:
            exact[exclude[i]] = -np.inf
        share = np.sort(softmax(exact, temperature))[::-1]
        kept = len(near.indices)
        assert share[:kept].sum() >= 0.9 - 1e-5
        assert share[: kept - 1].sum() < 0.9 + 1e-5


def test_equal_keys_are_taken_in_order():
    x = unit(np.ones((9, 3)))
    [near] = nearest(x[:1], x, 4, exclude=np.array([1]))
    assert near.indices.tolist() == [0, 2, 3, 4]


@given(seeds)
def test_projection_does_not_depend_on_lengths_and_removes_what_is_common(seed):
    dice = np.random.default_rng(seed)
    x = 5.0 + dice.normal(size=(7, 4))
    mean = similarity.mean_direction(x)
    scaled = x * dice.uniform(0.1, 9.0, size=(7, 1))
    np.testing.assert_allclose(project(scaled, mean), project(x, mean), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(project(x, mean), axis=1), 1.0, atol=1e-6)
    raw = project(x, None)
    assert (raw @ raw.T).min() > 0.5  # without centring everybody is alike
    assert (project(x, mean) @ project(x, mean).T).min() < 0.0


def test_a_zero_vector_is_similar_to_nobody():
    assert project(np.zeros((2, 3)), None).tolist() == [[0.0] * 3] * 2


TWENTY_THOUSAND = """
import resource, numpy as np
from raymerge.routing.embeddings import make_embeddings
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.strategies import route

names = [f"persona_{i:05d}" for i in range(20_000)]
embeddings = make_embeddings(names, np.random.default_rng(0).normal(size=(len(names), 16)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for strategy in ("top_k", "simple_average"):
    table, _ = route(strategy, {}, RoutingInputs(names, names, embeddings))
    print(table.num_rows, len(table.to_bytes()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_twenty_thousand_personas_need_no_square_matrix():
    run = subprocess.run([sys.executable, "-c", TWENTY_THOUSAND], capture_output=True, text=True, check=True)
    nearest_rows, nearest_bytes, average_rows, average_bytes, kib = map(int, run.stdout.split())
    assert (nearest_rows, average_rows) == (100_000, 400_000_000)
    assert max(nearest_bytes, average_bytes) < 4 << 20
    assert kib < 200 << 10  # one byte for each pair would be 381 MiB
