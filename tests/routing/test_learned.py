"""The strategy `learned_router`: laws of its rows, what it is before training, and sizes."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import RoutingError
from raymerge.routing.clusters import Clusters
from raymerge.routing.embeddings import make_embeddings
from raymerge.routing.strategies import needs_of, route
from tests.routing.routers import drawn_router
from tests.routing.test_strategies import shuffle, weights_of, world

seeds = st.integers(0, 10_000)
shapes = st.fixed_dictionaries(
    {
        "network": st.sampled_from(["bilinear", "mlp"]),
        "weighting": st.sampled_from(["entmax", "softmax"]),
        "scope": st.sampled_from(["all", "cluster"]),
        "candidates": st.integers(1, 30),
        "temperature": st.floats(0.05, 1.0),
        "max_in_degree": st.sampled_from([None, 1, 3, 7]),
    }
)
COLD = ("persona_03", "persona_04")


@given(seeds, shapes, st.integers(1, 9), st.floats(0.3, 3.0), st.sampled_from([0.0, 0.25]))
def test_rows_keep_what_the_router_s_shape_promises(seed, shape, k, temperature, self_weight):
    inputs = world(seed, without_adapter=(3, 4))
    inputs = replace(inputs, router=drawn_router(inputs, seed, **shape))
    parameters = {"k": k, "temperature": temperature, "self_weight": self_weight}
    table, notes = route("learned_router", parameters, inputs)
    alone = any("has nobody to ask" in note for note in notes)
    served = dict.fromkeys(inputs.experts, 0)
    for name in inputs.personas:
        row = table.row(name)
        others = row.keys() - {name}
        assert len(others) <= min(k, shape["candidates"])
        assert sum(row.values()) == pytest.approx(1.0 if row else 0.0, abs=1e-12)
        assert all(weight > 0 for weight in row.values())
        assert row or alone
        own = self_weight if others else 1.0
        assert row.get(name, 0.0) == (own if name in inputs.experts else 0.0)
        for other in others:
            served[other] += 1
            assert shape["scope"] == "all" or inputs.clusters.labels[other] == inputs.clusters.labels[name]
    assert shape["max_in_degree"] is None or max(served.values()) <= shape["max_in_degree"]
    dice = np.random.default_rng(seed)
    mixed = replace(
        inputs,
        personas=list(dice.permutation(inputs.personas)),
        experts=list(dice.permutation(inputs.experts)),
        embeddings=make_embeddings(*shuffle(inputs.embeddings, dice)),
        clusters=Clusters(dict(reversed(inputs.clusters.labels.items()))),
    )
    again, notes_again = route("learned_router", parameters, mixed)
    assert again.to_bytes() == table.to_bytes()
    assert notes_again == notes


@given(seeds, st.integers(1, 9), st.floats(0.02, 2.0), st.sampled_from([0.0, 0.4]), st.sampled_from(["all", "cluster"]))
def test_before_training_it_is_the_k_most_similar(seed, k, temperature, self_weight, scope):
    inputs = world(seed, without_adapter=(3, 4))
    shape = {"weighting": "softmax", "temperature": temperature, "scope": scope}
    inputs = replace(inputs, router=drawn_router(inputs, seed, spread=0.0, **shape))
    table, notes = route("learned_router", {"k": k, "self_weight": self_weight}, inputs)
    similar = {"k": k, "temperature": temperature, "self_weight": self_weight}
    expected, expected_notes = route("top_k" if scope == "all" else "sparse_moe", similar, inputs)
    assert weights_of(table, inputs) == pytest.approx(weights_of(expected, inputs), abs=1e-6)
    assert table.to_arrow()["similarity"].to_numpy() == pytest.approx(
        expected.to_arrow()["similarity"].to_numpy(), abs=1e-6
    )
    assert notes == expected_notes


def test_what_it_learned_and_its_temperature_change_the_weights():
    inputs = world()
    tables = [
        route("learned_router", {"k": 5, "temperature": t}, replace(inputs, router=router))[0]
        for spread, t in ((0.0, 1.0), (1.0, 1.0), (1.0, 3.0))
        for router in [drawn_router(inputs, 0, spread, weighting="entmax")]
    ]
    first, learned, even = (weights_of(table, inputs) for table in tables)
    assert np.abs(learned - first).max() > 0.1
    assert (even > 0).sum() > (learned > 0).sum()  # entmax of smaller differences reaches further
    assert even.max(axis=1).mean() < learned.max(axis=1).mean()


@given(seeds)
def test_somebody_who_never_had_an_adapter_gets_what_the_others_know(seed):
    inputs = world(seed, without_adapter=(3, 4))
    inputs = replace(inputs, router=drawn_router(inputs, seed))
    table, notes = route("learned_router", {"k": 9, "self_weight": 0.3}, inputs)
    alone, _ = route("learned_router", {"k": 9, "self_weight": 0.3}, replace(inputs, personas=COLD))
    for cold in COLD:
        assert sum(table.row(cold).values()) == pytest.approx(1.0)
        assert cold not in table.experts
        assert alone.row(cold) == pytest.approx(table.row(cold), abs=1e-5)  # the mean is the router's, not theirs
    assert notes == ()


def test_an_expert_that_it_never_saw_contributes_where_the_network_can_judge_it():
    inputs = world(without_adapter=(3,))
    everybody = replace(inputs, experts=inputs.personas)
    bilinear = replace(everybody, router=drawn_router(inputs, 2))
    table, notes = route("learned_router", {"k": 9}, bilinear)
    assert "persona_03" in table.experts
    assert notes == ()
    mlp = drawn_router(inputs, 2, network="mlp")
    table, notes = route("learned_router", {"k": 9}, replace(everybody, router=mlp))
    assert notes == (
        "persona_03: the router (mlp) has not seen it and it contributes to nobody but itself (1 such experts)",
    )
    without, _ = route("learned_router", {"k": 9}, replace(inputs, router=mlp))
    np.testing.assert_allclose(weights_of(table, everybody), weights_of(without, everybody), atol=1e-12)
    fewer = replace(inputs, experts=inputs.experts[5:], router=mlp)
    table, _ = route("learned_router", {"k": 9}, fewer)
    assert set(table.experts) <= set(fewer.experts)  # outputs of experts that are gone are nobody's


def test_a_limit_that_nobody_reaches_changes_nothing():
    inputs = world()
    limits = (None, len(inputs.personas), 5)
    routers = [drawn_router(inputs, weighting="softmax", max_in_degree=most) for most in limits]
    free, loose, tight = (route("learned_router", {"k": 4}, replace(inputs, router=one))[0] for one in routers)
    assert loose.to_bytes() == free.to_bytes() != tight.to_bytes()


def test_where_nobody_is_left_the_own_adapter_stays():
    inputs = world(people=6, clusters=1, without_adapter=(5,))
    inputs = replace(inputs, router=drawn_router(inputs, 0, 0.0, max_in_degree=1, weighting="softmax", temperature=1.0))
    table, notes = route("learned_router", {"k": 5}, inputs)
    asked = [set(table.row(name)) - {name} for name in inputs.personas]
    assert sorted(name for names in asked for name in names) == sorted(inputs.experts)
    [note] = [note for note in notes if "nobody to ask" in note]
    kept = [name for name, names in zip(inputs.personas, asked, strict=True) if not names]
    assert note.startswith(f"{kept[0]}: ")
    assert kept
    for name in kept:
        assert table.row(name) == ({name: 1.0} if name in inputs.experts else {})


def test_without_any_adapter_everybody_gets_the_base():
    inputs = world(people=3)
    for shape in ({}, {"max_in_degree": 2, "weighting": "softmax"}, {"network": "mlp"}):
        nobody = replace(inputs, experts=[], router=drawn_router(inputs, **shape))
        table, _ = route("learned_router", {}, nobody)
        assert [table.row(name) for name in inputs.personas] == [{}] * 3


def test_a_k_larger_than_its_candidates_takes_all_and_says_so():
    inputs = world()
    _, notes = route("learned_router", {"k": 9}, replace(inputs, router=drawn_router(inputs, candidates=6)))
    assert notes == ("k = 9 is more than there are to choose from (all: 6); all of them contribute",)


def test_its_control_has_the_same_weights_on_random_experts():
    inputs = world()
    inputs = replace(inputs, router=drawn_router(inputs))
    parameters = {"k": 4, "self_weight": 0.2}
    table, _ = route("learned_router", parameters, inputs)
    control, _ = route("random_k", {"of": {"strategy": "learned_router", **parameters}}, inputs)
    for name in inputs.personas:
        assert sorted(control.row(name).values()) == pytest.approx(sorted(table.row(name).values()), abs=1e-12)
    assert weights_of(control, inputs).tolist() != weights_of(table, inputs).tolist()


def test_what_it_needs_and_refuses():
    inputs = world()
    assert needs_of("learned_router", {}) == {"own", "embeddings", "clusters"}
    cases = [
        ({"self_weight": "similarity"}, inputs, "self_weight is 'similarity'.\nExpected a number from 0 to 1"),
        ({"router": 3}, inputs, "router is 3.\nExpected the folder of a trained router."),
        ({}, inputs, "there is no router.\n`raymerge router PROJECT` trains one."),
        ({}, replace(inputs, router=drawn_router(world(dimensions=5))),
         "was trained on embeddings of 5 numbers, and these have 8."),
        ({}, replace(inputs, router=drawn_router(inputs), clusters=None), "needs clusters"),
        ({}, replace(inputs, router=drawn_router(inputs, spread=1e30)),
         "the router's scores for persona_00 are not finite"),
    ]  # fmt: skip
    for parameters, where, message in cases:
        with pytest.raises(RoutingError) as error:
            route("learned_router", parameters, where)
        assert message in str(error.value)


LARGE = """
import resource, sys, time
from dataclasses import replace
import numpy as np
import torch
from raymerge.routing.clusters import Clusters
from raymerge.routing.embeddings import make_embeddings
from raymerge.routing.inputs import RoutingInputs, make_space
from raymerge.routing.learned import learned_scores
from raymerge.routing.router import Candidates, Router, RouterShape, make_network

