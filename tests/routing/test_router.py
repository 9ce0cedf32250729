"""The router's parts: the published entmax, gradients against finite differences, who may be asked, and its files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge import storage
from raymerge.errors import RoutingError
from raymerge.manifest import invalidate, write_artefact
from raymerge.routing.entmax import entmax
from raymerge.routing.inputs import check_inputs, make_space
from raymerge.routing.learned import learned_scores
from raymerge.routing.router import (
    RouterShape,
    allow,
    choose,
    encode_router,
    find_candidates,
    make_network,
    read_router,
    scores,
)
from tests.routing.routers import drawn_router
from tests.routing.test_strategies import softmax, world

seeds = st.integers(0, 10_000)
WEIGHTINGS = ["entmax", "softmax"]


def draw(seed, *shape, spread=1.5):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * spread)


@given(seeds, st.integers(1, 5), st.integers(1, 40), st.floats(0.01, 30.0))
def test_entmax_and_its_gradient_are_the_published_library_s(seed, rows, columns, spread):
    published = pytest.importorskip("entmax").entmax15
    ours = draw(seed, rows, columns, spread=spread).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    upstream = draw(seed + 1, rows, columns)
    entmax(ours).backward(upstream)
    published(theirs, dim=-1).backward(upstream)
    torch.testing.assert_close(entmax(ours), published(theirs, dim=-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-9)


@given(seeds, st.sampled_from([torch.float32, torch.float64]))
def test_whom_entmax_is_not_offered_changes_nothing_and_gets_nothing(seed, dtype):
    values = draw(seed, 3, 9).to(dtype)
    there = draw(seed + 1, 3, 9) > 0
    there[0] = False
    offered = values.masked_fill(~there, -torch.inf).requires_grad_()
    weights = entmax(offered)
    for row in (1, 2):
        if there[row].any():
            torch.testing.assert_close(weights[row][there[row]], entmax(values[row][there[row]]))
    assert weights.dtype == dtype
    assert not weights[~there].any()
    weights.sum().backward()
    assert offered.grad.isfinite().all()
    assert not offered.grad[~there].any()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("k", [1, 3, 12])
def test_gradients_of_weights_are_finite_differences(weighting, k):
    values = draw(7, 4, 9, spread=0.7)
    values[1, 2] = values[3, 5:] = -torch.inf
    allowed = torch.ones(4, 9, dtype=torch.bool)
    allowed[0, :2] = False
    there = torch.isfinite(values)
    real = values[there].requires_grad_()

    def weights(given):
        placed = torch.full_like(values, -torch.inf).masked_scatter(there, given)
        return choose(placed, k, weighting, allowed)[1]

    assert torch.autograd.gradcheck(weights, (real,))


class _Scores(torch.nn.Module):
    """`scores` as a module, whose parameters can be given from outside."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *parts):
        return scores(self.network, *parts)


