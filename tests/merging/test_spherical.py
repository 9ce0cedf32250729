"""Laws of slerp and karcher, against dense directions in float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.merge import merge
from raymerge.merging.methods.spherical import karcher, slerp
from raymerge.merging.rank import RankRule
from raymerge.merging.site import Site

SHAPE = (7, 9)
METHODS = {"slerp": (slerp, 2), "karcher": (karcher, 5)}
weight = st.floats(0.05, 3)


def module(seed, rank=3, scaling=0.7, shape=SHAPE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    return LoraModule(
        A.to(dtype), torch.randn(shape[0], rank, generator=generator, dtype=torch.float64).to(dtype), scaling
    )


def of_dense(delta):
    return LoraModule(delta, torch.eye(delta.shape[0], dtype=delta.dtype), 1.0)


def site(modules, weights, anchor=None):
    names = tuple(f"e{i}" for i in range(len(modules)))
    ranks = tuple(0 if m is None else m.rank for m in modules)
    return Site("layers.3.q", SHAPE, names, tuple(weights), ranks, anchor, RankRule("keep"), lambda: iter(modules))


def deltas(one):
    start = torch.zeros(SHAPE, dtype=torch.float64) if one.anchor is None else one.anchor.delta(torch.float64)
    return [-start if m is None else m.delta(torch.float64) - start for m in one.read()]


def merged(method, one, **parameters):
    coefficients = method(one, **parameters).coefficients
    return sum(c * d for c, d in zip(coefficients, deltas(one), strict=True))


def norm(x):
    return float(torch.linalg.matrix_norm(x))


def close(left, right, relative=1e-9):
    assert norm(left - right) <= relative * max(norm(right), 1e-12)


def dense_slerp(one, other, t):
    u, v = one / norm(one), other / norm(other)
    angle = math.acos(float((u * v).sum()))
    arc = (math.sin((1 - t) * angle) * u + math.sin(t * angle) * v) / math.sin(angle)
    return ((1 - t) * norm(one) + t * norm(other)) * arc


def logarithm(base, point):
    """The tangent at one unit matrix that leads to another."""
    cosine = float((base * point).sum())
    across = point - cosine * base
    return across * (math.acos(max(min(cosine, 1.0), -1.0)) / max(norm(across), 1e-300))


def dense_karcher(several, weights):
    """Plain gradient descent of step 1 on the sphere."""
    total = sum(weights)
    units = [d / norm(d) for d in several]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / norm(mean)
    for _ in range(3000):
        tangent = sum(w / total * logarithm(mean, u) for w, u in zip(weights, units, strict=True))
        size = norm(tangent)
        if size < 1e-13:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        mean = mean / norm(mean)
    return mean * sum(w * norm(d) for w, d in zip(weights, several, strict=True)) / total


@given(st.integers(0, 1000), weight, weight, st.one_of(st.none(), st.floats(0, 1)))
def test_slerp_is_the_arc_between_two(seed, first, second, t):
    one = site([module(seed), module(seed + 1, rank=2, scaling=3.0)], (first, second))
    share = second / (first + second) if t is None else t
    close(merged(slerp, one, t=t), dense_slerp(*deltas(one), share))


@given(st.lists(weight, min_size=3, max_size=6), st.integers(0, 1000))
def test_karcher_is_what_gradient_descent_finds(weights, seed):
    one = site([module(seed + i, rank=1 + i % 4, scaling=0.3 + i) for i in range(len(weights))], weights)
    close(merged(karcher, one), dense_karcher(deltas(one), weights), 1e-7)


@given(st.lists(weight, min_size=3, max_size=12), st.integers(0, 1000), st.floats(0, 3))
def test_at_the_karcher_mean_the_logarithms_sum_to_zero(weights, seed, shared):
    start = module(999).delta(torch.float64)
    modules = [of_dense(shared * start + module(seed + i).delta(torch.float64)) for i in range(len(weights))]
    one = site(modules, weights)
    mean = merged(karcher, one)
    mean = mean / norm(mean)
    tangent = sum(w * logarithm(mean, d / norm(d)) for w, d in zip(weights, deltas(one), strict=True))
    assert norm(tangent) <= 1e-8 * sum(weights)


@given(weight, weight, weight, st.integers(0, 100))
def test_karcher_is_slerp_where_copies_make_two(first, second, third, seed):
    a, b = module(seed), module(seed + 1)
    wanted = merged(slerp, site([a, b], (first + third, second)))
    close(merged(karcher, site([a, b, a], (first, second, third))), wanted, 1e-8)
    close(merged(karcher, site([a, b], (first + third, second))), wanted)


@pytest.mark.parametrize("name", METHODS)
@given(st.data())
def test_the_norm_is_the_weighted_mean_of_the_norms(name, data):
    method, count = METHODS[name]
    weights = data.draw(st.lists(weight, min_size=count, max_size=count))
    scalings = data.draw(st.lists(st.floats(1e-4, 1e4), min_size=count, max_size=count))
    one = site([module(i, scaling=s) for i, s in enumerate(scalings)], weights)
    wanted = sum(w * norm(d) for w, d in zip(weights, deltas(one), strict=True)) / sum(weights)
    assert norm(merged(method, one)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
@given(st.data())
def test_order_does_not_matter(name, data):
    method, count = METHODS[name]
    weights = data.draw(st.lists(weight, min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    modules = [module(i) for i in range(count)]
    one = site(modules, weights)
    other = site([modules[i] for i in order], [weights[i] for i in order])
    close(merged(method, other), merged(method, one), 1e-8)


@pytest.mark.parametrize("name", METHODS)
@given(st.floats(1e-6, 1e6), st.lists(weight, min_size=5, max_size=5))
def test_only_the_ratios_of_weights_count(name, factor, weights):
    method, count = METHODS[name]
    modules, weights = [module(i) for i in range(count)], weights[:count]
    wanted = merged(method, site(modules, weights))
    close(merged(method, site(modules, [factor * w for w in weights])), wanted, 1e-8)


def rewritten(one, seed, condition):
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(one.rank, one.rank, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(one.rank, one.rank, generator=generator, dtype=torch.float64))
    R = left @ torch.diag(torch.logspace(0, math.log10(condition), one.rank, dtype=torch.float64)) @ right
    return LoraModule(torch.linalg.inv(R) @ one.A, one.B @ R, one.scaling)


@pytest.mark.parametrize("name", METHODS)
@given(st.integers(0, 1000), st.floats(1, 10))
def test_rewriting_the_factors_changes_nothing(name, seed, condition):
    method, count = METHODS[name]
    modules, weights = [module(i) for i in range(count)], range(1, count + 1)
    other = [rewritten(m, seed + i, condition) for i, m in enumerate(modules)]
    close(merged(method, site(other, weights)), merged(method, site(modules, weights)), 1e-8)


@pytest.mark.parametrize("count", [1, 2, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_copies_give_the_adapter_itself(count, dtype):
    expert = module(0, dtype=dtype)
    close(merged(karcher, site([expert] * count, [1 / count] * count)), expert.delta(torch.float64))
    if count == 2:
        close(merged(slerp, site([expert] * 2, (0.5, 0.5))), expert.delta(torch.float64))


@pytest.mark.parametrize("near", [1e-3, 1e-7, 1e-9, 1e-13])
def test_nearly_parallel_experts(near):
    start, across = module(0).delta(torch.float64), module(1).delta(torch.float64)
    modules = [of_dense(start), of_dense(start + near * across), of_dense(2 * start - near * across)]
    for count, method in ((2, slerp), (3, karcher)):
        one = site(modules[:count], (0.3, 0.7, 0.5)[:count])
        shares = [w / sum(one.weights) for w in one.weights]
        size = sum(s * norm(d) for s, d in zip(shares, deltas(one), strict=True))
        flat = sum(s * d / norm(d) for s, d in zip(shares, deltas(one), strict=True))
        close(merged(method, one), size * flat / norm(flat), 1e-12 + near**2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["absent", "zero B", "equal to the anchor"])
def test_zero_deltas_are_left_out_with_their_weights(name, kind):
    method, count = METHODS[name]
    anchor = module(50) if kind == "equal to the anchor" else None
    none = LoraModule(torch.ones(2, 9), torch.zeros(7, 2), 1.0) if kind == "zero B" else anchor
    modules = [none, *(module(i) for i in range(count - 1))]
    one = site(modules, range(1, count + 1), anchor)
    rest = site(modules[1:], range(2, count + 1), anchor)
    close(merged(method, one), merged(karcher, rest), 1e-8)
    assert method(one).coefficients[0] == 0.0
    nothing = site([none] * count, [1.0] * count, anchor)
    assert list(method(nothing).coefficients) == [0.0] * count


def test_a_weight_of_zero_leaves_an_expert_out():
    modules = [module(i) for i in range(4)]
    close(merged(karcher, site(modules, (1, 0, 2, 3))), merged(karcher, site([*modules[:1], *modules[2:]], (1, 2, 3))))
    opposite = LoraModule(modules[0].A, -modules[0].B, 1.0)
    close(merged(slerp, site([modules[0], opposite], (1, 1)), t=0.0), modules[0].delta(torch.float64))
    close(merged(karcher, site([modules[0], opposite], (2, 0))), modules[0].delta(torch.float64))


def test_deltas_are_measured_from_the_anchor():
    anchor = module(9)
    modules = [module(0), None, module(2)]
    one = site(modules, (1, 2, 3), anchor)
    alone = site([of_dense(d) for d in deltas(one)], (1, 2, 3))
    close(merged(karcher, one), merged(karcher, alone), 1e-8)


def through_merge(modules, weights, name, **options):
    """As users ask for it: what a method refuses is named by its place once."""
    adapters = [LoraAdapter(f"e{i}", {"layers.3.q": m}) for i, m in enumerate(modules)]
    return merge(adapters, weights, method=name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_make_no_mean_are_refused(name):
    count = METHODS[name][1]
    modules = [module(i) for i in range(count)]
    with pytest.raises(MergeError, match=rf"^e1: weight -0\.5 is negative, which method {name} cannot use"):
        through_merge(modules, [1, -0.5, 1, 1, 1][:count], name)
    with pytest.raises(MergeError, match=r"^layers\.3\.q: all weights are 0\."):
        through_merge(modules, [0.0] * count, name)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("off", [0.0, 1e-9, 1e-5])
def test_opposite_directions_are_refused(name, off):
    a, across = module(0).delta(torch.float64), module(1).delta(torch.float64)
    with pytest.raises(MergeError, match=r"^layers\.3\.q: e0 and e1 point in opposite directions \(180\.00 degrees"):
        through_merge([of_dense(a), of_dense(-2 * a + off * across)], (1, 2), name)


def test_directions_in_no_half_of_the_sphere_are_refused():
    a, b = module(0).delta(torch.float64), module(1).delta(torch.float64)
    for several in ([a, -a, b], [a / norm(a), b / norm(b), -a / norm(a) - b / norm(b)]):
        with pytest.raises(MergeError, match=r"^layers\.3\.q: the directions of 3 experts do not lie in one half"):
            through_merge([of_dense(d) for d in several], (3, 2, 1), "karcher")


def test_wide_apart_directions_in_one_half_of_the_sphere_have_a_mean():
    a, b, c = (module(i).delta(torch.float64) / norm(module(i).delta(torch.float64)) for i in range(3))
    one = site([of_dense(d) for d in (a + 0.4 * c, b + 0.4 * c, 0.4 * c - a - b)], (1, 0.1, 0.2))
    mean = merged(karcher, one)
    mean = mean / norm(mean)
    tangent = sum(w * logarithm(mean, d / norm(d)) for w, d in zip(one.weights, deltas(one), strict=True))
    assert norm(tangent) <= 1e-8
    assert min(float((x * y).sum()) for x, y in pairwise(deltas(one))) < -0.5


def test_a_mean_that_is_not_found_is_refused():
    modules = [module(i, scaling=1.0) for i in range(5)]
    with pytest.raises(MergeError, match=r"^layers\.3\.q: the Karcher mean of 5 directions was not found in 2 steps"):
        through_merge(modules, (1, 2, 3, 4, 5), "karcher", tolerance=1e-10, steps=2)


def test_many_near_orthogonal_experts_need_few_steps():
    generator = torch.Generator().manual_seed(0)
    modules = []
    for _ in range(100):
        A, B = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
        modules.append(LoraModule(A, B, 1.0))
    weights = torch.rand(100, generator=generator).tolist()
    one = Site("q", (64, 64), tuple(f"{i:03}" for i in range(100)), tuple(weights), (4,) * 100, None, RankRule("keep"),
               lambda: iter(modules))  # fmt: skip
    coefficients = karcher(one, tolerance=1e-10, steps=40).coefficients
    mean = sum(c * m.delta(torch.float64) for c, m in zip(coefficients, modules, strict=True))
    mean = mean / norm(mean)
    units = [m.delta(torch.float64) / norm(m.delta(torch.float64)) for m in modules]
    assert norm(sum(w * logarithm(mean, u) for w, u in zip(weights, units, strict=True))) <= 1e-7


def test_slerp_of_three_names_karcher():
    with pytest.raises(MergeError, match=r"^method slerp takes 2 adapters, not 3\.\n(.*\n)*.*karcher"):
        through_merge([module(i) for i in range(3)], (1, 1, 1), "slerp")


@pytest.mark.parametrize("name", METHODS)
def test_inputs_are_not_written_to(name):
    method, count = METHODS[name]
    modules = [module(i) for i in range(count)]
    before = [(m.A.clone(), m.B.clone()) for m in modules]
    method(site(modules, [1.0] * count))
    assert all(torch.equal(m.A, A) and torch.equal(m.B, B) for m, (A, B) in zip(modules, before, strict=True))
