"""Laws of Model Stock, against its formula on dense deltas in float64."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.merge import merge
from raymerge.merging.methods.model_stock import model_stock
from raymerge.merging.rank import RankRule
from raymerge.merging.site import Site

SHAPE = (7, 9)
weight = st.floats(0.05, 3)


def module(seed, rank=3, scaling=0.7, shared=0.0):
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(999)
    A, B = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        + shared * torch.randn(*shape, generator=common, dtype=torch.float64)
        for shape in ((rank, SHAPE[1]), (SHAPE[0], rank))
    )
    return LoraModule(A, B, scaling)


def site(modules, weights, anchor=None):
    names = tuple(f"e{i}" for i in range(len(modules)))
    ranks = tuple(0 if m is None else m.rank for m in modules)
    return Site("layers.3.q", SHAPE, names, tuple(weights), ranks, anchor, RankRule("keep"), lambda: iter(modules))


def deltas(one):
    start = torch.zeros(SHAPE, dtype=torch.float64) if one.anchor is None else one.anchor.delta(torch.float64)
    return [-start if m is None else m.delta(torch.float64) - start for m in one.read()]


def merged(one):
    return sum(c * d for c, d in zip(model_stock(one).coefficients, deltas(one), strict=True))


def dense(several, weights):
    cosines = [float((a * b).sum() / a.norm() / b.norm()) for a, b in combinations(several, 2)]
    cosine, count = max(sum(cosines) / len(cosines), 0.0), len(several)
    t = count * cosine / (1 + (count - 1) * cosine)
    return t * sum(w * d for w, d in zip(weights, several, strict=True)) / sum(weights)


def close(left, right, relative=1e-9):
    assert float((left - right).norm()) <= relative * max(float(right.norm()), 1e-12)


@given(st.lists(weight, min_size=2, max_size=6), st.integers(0, 1000), st.floats(0, 2), st.booleans())
def test_it_is_the_formula_of_the_paper(weights, seed, shared, anchored):
    modules = [module(seed + i, 1 + i % 4, 0.3 + i, shared) for i in range(len(weights))]
    one = site(modules, weights, module(77) if anchored else None)
    close(merged(one), dense(deltas(one), weights))


@given(st.permutations(range(4)), st.floats(1e-6, 1e6))
def test_neither_order_nor_the_size_of_weights_matters(order, factor):
    modules, weights = [module(i, shared=1.0) for i in range(4)], [1.0, 2.0, 3.0, 4.0]
    other = site([modules[i] for i in order], [factor * weights[i] for i in order])
    close(merged(other), merged(site(modules, weights)))


@given(st.integers(0, 1000), st.floats(1, 10))
def test_rewriting_the_factors_changes_nothing(seed, condition):
    generator = torch.Generator().manual_seed(seed)
    modules = [module(i, shared=1.0) for i in range(4)]
    other = []
    for one in modules:
        left, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        R = left @ torch.diag(torch.logspace(0, math.log10(condition), 3, dtype=torch.float64)) @ right
        other.append(LoraModule(torch.linalg.inv(R) @ one.A, one.B @ R, one.scaling))
    close(merged(site(other, (1, 2, 3, 4))), merged(site(modules, (1, 2, 3, 4))))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_copies_give_the_adapter_itself(count):
    close(merged(site([module(0)] * count, [1 / count] * count)), module(0).delta(torch.float64))


def test_disagreeing_experts_leave_nothing():
    one = module(0)
    assert list(model_stock(site([one, LoraModule(one.A, -one.B, 2.0)], (1, 3))).coefficients) == [0.0, 0.0]
    A, B = torch.eye(9)[:1], torch.eye(7)[:, :1]
    across = LoraModule(torch.eye(9)[1:2], B, 1.0)
    assert list(model_stock(site([LoraModule(A, B, 1.0), across], (1, 1))).coefficients) == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["absent", "equal to the anchor"])
def test_a_zero_delta_counts_in_the_mean_alone(kind):
    anchor = module(50) if kind == "equal to the anchor" else None
    modules = [module(i, shared=1.0) for i in range(3)]
    rest = site(modules, (1, 2, 3), anchor)
    close(merged(site([anchor, *modules], (2, 1, 2, 3), anchor)), merged(rest) * 6 / 8)
    alone = site([anchor, modules[0]], (1, 3), anchor)
    close(merged(alone), 0.75 * deltas(alone)[1])
    assert list(model_stock(site([anchor] * 3, (1, 1, 1), anchor)).coefficients) == [0.0] * 3


def test_a_weight_of_zero_leaves_an_expert_out():
    modules = [module(i, shared=1.0) for i in range(3)]
    close(merged(site(modules, (1, 0, 2))), merged(site(modules[::2], (1, 2))))


def test_weights_that_make_no_mean_are_refused():
    adapters = [LoraAdapter(f"e{i}", {"layers.3.q": module(i)}) for i in range(2)]
    with pytest.raises(MergeError, match=r"^e1: weight -1 is negative, which method model_stock cannot use"):
        merge(adapters, (1, -1), method="model_stock")
    with pytest.raises(MergeError, match=r"^layers\.3\.q: all weights are 0\."):
        merge(adapters, (0, 0), method="model_stock")