@pytest.mark.parametrize("network", ["bilinear", "mlp"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradients_of_the_network_are_finite_differences(network, weighting):
    inputs = world(2, people=9, without_adapter=(4,))
    router = drawn_router(inputs, 3, 0.4, network=network, candidates=6, k=4, temperature=0.4)
    space, _ = make_space(check_inputs(inputs), True)
    found = find_candidates(space, router.shape)
    parts = [torch.from_numpy(one) for one in (space.queries, space.keys, found.experts, found.near, found.same)]
    parts = [one.double() if one.is_floating_point() else one for one in parts]
    layout = {f"network.{name}": value.double().requires_grad_() for name, value in router.network.state_dict().items()}
    whole = _Scores(router.network)

    def weights(*given):
        said = torch.func.functional_call(whole, dict(zip(layout, given, strict=True)), tuple(parts))
        return choose(said, 4, weighting)[1]

    assert torch.autograd.gradcheck(weights, tuple(layout.values()))


@given(seeds, st.integers(1, 12), st.sampled_from(WEIGHTINGS))
def test_weights_are_those_of_all_candidates_cut_to_the_best(seed, k, weighting):
    values = draw(seed, 5, 10)
    allowed = draw(seed + 1, 5, 10) > -0.5
    allowed[0] = False
    places, weights = choose(values, k, weighting, allowed)
    assert places.shape == weights.shape == (5, min(k, 10))
    for row in range(1, 5):
        names = np.flatnonzero(allowed[row].numpy())
        one = values[row, names]
        whole = entmax(one).numpy() if weighting == "entmax" else softmax(one.numpy())
        best = np.argsort(-one.numpy())[:k]
        expected = dict(zip(names[best].tolist(), whole[best] / whole[best].sum(), strict=True))
        got = dict(zip(places[row].tolist(), weights[row].tolist(), strict=True))
        assert {p: w for p, w in got.items() if w > 0} == pytest.approx({p: w for p, w in expected.items() if w > 0})
    assert weights[0].tolist() == [0.0] * min(k, 10)


def test_equal_scores_go_to_the_first():
    places, weights = choose(torch.zeros(2, 70), 3, "softmax")
    assert places.tolist() == [[0, 1, 2]] * 2
    assert weights.tolist() == [[pytest.approx(1 / 3)] * 3] * 2


def test_weights_of_scores_that_are_no_numbers_are_none():
    values = torch.tensor([[0.0, torch.nan, 1.0]])
    for weighting in WEIGHTINGS:
        assert choose(values, 2, weighting)[1].isnan().any()


@given(seeds, st.sampled_from(["all", "cluster"]), st.integers(1, 30), st.sets(st.integers(0, 17), max_size=6))
def test_candidates_are_the_most_similar_of_the_scope_without_the_own(seed, scope, count, without):
    inputs = check_inputs(world(seed, people=18, without_adapter=without))
    space, _ = make_space(inputs, True)
    found = find_candidates(space, RouterShape(size=8, candidates=count, scope=scope))
    labels = inputs.clusters.labels
    assert found.experts.shape == (18, min(count, 18 - len(without)))
    for i, name in enumerate(space.personas):
        others = [
            j for j, expert in enumerate(space.experts)
            if expert != name and (scope == "all" or labels[expert] == labels[name])
        ]  # fmt: skip
        near = space.queries[i].astype(np.float64) @ space.keys.T.astype(np.float64)
        expected = sorted(others, key=lambda j: -near[j])[:count]
        there = found.experts[i] >= 0
        assert found.experts[i][there].tolist() == expected
        np.testing.assert_allclose(found.near[i][there], near[expected], atol=1e-6)
        assert found.same[i][there].tolist() == [labels[space.experts[j]] == labels[name] for j in expected]
        assert not found.same[i][~there].any()


@pytest.mark.parametrize("network", ["bilinear", "mlp"])
def test_scores_are_their_definition(network):
    inputs = check_inputs(world(4, people=12, without_adapter=(3,)))
    known = tuple(reversed([name for name in inputs.experts if name != "persona_07"]))
    router = drawn_router(inputs, 1, network=network, candidates=5, **({"experts": known} if network == "mlp" else {}))
    space, _ = make_space(inputs, True)
    found = find_candidates(space, router.shape)
    said = learned_scores(router, space, found)
    p = {name: value.detach().double().numpy() for name, value in router.network.named_parameters()}
    for i, query in enumerate(space.queries.astype(np.float64)):
        for j, expert in enumerate(found.experts[i]):
            key = space.keys[expert].astype(np.float64)
            if network == "bilinear":
                expected = query @ key / 0.1 + (p["U"] @ query) @ (p["V"] @ key) + p["b"] * found.same[i, j]
            else:
                x = torch.from_numpy(p["W_in"] @ query + p["b_in"])
                hidden = torch.nn.functional.gelu(x).numpy()
                expected = (p["W_out"] @ hidden + p["b_out"])[known.index(space.experts[expert])]
            assert said[i, j] == pytest.approx(expected, abs=1e-4)
    assert ("persona_07" in {space.experts[e] for e in found.experts.ravel()}) == (network == "bilinear")


@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_an_expert_serves_no_more_than_it_may_and_nobody_is_passed_over_without_need(seed, k, most):
    dice = np.random.default_rng(seed)
    experts = np.array([dice.permutation(8) for _ in range(9)])[:, :6]
    experts[dice.random(experts.shape) < 0.15] = -1
    values = np.where(experts >= 0, dice.normal(size=experts.shape), -np.inf)
    allowed = allow(values, experts, k, most)
    served = np.bincount(experts[allowed], minlength=8)
    assert served.max() <= most
    assert allowed.sum(axis=1).max() <= k
    assert not allowed[experts < 0].any()
    shares = np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
    for i, j in zip(*np.nonzero((experts >= 0) & ~allowed), strict=True):
        better = allowed & (shares > shares[i, j])
        full = better[i].sum() == k or better[experts == experts[i, j]].sum() == most
        assert full, "a pair was passed over while there was room"


def test_a_router_is_read_as_it_was_written(tmp_path):
    for network in ("bilinear", "mlp"):
        router = drawn_router(world(), 5, network=network, max_in_degree=3)
        files = encode_router(router)
        folder = str(tmp_path / network)
        config = {**json.loads(files["router.json"]), "history": [1.0]}
        written = {**files, "router.json": storage.encode_json(config)}
        write_artefact(folder, written, {}, "key")
        again = read_router(folder)
        assert encode_router(again) == files
        assert (again.shape, again.scale, again.layers) == (router.shape, router.scale, router.layers)
        np.testing.assert_array_equal(again.mean, router.mean)


def test_a_network_follows_its_seed_and_leaves_other_dice_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for shape in (RouterShape(), RouterShape(network="mlp", experts=("ann", "bob"))):
        one, same, other = (make_network(shape, seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.rand(3), expected)


def _cut(folder):
    weights = folder / "router.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])


def _spoil(folder):
    router = read_router(str(folder))
    with torch.no_grad():
        router.network.V[0, 0] = torch.nan
    (folder / "router.safetensors").write_bytes(encode_router(router)["router.safetensors"])


def _shape(**changes):
    def change(folder):
        config = json.loads((folder / "router.json").read_text())
        config["shape"] = {k: v for k, v in {**config["shape"], **changes}.items() if v != "gone"}
        (folder / "router.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "router.json").unlink(), "there is no trained router.\n`raymerge router PROJECT` trains one."),
        (lambda f: (f / "router.safetensors").unlink(), "there is no trained router."),
        (lambda f: invalidate(str(f)), "there is no trained router."),
        (lambda f: (f / "router.json").write_text("{"), "the router cannot be read.\n"),
        (lambda f: (f / "router.json").write_text("[]"), "the router cannot be read.\n"),
        (_cut, "the router cannot be read.\n"),
        (_shape(rank="gone"), "its shape has no rank."),
        (_shape(network="tree"), "network is 'tree'.\nExpected one of bilinear, mlp."),
        (_shape(network="mlp", experts=["a"]), "holds another network than router.json says.\nExpected W_in (6, 8)"),
        (_shape(rank=3), "holds another network than router.json says.\nExpected U (3, 8)"),
        (_spoil, "the router holds NaN or Inf in V."),
    ],
)
def test_a_damaged_or_missing_router_is_refused(tmp_path, damage, message):
    write_artefact(str(tmp_path), encode_router(drawn_router(world())), {}, "key")
    damage(tmp_path)
    with pytest.raises(RoutingError) as error:
        read_router(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert message in str(error.value)


def test_a_shape_is_its_record_and_refuses_what_cannot_be():
    shape = RouterShape(network="mlp", experts=("ann", "bob"), max_in_degree=2, scope="cluster")
    assert RouterShape.from_record(json.loads(json.dumps(shape.as_record()))) == shape
    for change in ({"k": 0}, {"temperature": 0.0}, {"scope": "some"}, {"weighting": "max"}, {"max_in_degree": 0}):
        with pytest.raises(RoutingError, match=next(iter(change))):
            replace(shape, **change)