names = [f"persona_{i:05d}" for i in range(10_000)]
dice = np.random.default_rng(0)
embeddings = make_embeddings(names, dice.normal(size=(len(names), 384)))
shape = RouterShape(network=sys.argv[1], experts=tuple(names) if sys.argv[1] == "mlp" else ())
router = Router(shape, make_network(shape, 0), np.zeros(384, np.float32))
space, _ = make_space(RoutingInputs(names, names, embeddings, Clusters(dict.fromkeys(names, "all_of_them"))), True)
found = Candidates(
    dice.integers(0, len(names), (len(names), 64)),
    dice.uniform(size=(len(names), 64)).astype(np.float32),
    np.ones((len(names), 64), dtype=bool),
)
few = Candidates(found.experts[:300], found.near[:300], found.same[:300])
learned_scores(router, replace(space, personas=space.personas[:300], queries=space.queries[:300]), few)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 200_000_000, taken + 200_000_000))
start = time.process_time()
said = learned_scores(router, space, found)
print(time.process_time() - start)
assert said.shape == (10_000, 64) and np.isfinite(said).all()
try:
    square = np.ones((len(names), len(names)), dtype=np.float32)
except MemoryError:
    print("no room")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("network", ["bilinear", "mlp"])
def test_scores_of_ten_thousand_personas_are_quick_and_need_no_square_matrix(network):
    ran = subprocess.run([sys.executable, "-c", LARGE, network], capture_output=True, text=True, check=True)
    seconds, square = ran.stdout.splitlines()
    assert float(seconds) < 10
    assert square == "no room"  # so there was none for one among the scores either


def test_who_only_reads_about_strategies_does_not_wait_for_torch():
    code = "import sys, raymerge.routing.strategies; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
