"""The registry of methods: what each takes, and its laws through `merge`."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge import merge
from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.methods import METHODS

SHAPES = {
    "layers.0.q_proj": (24, 20),
    "layers.0.v_proj": (8, 20),
    "layers.1.q_proj": (24, 20),
    "layers.1.v_proj": (8, 20),
}
TWO = ("slerp",)
ELECTED = ("ties", "dare_ties", "della", "breadcrumbs_ties", "sce", "knots")
SPHERICAL = ("slerp", "karcher", "model_stock")
UNCUT = tuple(method for method in METHODS if method != "iso_c")  # it depends on the rank asked for
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
WHOLE_DENSITY = {  # parameters at which a sparse method leaves nothing out
    **{name: {"density": 1.0} for name in ("magnitude_prune", "ties", "dare_linear", "dare_ties", "sce", "knots")},
    **{name: {"density": 1.0, "epsilon": 0.0} for name in ("della_linear", "della")},
    **{name: {"density": 1.0, "gamma": 0.0} for name in ("breadcrumbs", "breadcrumbs_ties")},
}


def adapter(name, seed, rank=3):
    """An adapter that has something in common with all others, as those of one task have."""
    own, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000)

    def factor(*shape):
        start = torch.randn(*shape, generator=common, dtype=torch.float64)
        return start + 0.7 * torch.randn(*shape, generator=own, dtype=torch.float64)

    modules = {path: LoraModule(factor(rank, into), factor(out, rank), 0.5) for path, (out, into) in SHAPES.items()}
    return LoraAdapter(name, modules)


def experts_for(method, seed=0, count=3):
    return [adapter(name, seed + i) for i, name in enumerate(("anna", "bert", "cleo")[: 2 if method in TWO else count])]


def renamed(one, name):
    return LoraAdapter(name, dict(one.modules))


def deltas(one):
    return torch.cat([one.modules[path].delta(torch.float64).flatten() for path in SHAPES])


def close(left, right, relative=1e-5):
    assert float((left - right).norm()) <= relative * max(float(right.norm()), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_order_changes_no_bit(method):
    experts = experts_for(method)
    weights = [0.5, 0.3, 0.2][: len(experts)]
    one = merge(experts, weights, method=method, rank="exact")
    other = merge(experts[::-1], weights[::-1], method=method, rank="exact")
    for path in SHAPES:
        assert torch.equal(one.modules[path].A, other.modules[path].A)
        assert torch.equal(one.modules[path].B, other.modules[path].B)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 200), factor=st.floats(0.1, 4))
@settings(max_examples=8)
def test_degree_in_the_weights(method, seed, factor):
    experts = experts_for(method, seed)
    weights = [0.5, 0.3, 0.2][: len(experts)]
    one = merge(experts, weights, method=method, rank="exact")
    other = merge(experts, [factor * w for w in weights], method=method, rank="exact")
    close(deltas(other), deltas(one) * (factor if METHODS[method].degree else 1.0))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("tsv", "iso_c")])
def test_copies_are_the_adapter_itself(method):
    copies = [renamed(adapter("x", 1), name) for name in ("anna", "bert", "cleo")][: 2 if method in TWO else 3]
    merged = merge(
        copies, [1 / len(copies)] * len(copies), method=method, rank="exact", **WHOLE_DENSITY.get(method, {})
    )
    close(deltas(merged), deltas(copies[0]))


@pytest.mark.parametrize("method", [m for m in UNCUT if m not in TWO])
def test_one_adapter_stays_what_it_is(method):
    one = adapter("anna", 3)
    close(deltas(merge([one], [1.0], method=method, rank="exact", **WHOLE_DENSITY.get(method, {}))), deltas(one))


@pytest.mark.parametrize("method", [m for m in WHOLE_DENSITY if m not in ELECTED])
def test_nothing_left_out_and_no_signs_elected_is_linear(method):
    experts = experts_for(method)
    weights = [0.5, -0.3, 0.2]
    linear = merge(experts, weights, rank="exact")
    close(deltas(merge(experts, weights, method=method, rank="exact", **WHOLE_DENSITY[method])), deltas(linear))


@pytest.mark.parametrize("method", METHODS)
def test_factors_are_a_matter_of_writing(method):
    experts = experts_for(method)
    weights = [0.5, 0.3, 0.2][: len(experts)]
    generator = torch.Generator().manual_seed(7)
    rewritten = []
    for one in experts:
        modules = {}
        for path, module in one.modules.items():
            Q = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
            R = Q * torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)
            modules[path] = LoraModule(torch.linalg.solve(R, module.A), module.B @ R, module.scaling)
        rewritten.append(LoraAdapter(one.name, modules))
    first = merge(experts, weights, method=method, rank="exact")
    close(deltas(merge(rewritten, weights, method=method, rank="exact")), deltas(first), 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_stay_as_they_are(method):
    experts = experts_for(method)
    before = [{path: (m.A.clone(), m.B.clone()) for path, m in one.modules.items()} for one in experts]
    merge(experts, [0.5, 0.3, 0.2][: len(experts)], method=method, rank=2)
    for one, kept in zip(experts, before, strict=True):
        for path, (A, B) in kept.items():
            assert torch.equal(one.modules[path].A, A)
            assert torch.equal(one.modules[path].B, B)


@pytest.mark.parametrize("method", UNCUT)
def test_an_anchor_moves_the_origin(method):
    """anchor + scale * merge(a_i - anchor), against experts that are the differences themselves."""
    anchor = adapter("start", 50)
    experts = experts_for(method)
    weights = [0.5, 0.3, 0.2][: len(experts)]
    differences = []
    for one in experts:
        modules = {}
        for path, module in one.modules.items():
            start = anchor.modules[path]
            modules[path] = LoraModule(
                torch.cat([module.A, start.A]),
                torch.cat([module.scaling * module.B, -start.scaling * start.B], 1),
                1.0,
            )
        differences.append(LoraAdapter(one.name, modules))
    moved = merge(experts, weights, method=method, rank="exact", scale=0.7, anchor=anchor)
    plain = merge(differences, weights, method=method, rank="exact", scale=0.7)
    close(deltas(moved), deltas(anchor) + deltas(plain), 1e-4)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("method", UNCUT)
def test_matched_norm_is_the_mean_norm_of_the_experts(method, anchored):
    experts = experts_for(method)
    weights = [0.5, {"*.v_proj": 0.1, "*": 0.3}, 0.2][: len(experts)]
    anchor = adapter("start", 50) if anchored else None
    start = deltas(anchor) if anchored else torch.zeros_like(deltas(experts[0]))
    merged = merge(experts, weights, method=method, rank="exact", scale="match_norm", anchor=anchor)
    shares = torch.cat(
        [torch.full((out * into,), 0.1 if p.endswith("v_proj") else 0.3) for p, (out, into) in SHAPES.items()]
    )
    moved = [deltas(e) - start for e in experts]
    wanted = sum(float(((shares if i == 1 else weights[i]) * d).norm()) for i, d in enumerate(moved))
    assert float((deltas(merged) - start).norm()) == pytest.approx(wanted, rel=1e-5)


def test_iso_c_around_an_anchor_keeps_to_the_rank():
    merged = merge(experts_for("iso_c"), [0.5, 0.3, 0.2], method="iso_c", rank=2, anchor=adapter("start", 50))
    assert {header.rank for header in merged.headers.values()} == {2}


@pytest.mark.parametrize(("size", "weight"), [(1e-4, 1e-3), (1e-5, 0.1), (2000.0, 100.0)])
def test_half_precision_holds_factors_of_any_size(size, weight):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 32, generator=generator), size * torch.randn(24, 4, generator=generator)
    one = LoraAdapter("anna", {"q": LoraModule(A.half(), B.half(), 1.0)})
    assert merge([one], [weight], rank="keep").errors["*"] < 1e-3


def test_a_dense_delta_keeps_the_rank_it_stands_for():
    generator = torch.Generator().manual_seed(0)
    dora = LoraModule(torch.eye(20), torch.randn(24, 20, generator=generator), 1.0, nominal=3)
    merged = merge([LoraAdapter("anna", {"q": dora})], [1.0], rank="keep")
    assert merged.headers["q"].rank == 3
    with pytest.raises(MergeError, match=r"anna: q is DoRA(.|\n)*rank exact"):
        merge([LoraAdapter("anna", {"q": dora})], [1.0], rank="exact")


@pytest.mark.parametrize("method", UNCUT)
@pytest.mark.parametrize(
    ("dtype", "rank"), [("float64", 2), ("float16", 2), ("bfloat16", "exact"), ("float64", "exact")]
)
@pytest.mark.parametrize("scale", [1e-4, "match_norm"])
def test_the_stated_error_is_the_true_one(method, dtype, rank, scale):
    experts = experts_for(method)
    weights = [0.5, 0.3, 0.2][: len(experts)]
    merged = merge(experts, weights, method=method, rank=rank, dtype=dtype, scale=scale)
    exact = deltas(merge(experts, weights, method=method, rank="exact", dtype="float64", scale=scale))
    true = float((deltas(merged) - exact).norm() / exact.norm())
    assert merged.errors["*"] == pytest.approx(true, rel=0.02 if rank == "exact" else 1e-4, abs=1e-6)


@pytest.mark.parametrize("method", SPHERICAL)
def test_negative_weights_have_no_direction_on_a_sphere(method):
    with pytest.raises(MergeError, match="bert: weight -1 is negative"):
        merge(experts_for(method)[:2], [0.5, -1.0], method=method)


def test_weights_and_densities_by_module():
    experts = experts_for("linear")[:2]
    merged = merge(experts, [{"*.v_proj": 0.8}, [0.0, 1.0]], rank="exact")
    for path in SHAPES:
        first = 0.8 if path.endswith("v_proj") else 1.0
        second = 0.0 if ".0." in path else 1.0
        wanted = first * experts[0].modules[path].delta(torch.float64)
        close(
            merged.modules[path].delta(torch.float64), wanted + second * experts[1].modules[path].delta(torch.float64)
        )
    pruned = merge(experts[:1], [1.0], method="magnitude_prune", density={"*.v_proj": 0.1, "*": 1.0}, rank="exact")
    assert torch.count_nonzero(pruned.modules["layers.0.v_proj"].delta(torch.float64).abs() > 1e-9) == 16
    close(
        pruned.modules["layers.0.q_proj"].delta(torch.float64),
        experts[0].modules["layers.0.q_proj"].delta(torch.float64),
    )


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_is_a_draw(method):
    experts = experts_for(method)
    weights = [0.5, 0.3, 0.2]
    one, again = (deltas(merge(experts, weights, method=method, rank="exact", seed=4)) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, deltas(merge(experts, weights, method=method, rank="exact", seed=5)))


def test_slerp_of_many_is_refused_with_the_reason():
    with pytest.raises(MergeError, match=r"takes 2 adapters, not 3.\n(.|\n)*karcher"):
        merge(experts_for("linear"), [1.0, 1.0, 1.0], method="slerp")


def test_the_registry_needs_no_torch():
    code = "import sys, raymerge.merging.methods, raymerge.merging.dialects; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("rank", [2, {"energy": 0.9}], ids=str)
def test_iso_c_cuts_first_and_flattens_then(rank):
    experts = experts_for("iso_c")
    weights = [0.5, 0.3, 0.2]
    merged = merge(experts, weights, method="iso_c", rank=rank, dtype="float64")
    linear = merge(experts, weights, rank=rank, dtype="float64")
    for path in SHAPES:
        values = torch.linalg.svdvals(linear.modules[path].delta(torch.float64))
        values = values[values > 1e-9 * values[0]]
        found = torch.linalg.svdvals(merged.modules[path].delta(torch.float64))[: len(values)]
        close(found, values.mean().expand(len(values)))
    assert merged.errors["*"] < 1e-6
