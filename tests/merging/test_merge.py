"""Laws of merging adapters."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge import merge
from raymerge.adapters import LoraAdapter, LoraModule, open_adapter, save_adapter
from raymerge.adapters.peft import encode_adapter
from raymerge.errors import MergeError, RankError
from raymerge.merging.gram import gram
from raymerge.merging.merge import matched_scale, merge_module, mixture_weights

SHAPES = {"layers.0.q": (12, 16), "layers.0.k": (5, 16), "layers.1.q": (12, 16), "head": (20, 12)}


def adapter(name, seed=0, ranks=(3,), paths=tuple(SHAPES), dtype=torch.float32, scaling=0.5, **kept):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for index, path in enumerate(paths):
        out, into = SHAPES[path]
        rank = ranks[index % len(ranks)]
        A = torch.randn(rank, into, generator=generator).to(dtype)
        modules[path] = LoraModule(A, torch.randn(out, rank, generator=generator).to(dtype), scaling * (1 + index))
    return LoraAdapter(name, modules, **kept)


def delta(one, path):
    if path not in one.modules:
        return torch.zeros(SHAPES[path], dtype=torch.float64)
    return one.modules[path].delta(torch.float64)


def mixed_experts(seed=0):
    """Experts of different ranks, dtypes, scalings and modules."""
    return [
        adapter("anna", seed, ranks=(3, 1)),
        adapter("bert", seed + 1, ranks=(2,), paths=("layers.0.q", "head"), dtype=torch.bfloat16, scaling=2.0),
        adapter("cleo", seed + 2, ranks=(4, 2), paths=("layers.0.k", "layers.0.q"), dtype=torch.float16),
    ]


def close(left, right, relative=1e-6):
    scale = max(float(torch.linalg.matrix_norm(right)), 1e-12)
    assert float(torch.linalg.matrix_norm(left - right)) <= relative * scale


weights_st = st.lists(st.floats(-2, 2).map(lambda w: round(w, 3)), min_size=3, max_size=3)


@given(weights_st, st.integers(0, 1000), st.floats(-3, 3))
def test_a_linear_merge_is_the_weighted_sum_of_deltas(weights, seed, scale):
    experts = mixed_experts(seed)
    merged = merge(experts, weights, rank="exact", scale=scale)
    assert list(merged.modules) == sorted(SHAPES)
    for path in SHAPES:
        terms = [scale * w * delta(e, path) for e, w in zip(experts, weights, strict=True)]
        size = sum(float(torch.linalg.matrix_norm(t)) for t in terms)
        assert float(torch.linalg.matrix_norm(delta(merged, path) - sum(terms))) <= 1e-6 * size + 1e-30
    assert all(module.scaling == 1.0 for module in merged.modules.values())


@given(st.permutations(range(3)), weights_st, st.sampled_from(["keep", "exact", {"energy": 0.9, "max": 4}]))
def test_order_does_not_matter_to_the_last_bit(order, weights, rank):
    experts = mixed_experts()
    one = merge(experts, weights, rank=rank, scale="match_norm")
    other = merge([experts[i] for i in order], [weights[i] for i in order], rank=rank, scale="match_norm")
    assert encode_adapter(one) == encode_adapter(other)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
@pytest.mark.parametrize("scale", [1.0, "match_norm"])
@pytest.mark.parametrize("rank", ["keep", "exact"])
def test_copies_at_equal_weights_are_the_adapter_itself(count, scale, rank):
    expert = adapter("a", ranks=(3, 2))
    copies = [LoraAdapter(f"copy {i}", expert.modules) for i in range(count)]
    merged = merge(copies, [1 / count] * count, rank=rank, scale=scale)
    for path in SHAPES:
        close(delta(merged, path), delta(expert, path))
        assert merged.modules[path].rank == expert.modules[path].rank


def rewritten(one, seed, condition):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, m in one.modules.items():
        left, _ = torch.linalg.qr(torch.randn(m.rank, m.rank, generator=generator, dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(m.rank, m.rank, generator=generator, dtype=torch.float64))
        R = left @ torch.diag(torch.logspace(0, math.log10(condition), m.rank, dtype=torch.float64)) @ right
        modules[path] = LoraModule(torch.linalg.inv(R) @ m.A.double(), m.B.double() @ R, m.scaling)
    return LoraAdapter(one.name, modules)


@given(st.integers(0, 1000), st.floats(1, 10), st.sampled_from([1.0, "match_norm"]))
def test_rewriting_the_factors_does_not_change_the_merge(seed, condition, scale):
    experts, weights = mixed_experts(), [0.5, 0.3, -0.4]
    one = merge(experts, weights, rank="exact", scale=scale, dtype="float64")
    other = merge([rewritten(e, seed, condition) for e in experts], weights, rank="exact", scale=scale, dtype="float64")
    for path in SHAPES:
        close(delta(other, path), delta(one, path), 1e-4)


@pytest.mark.parametrize("rank", ["keep", "exact", 2, {"energy": 0.8}], ids=str)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", torch.float16], ids=str)
def test_stated_errors_are_true(rank, dtype):
    experts, weights = mixed_experts(), [0.5, 0.3, -0.4]
    merged = merge(experts, weights, rank=rank, dtype=dtype)
    lost = whole = 0.0
    for path in SHAPES:
        S = sum(w * delta(e, path) for e, w in zip(experts, weights, strict=True))
        error = torch.linalg.matrix_norm(S - delta(merged, path)) / torch.linalg.matrix_norm(S)
        assert merged.errors[path] == pytest.approx(float(error), rel=1e-3, abs=1e-7)
        lost += float((S - delta(merged, path)).square().sum())
        whole += float(S.square().sum())
    assert merged.errors["*"] == pytest.approx(math.sqrt(lost / whole), rel=1e-3, abs=1e-7)


def test_the_widest_dtype_of_the_experts_is_kept_unless_another_is_asked_for():
    assert merge(mixed_experts(), [1, 1, 1]).dtype == torch.float32
    halves = [adapter("a", dtype=torch.bfloat16), adapter("b", dtype=torch.bfloat16)]
    assert merge(halves, [0.5, 0.5]).dtype == torch.bfloat16
    assert merge([halves[0], adapter("c", dtype=torch.float16)], [0.5, 0.5]).dtype == torch.float32
    assert merge(halves, [0.5, 0.5], dtype="float16").dtype == torch.float16
    with pytest.raises(MergeError, match="dtype 'int8'"):
        merge(halves, [0.5, 0.5], dtype="int8")


def test_ranks_of_modules():
    experts = mixed_experts()
    kept = merge(experts, [1, 1, 1], rank="keep")
    assert {p: m.rank for p, m in kept.modules.items()} == {
        p: max(e.modules[p].rank for e in experts if p in e.modules) for p in SHAPES
    }
    exact = merge(experts, [1, 1, 1], rank="exact")
    assert exact.modules["layers.0.q"].rank == sum(e.modules["layers.0.q"].rank for e in experts)
    assert {m.rank for m in merge(experts, [1, 1, 1], rank=100).modules.values()} == {12, 5}
    padded = merge(experts, [1, 1, 1], rank={"rank": "exact", "uniform": True})
    assert {m.rank for m in padded.modules.values()} == {exact.modules["layers.0.q"].rank}
    for path in SHAPES:
        close(delta(padded, path), delta(exact, path))
    with pytest.raises(RankError):
        merge(experts, [1, 1, 1], rank=0)


def test_a_module_that_is_zero_has_rank_1_and_error_0():
    expert = adapter("a", ranks=(3,))
    silent = LoraModule(expert.modules["head"].A, torch.zeros(20, 3), 1.0)
    merged = merge([LoraAdapter("a", {**expert.modules, "head": silent})], [1.0])
    assert merged.modules["head"].rank == 1
    assert merged.errors["head"] == 0.0
    nothing = merge([expert, LoraAdapter("b", expert.modules)], [1.0, -1.0], rank=8, scale="match_norm")
    assert {m.rank for m in nothing.modules.values()} == {1}
    assert nothing.errors["*"] == 0.0


@given(weights_st, st.floats(-2, 2))
def test_deltas_are_measured_from_the_anchor(weights, scale):
    experts, anchor = mixed_experts(), adapter("anchor", 9, ranks=(2,), paths=("layers.0.q", "layers.1.q"))
    merged = merge(experts, weights, rank="exact", scale=scale, anchor=anchor)
    for path in SHAPES:
        start = delta(anchor, path)
        moved = [scale * w * (delta(e, path) - start) for e, w in zip(experts, weights, strict=True)]
        size = float(torch.linalg.matrix_norm(start)) + sum(float(torch.linalg.matrix_norm(m)) for m in moved)
        assert float(torch.linalg.matrix_norm(delta(merged, path) - start - sum(moved))) <= 1e-6 * size + 1e-30


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("rank", ["exact", "keep"])
def test_match_norm_gives_the_mean_norm_of_what_is_merged(anchored, rank):
    experts, weights = mixed_experts(), [0.5, 0.3, -0.4]
    anchor = adapter("anchor", 9, ranks=(2,)) if anchored else None

    def moved(one):
        start = [delta(anchor, p) if anchor else 0.0 for p in SHAPES]
        return torch.cat([(delta(one, p) - s).flatten() for p, s in zip(SHAPES, start, strict=True)])

    total = sum(w * moved(e) for e, w in zip(experts, weights, strict=True))
    wanted = sum(abs(w) * float(moved(e).norm()) for e, w in zip(experts, weights, strict=True)) / float(total.norm())
    assert matched_scale(experts, weights, anchor) == pytest.approx(wanted, rel=1e-9)
    matched = merge(experts, weights, scale="match_norm", rank=rank, anchor=anchor)
    plain = merge(experts, weights, scale=wanted, rank=rank, anchor=anchor)
    stronger = merge(experts, weights, scale={"match_norm": 1.4}, rank=rank, anchor=anchor)
    plainly = merge(experts, weights, scale=1.4 * wanted, rank=rank, anchor=anchor)
    for path in SHAPES:
        close(delta(matched, path), delta(plain, path))
        close(delta(stronger, path), delta(plainly, path))
    assert matched.errors == pytest.approx(plain.errors, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("scale", ["norm", True, float("nan"), {"match_norm": 0}, {"match_norm": "x"}, {"norm": 1}])
def test_what_is_no_scale_is_refused(scale):
    with pytest.raises(MergeError, match="scale"):
        merge(mixed_experts(), [1, 1, 1], scale=scale)


def test_match_norm_agrees_with_gram_matrices():
    experts, weights = mixed_experts(), [0.2, 0.5, 0.3]
    products, w = gram(experts), torch.tensor(weights, dtype=torch.float64)
    expected = (w @ products.diagonal().sqrt()) / (w @ products @ w).sqrt()
    assert matched_scale(experts, weights) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 0.3, "match_norm", {"match_norm": 0.7}])
@pytest.mark.parametrize("anchored", [False, True])
def test_mixture_weights_compute_what_the_exact_merge_does(scale, anchored):
    experts, weights = mixed_experts(), [0.5, 0.3, -0.4]
    anchor = adapter("anchor", 9, ranks=(2,)) if anchored else None
    shares, own = mixture_weights(experts, weights, scale, anchor)
    assert anchored or own == 0.0
    products = gram([*experts, *([anchor] if anchor else [])])
    known = mixture_weights([], weights, scale, anchor, products)
    assert known[0] == pytest.approx(shares, rel=1e-9)
    assert known[1] == pytest.approx(own, rel=1e-9)
    merged = merge(experts, weights, scale=scale, rank="exact", anchor=anchor)
    for path in SHAPES:
        mixture = sum(s * delta(e, path) for e, s in zip(experts, shares, strict=True))
        close(delta(merged, path), mixture + (own * delta(anchor, path) if anchor else 0.0))


def test_inputs_are_not_touched_even_where_they_could_not_be():
    experts = mixed_experts()
    before = [encode_adapter(e) for e in experts]
    for rank in ("keep", "exact", {"energy": 0.9, "max": 2}):
        merge(experts, [0.5, 0.3, 0.2], rank=rank, scale="match_norm", anchor=experts[0])
    assert [encode_adapter(e) for e in experts] == before
    assert merge(experts, [0, 0, 0]).errors["*"] == 0.0


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # which is what this test is about
def test_read_only_maps_can_be_merged(tmp_path):
    import mmap

    def mapped(tensor, path):
        path.write_bytes(tensor.numpy().tobytes())
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return torch.frombuffer(buffer, dtype=tensor.dtype).reshape(tensor.shape)  # a write would kill the process

    expert = adapter("a")
    modules = {
        p: LoraModule(mapped(m.A, tmp_path / f"{p}.A"), mapped(m.B, tmp_path / f"{p}.B"), m.scaling)
        for p, m in expert.modules.items()
    }
    experts = [LoraAdapter("a", modules), LoraAdapter("b", modules)]
    for rank in ("keep", "exact", {"energy": 0.9, "max": 2}):
        merged = merge(experts, [0.5, 0.5], rank=rank, scale="match_norm")
    close(delta(merge(experts, [0.5, 0.5]), "head"), delta(expert, "head"))
    assert merged.errors["*"] < 1


def test_trained_parameters_are_merged_without_a_graph():
    expert = adapter("a")
    for module in expert.modules.values():
        module.A.requires_grad_()
    assert not merge([expert], [1.0]).modules["head"].A.requires_grad


def test_opened_adapters_are_read_module_by_module(tmp_path, monkeypatch):
    experts = mixed_experts()
    for expert in experts:
        save_adapter(expert, str(tmp_path / expert.name))
    opened = [open_adapter(str(tmp_path / e.name)) for e in experts]
    reads = []
    original = type(opened[0].modules).__getitem__

    def read(self, path):
        if path in self:
            reads.append(path)
        return original(self, path)

    monkeypatch.setattr(type(opened[0].modules), "__getitem__", read)
    merged = merge(opened, [0.5, 0.3, 0.2], scale="match_norm")
    assert reads == [path for path in sorted(SHAPES) for e in experts if path in e.modules]
    assert encode_adapter(merged) == encode_adapter(merge(experts, [0.5, 0.3, 0.2], scale="match_norm"))


def test_what_all_experts_agree_on_is_kept():
    same = {"base_model": "b", "task_type": "CAUSAL_LM", "started_from": "unified", "fan_in_fan_out": True}
    merged = merge([adapter("a", **same), adapter("b", **same)], [0.5, 0.5], name="both")
    assert {key: getattr(merged, key) for key in same} == same
    assert merged.name == "both"
    mixed = merge([adapter("a", **same), adapter("b", base_model="b")], [0.5, 0.5])
    assert (mixed.task_type, mixed.started_from, mixed.base_model) == (None, None, "b")


def test_bases_that_differ_are_a_warning_with_both_names():
    with pytest.warns(UserWarning, match=r"meta-llama/x \(a\), /home/me/x \(b\)"):
        merge([adapter("b", base_model="/home/me/x"), adapter("a", base_model="meta-llama/x")], [0.5, 0.5])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"adapters": [], "weights": []}, "0 adapters"),
        ({"weights": [1.0]}, "3 adapters and 1 weights"),
        ({"weights": [1.0, math.nan, 0.0]}, "bert: its weight is nan"),
        ({"method": "median"}, "unknown method 'median'.\nAllowed: breadcrumbs, "),
        ({"method": "tie"}, "Did you mean ties?"),
        ({"method": "slerp"}, "method slerp takes 2 adapters, not 3"),
        ({"method": "ties", "density": 1.5}, "method ties: density 1.5"),
        ({"method": "ties", "density": 0}, "Expected a density above 0 and at most 1"),
        ({"method": "ties", "density": {"*.missing": 0.5}}, "method ties: density names modules by '*.missing'"),
        ({"weights": [{"*.x": 0.5}, 1.0, 1.0]}, "anna: its weight names modules by '*.x'"),
        ({"weights": [[], 1.0, 1.0]}, "anna: its weight is []"),
        ({"method": "karcher", "weights": [1.0, -1.0, 1.0]}, "bert: weight -1 is negative"),
        ({"dialect": "pft"}, "Did you mean peft?"),
        ({"density": 0.2}, "unknown parameter of method linear 'density'"),
        ({"scale": "norm"}, "scale 'norm'"),
        ({"scale": math.inf}, "scale inf"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused_by_name(arguments, named):
    with pytest.raises(MergeError) as refusal:
        merge(**{"adapters": mixed_experts(), "weights": [1.0, 1.0, 1.0], **arguments})
    assert named in str(refusal.value)


def test_shapes_that_differ_are_refused_before_anything_is_read():
    wrong = LoraModule(torch.randn(2, 17), torch.randn(12, 2), 1.0)
    with pytest.raises(MergeError, match=r"^b: layers.0.q has shape \(12, 17\), but \(12, 16\) in a"):
        merge([adapter("a"), LoraAdapter("b", {"layers.0.q": wrong})], [0.5, 0.5])


def test_one_module_alone():
    experts = [e.modules.get("layers.0.k") for e in mixed_experts()]
    assert experts[1] is None
    module, error = merge_module(experts, [0.5, 0.3, 0.2], rank="exact")
    expected = sum(w * m.delta(torch.float64) for w, m in zip([0.5, 0.3, 0.2], experts, strict=True) if m is not None)
    close(module.delta(torch.float64), expected)
    assert error < 1e-6
    with pytest.raises(MergeError, match="shape is unknown"):
        merge_module([None], [1.0])


def test_weights_go_by_place_by_name_or_are_equal():
    experts = mixed_experts()
    by_name = merge(experts, {"cleo": 0.1, "anna": 0.6, "bert": 0.3}, rank="exact")
    by_place = merge(experts, [0.6, 0.3, 0.1], rank="exact")
    assert encode_adapter(by_name) == encode_adapter(by_place)
    assert encode_adapter(merge(experts)) == encode_adapter(merge(experts, [1 / 3] * 3))
    assert repr(by_name) == "LoraAdapter('merged', 4 modules of rank 3 to 7, torch.float32)"


@pytest.mark.parametrize(
    ("adapters", "weights", "named"),
    [
        (["adapters/anna"], [1.0], "'adapters/anna' is no adapter"),
        (mixed_experts(), "0.5,0.3,0.2", "weights '0.5,0.3,0.2' are a text"),
        (mixed_experts(), {"anna": 1.0, "bob": 1.0}, "weights for anna, bob, and adapters anna, bert, cleo"),
        ([], None, "0 adapters and 0 weights"),
    ],
)
def test_what_is_no_adapter_or_no_weight_is_refused(adapters, weights, named):
    with pytest.raises(MergeError) as refusal:
        merge(adapters, weights)
    assert named in str(refusal.value)
