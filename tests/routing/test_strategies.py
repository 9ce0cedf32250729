"""The strategies: laws that hold for any personas, and a plain dense computation as the oracle."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import RoutingError
from raymerge.routing.clusters import Clusters
from raymerge.routing.embeddings import Embeddings, make_embeddings
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.strategies import STRATEGIES, needs_of, resolve_parameters, route

PLAIN = ["simple_average", "cluster_average", "top_k", "sparse_moe", "soft", "hierarchical", "own", "unified",
         "cluster_trained", "base"]  # fmt: skip
SIMILAR = ["top_k", "sparse_moe", "soft", "hierarchical"]
CONTROLS = ["random_k", "random_cluster", "shuffled"]
seeds = st.integers(0, 10_000)


def world(seed=0, people=24, clusters=3, without_adapter=(), dimensions=8) -> RoutingInputs:
    dice = np.random.default_rng(seed)
    names = [f"persona_{i:02d}" for i in range(people)]
    centres = dice.normal(size=(clusters, dimensions))
    own = [i % clusters for i in range(people)]
    vectors = 2.0 + centres[own] + dice.normal(size=(people, dimensions)) * 0.7
    labels = {name: f"cluster_{c:02d}" for name, c in zip(names, own, strict=True)}
    experts = [name for i, name in enumerate(names) if i not in without_adapter]
    return RoutingInputs(names, experts, make_embeddings(names, vectors), clusters=Clusters(labels), seed=seed)


def weights_of(table, inputs):
    """Dense (personas, experts) in the order of the names of `inputs`."""
    column = {name: i for i, name in enumerate(inputs.experts)}
    dense = np.zeros((len(inputs.personas), len(column)))
    for i, name in enumerate(inputs.personas):
        for expert, weight in table.row(name).items():
            dense[i, column[expert]] = weight
    return dense


def all_strategies():
    cases = [(name, {}) for name in PLAIN]
    cases += [("top_k", {"self_weight": 0.3}), ("soft", {"self_weight": "similarity"}), ("sparse_moe", {"k": 3})]
    return cases + [(c, {"of": {"strategy": name}}) for c in CONTROLS for name in PLAIN]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def dense_oracle(inputs, scope, k, temperature, self_weight, centred, mass=1.0):
    """The definition, in float64, one persona at a time, for personas who all have an adapter."""
    x = inputs.embeddings.vectors.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if centred:
        x -= x.mean(axis=0)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = [inputs.clusters.labels[n] for n in inputs.personas]
    result = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        allowed = [j for j in range(len(x)) if scope == "all" or labels[j] == labels[i]]
        if self_weight != "similarity":
            allowed.remove(i)
        s = np.array([x[i] @ x[j] for j in allowed])
        order = np.argsort(-s)
        full = softmax(s / temperature)[order]
        kept = min(k, 1 + int((np.cumsum(full) < mass).sum())) if mass < 1 else k
        order = order[:kept]
        share = 0.0 if self_weight == "similarity" else self_weight
        for j, w in zip(order, softmax(s[order] / temperature), strict=True):
            result[i, allowed[j]] += w * (1 - share)
        result[i, i] += share
    return result


@given(
    seeds, st.sampled_from(["all", "cluster"]), st.integers(1, 6), st.floats(0.02, 2.0),
    st.one_of(st.just("similarity"), st.sampled_from([0.0, 0.25, 1.0])), st.booleans(),
)  # fmt: skip
def test_similarity_routing_is_its_definition(seed, scope, k, temperature, self_weight, centred):
    inputs = world(seed)
    parameters = {"k": k, "temperature": temperature, "self_weight": self_weight, "centred": centred}
    table, notes = route("top_k" if scope == "all" else "sparse_moe", parameters, inputs)
    expected = dense_oracle(inputs, scope, k, temperature, self_weight, centred)
    np.testing.assert_allclose(weights_of(table, inputs), expected, atol=2e-5)
    assert notes == ()


@given(seeds, st.floats(0.02, 1.0), st.sampled_from([0.0, "similarity"]))
def test_soft_takes_as_many_as_make_up_its_mass(seed, temperature, self_weight):
    inputs = world(seed)
    table, _ = route("soft", {"temperature": temperature, "self_weight": self_weight}, inputs)
    expected = dense_oracle(inputs, "all", 99, temperature, self_weight, True, mass=0.99)
    np.testing.assert_allclose(weights_of(table, inputs), expected, atol=2e-5)


def test_soft_has_at_most_256_experts():
    inputs = world(people=300)
    table, _ = route("soft", {"temperature": 50.0}, inputs)
    assert {len(table.row(name)) for name in inputs.personas} == {256}


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.0, 0.4, "similarity"]))
def test_hierarchical_is_its_definition(seed, top_clusters, k, self_weight):
    inputs = world(seed)
    x = inputs.embeddings.vectors.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x -= x.mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = np.array([inputs.clusters.labels[n] for n in inputs.personas])
    centroids = {c: x[labels == c].mean(axis=0) for c in inputs.clusters.names}
    expected = np.zeros((len(x), len(x)))
    for i in range(len(x)):
        near = {c: x[i] @ v / np.linalg.norm(v) for c, v in centroids.items()}
        best = sorted(near, key=lambda c: -near[c])[:top_clusters]
        shares = softmax(np.array([near[c] for c in best]) / 0.1)
        own = 0.0 if self_weight == "similarity" else self_weight
        for c, share in zip(best, shares, strict=True):
            members = [j for j in np.flatnonzero(labels == c) if j != i or self_weight == "similarity"]
            members = sorted(members, key=lambda j: -(x[i] @ x[j]))[:k]
            expected[i, members] += (1 - own) * share * softmax(np.array([x[i] @ x[j] for j in members]) / 0.1)
        expected[i, i] += own
    parameters = {"top_clusters": top_clusters, "k": k, "self_weight": self_weight}
    table, notes = route("hierarchical", parameters, inputs)
    np.testing.assert_allclose(weights_of(table, inputs), expected, atol=2e-5)
    assert notes == ()


@pytest.mark.parametrize(("strategy", "parameters"), all_strategies())
def test_rows_sum_to_one_and_order_and_repetition_change_nothing(strategy, parameters):
    inputs = world(5, without_adapter=(0, 7, 11))
    table, notes = route(strategy, parameters, inputs)
    inner = parameters.get("of", {}).get("strategy", strategy)
    for name in inputs.personas:
        total = sum(table.row(name).values())
        expected = 1.0 if "base" not in inner and (inner != "own" or table.row(name)) else 0.0
        assert total == pytest.approx(expected, abs=1e-12)
    dice = np.random.default_rng(0)
    mixed = replace(
        inputs,
        personas=list(dice.permutation(inputs.personas)),
        experts=list(dice.permutation(inputs.experts)),
        embeddings=make_embeddings(*shuffle(inputs.embeddings, dice)),
        clusters=Clusters(dict(reversed(inputs.clusters.labels.items()))),
    )
    again, notes_again = route(strategy, parameters, mixed)
    assert again.to_bytes() == table.to_bytes()
    assert notes_again == notes


def shuffle(embeddings: Embeddings, dice):
    order = dice.permutation(len(embeddings.names))
    return [embeddings.names[i] for i in order], embeddings.vectors[order]


@given(seeds, st.sampled_from(PLAIN[:6]))
def test_renaming_everybody_renames_the_table_and_changes_nothing_else(seed, strategy):
    inputs = world(seed)
    dice = np.random.default_rng(seed)
    new = {old: f"renamed_{i:02d}" for old, i in zip(inputs.personas, dice.permutation(24), strict=True)}
    renamed = RoutingInputs(
        list(new.values()), list(new.values()),
        make_embeddings(list(new.values()), inputs.embeddings.vectors),
        clusters=Clusters({new[n]: c for n, c in inputs.clusters.labels.items()}),
    )  # fmt: skip
    before, _ = route(strategy, {}, inputs)
    after, _ = route(strategy, {}, renamed)
    for name in inputs.personas:
        expected = {new[e]: w for e, w in before.row(name).items()}
        assert after.row(new[name]) == pytest.approx(expected, abs=1e-6)


@given(seeds, st.sampled_from(SIMILAR), st.floats(0.0, 1.0))
def test_a_persona_has_exactly_its_share(seed, strategy, share):
    table, _ = route(strategy, {"self_weight": share}, world(seed))
    for name in table.personas:
        assert table.row(name).get(name, 0.0) == share
        assert (name in table.row(name)) == (share > 0)


@given(seeds, st.sampled_from(SIMILAR))
def test_a_persona_without_adapter_is_routed_and_contributes_to_nobody(seed, strategy):
    inputs = world(seed, without_adapter=(3, 4))
    table, _ = route(strategy, {"self_weight": 0.5}, inputs)
    for cold in ("persona_03", "persona_04"):
        assert sum(table.row(cold).values()) == pytest.approx(1.0)
        assert cold not in table.experts


def test_equal_rows_are_merged_once():
    inputs = world()
    [everybody] = route("simple_average", {}, inputs)[0].groups()
    assert everybody.adapter == "all"
    assert len(everybody.experts) == len(everybody.personas) == 24
    clusters = route("cluster_average", {}, inputs)[0].groups()
    assert [g.adapter for g in clusters] == ["cluster_00", "cluster_01", "cluster_02"]
    assert all({n for n, _ in g.experts} == set(inputs.clusters.members(g.adapter)) for g in clusters)
    trained = route("cluster_trained", {}, inputs)[0].groups()
    assert [(g.adapter, g.single) for g in trained] == [(f"cluster_0{i}",) * 2 for i in range(3)]
    [unified] = route("unified", {}, inputs)[0].groups()
    assert (unified.adapter, unified.single) == ("unified", "unified")
    own = route("own", {}, inputs)[0].groups()
    assert [(g.adapter, g.single) for g in own] == [(n, n) for n in inputs.personas]
    [base] = route("base", {}, inputs)[0].groups()
    assert (base.adapter, base.experts) == ("base", ())


def test_high_temperature_and_all_of_a_cluster_is_the_cluster_average():
    inputs = world()
    parameters = {"k": 8, "temperature": 1e9, "self_weight": "similarity"}
    table, _ = route("sparse_moe", parameters, inputs)
    average, _ = route("cluster_average", {}, inputs)
    np.testing.assert_allclose(weights_of(table, inputs), weights_of(average, inputs), atol=1e-9)


def test_a_k_larger_than_the_cluster_takes_all_and_says_so():
    inputs = world(people=9)
    table, notes = route("sparse_moe", {"k": 5}, inputs)
    assert {len(table.row(n)) for n in inputs.personas} == {2}
    assert notes == (
        "k = 5 is more than there are to choose from (cluster_00: 2, cluster_01: 2, cluster_02: 2); "
        "all of them contribute",
    )
    assert "all: 8" in route("top_k", {"k": 9}, inputs)[1][0]


def test_a_persona_alone_in_its_cluster_keeps_its_own_adapter():
    inputs = world(people=4, clusters=2)
    alone = replace(inputs, clusters=Clusters({n: "a" if n != "persona_02" else "b" for n in inputs.personas}))
    table, notes = route("sparse_moe", {"k": 2}, alone)
    assert table.row("persona_02") == {"persona_02": 1.0}
    assert "persona_02: has nobody to ask and keeps its own adapter (1 such personas)" in notes
    table, _ = route("sparse_moe", {"k": 2}, replace(alone, experts=[n for n in alone.experts if n != "persona_02"]))
    assert table.row("persona_02") == {}


@given(seeds, st.sampled_from(SIMILAR), st.sampled_from([0.0, 0.3]))
def test_random_experts_get_the_weights_of_what_they_control(seed, strategy, share):
    inputs = world(seed)
    of = {"strategy": strategy, "self_weight": share}
    table, _ = route(strategy, {"self_weight": share}, inputs)
    control, notes = route("random_k", {"of": of}, inputs)
    for name in inputs.personas:
        assert sorted(control.row(name).values()) == pytest.approx(sorted(table.row(name).values()), abs=1e-12)
        assert control.row(name).get(name, 0.0) == share
    assert weights_of(control, inputs).tolist() != weights_of(table, inputs).tolist()
    assert notes == ()


@given(seeds, st.sampled_from(["sparse_moe", "hierarchical", "cluster_average", "cluster_trained", "simple_average"]))
def test_random_cluster_asks_one_other_cluster(seed, strategy):
    inputs = world(seed)
    control, _ = route("random_cluster", {"of": {"strategy": strategy}}, inputs)
    for name in inputs.personas:
        asked = {inputs.clusters.labels.get(expert, expert) for expert in control.row(name)}
        assert len(asked) == 1
        assert asked != {inputs.clusters.labels[name]}
        assert sum(control.row(name).values()) == pytest.approx(1.0)
    if strategy == "cluster_average":
        assert len(control.groups()) == 3


@given(seeds, st.sampled_from(["own", "top_k", "soft"]))
def test_shuffled_gives_every_row_to_somebody_else(seed, strategy):
    inputs = world(seed)
    table, _ = route(strategy, {}, inputs)
    control, _ = route("shuffled", {"of": {"strategy": strategy}}, inputs)
    before = [tuple(table.row(n).items()) for n in inputs.personas]
    after = [tuple(control.row(n).items()) for n in inputs.personas]
    assert sorted(before) == sorted(after)
    assert all(b != a for b, a in zip(before, after, strict=True))  # all rows differ, so this is a derangement


def test_controls_follow_their_seed():
    inputs = world()
    for control in CONTROLS:
        of = {"strategy": "top_k"}
        tables = [route(control, {"of": of, "seed": seed}, inputs)[0].to_bytes() for seed in (0, 0, 1)]
        assert tables[0] == tables[1] != tables[2]


def test_a_control_of_one_row_for_all_says_that_it_changes_nothing():
    table, notes = route("shuffled", {"of": {"strategy": "simple_average"}}, world())
    assert notes == ("all personas have the same row: shuffling changes nothing",)
    assert [g.adapter for g in table.groups()] == ["all"]


def test_centring_is_frozen_where_a_mean_is_given():
    inputs = world()
    part = replace(inputs, personas=inputs.personas[:5])
    mean = np.asarray(
        (inputs.embeddings.vectors / np.linalg.norm(inputs.embeddings.vectors, axis=1, keepdims=True)).mean(axis=0)
    )
    whole, _ = route("top_k", {}, inputs)
    frozen, _ = route("top_k", {}, replace(part, mean=mean))
    refitted, _ = route("top_k", {}, part)
    for name in part.personas:
        assert frozen.row(name) == pytest.approx(whole.row(name), abs=1e-5)
    assert any(refitted.row(n) != pytest.approx(whole.row(n), abs=1e-5) for n in part.personas)


def test_ties_go_to_the_first_name():
    names = list("abcd")
    inputs = RoutingInputs(names, names, make_embeddings(names, np.ones((4, 3))))
    table, _ = route("top_k", {"k": 2, "centred": False}, inputs)
    assert {n: set(table.row(n)) for n in names} == {"a": {*"bc"}, "b": {*"ac"}, "c": {*"ab"}, "d": {*"ab"}}
    assert all(w == 0.5 for n in names for w in table.row(n).values())


@pytest.mark.parametrize(
    ("strategy", "parameters", "message"),
    [
        ("sparse_mo", {}, "unknown strategy 'sparse_mo'. Did you mean sparse_moe?\nAllowed: base, cluster_average"),
        ("top_k", {"temprature": 1}, "unknown parameter 'temprature'. Did you mean temperature?\nAllowed: centred, k"),
        ("base", {"k": 1}, "unknown parameter 'k'.\nAllowed: none."),
        ("top_k", {"k": 0}, "k is 0.\nExpected a whole number, 1 or more."),
        ("top_k", {"k": 2.0}, "k is 2.0"),
        ("top_k", {"k": True}, "k is True"),
        ("soft", {"temperature": 0}, "temperature is 0.\nExpected a number above 0."),
        ("soft", {"temperature": float("nan")}, "temperature is nan"),
        ("soft", {"self_weight": 1.5}, "self_weight is 1.5.\nExpected a number from 0 to 1"),
        ("soft", {"self_weight": "none"}, "self_weight is 'none'"),
        ("soft", {"centred": "yes"}, "centred is 'yes'"),
        ("random_k", {}, "of is None.\nExpected the strategy to control"),
        ("random_k", {"of": {"strategy": "tok_k"}}, "Did you mean top_k"),
        ("random_k", {"of": {"strategy": "top_k", "n": 3}}, "unknown parameter 'n'"),
        ("random_k", {"of": {"strategy": "shuffled", "of": {}}}, "`of` is shuffled, itself a control"),
    ],
)
def test_what_is_unknown_or_impossible_is_refused_with_what_is_allowed(strategy, parameters, message):
    with pytest.raises(RoutingError, match=re.escape(message)):
        route(strategy, parameters, world())


@pytest.mark.parametrize(
    ("changes", "strategy", "message"),
    [
        ({"embeddings": None}, "top_k", "needs embeddings"),
        ({"clusters": None}, "cluster_average", "needs clusters"),
        ({"personas": ["persona_00", "zed"]}, "top_k", "zed: has no embedding (1 such names)"),
        ({"personas": ["persona_00", "zed"]}, "cluster_trained", "clusters: zed is in none (1 such personas)"),
        ({"personas": ["a", "a"]}, "base", "the persona 'a' is given twice"),
        ({"personas": ["cluster_00"]}, "base", "cluster_00: is the name of a persona and of an adapter for many"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, strategy, message):
    with pytest.raises(RoutingError, match=re.escape(message)):
        route(strategy, {}, replace(world(), **changes))


def test_controls_need_somebody_else():
    one = world(people=1, clusters=1)
    with pytest.raises(RoutingError, match="nobody to change rows with"):
        route("shuffled", {"of": {"strategy": "own"}}, one)
    for strategy in ("cluster_average", "own"):
        with pytest.raises(RoutingError, match="there is no other cluster"):
            route("random_cluster", {"of": {"strategy": strategy}}, world(clusters=1))


def test_needs_are_those_of_the_control_and_of_what_it_controls():
    assert needs_of("random_cluster", {"of": {"strategy": "top_k"}}) == {"own", "clusters", "embeddings"}
    assert needs_of("unified", {}) == {"unified"}
    assert resolve_parameters("shuffled", {"of": {"strategy": "sparse_moe", "k": 2}})["of"] == {
        "strategy": "sparse_moe", "k": 2, "temperature": 0.1, "self_weight": 0.0, "centred": True,
    }  # fmt: skip
    assert list(STRATEGIES) == [
        *PLAIN, "learned_router", "named", "hybrid", "selective", "neighbours_trained", "prefix", *CONTROLS,
    ]  # fmt: skip
