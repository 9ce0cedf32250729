"""Laws of knots, tsv and iso_c, against plain decompositions of dense deltas in float64."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.adapters import LoraModule
from raymerge.merging.methods import subspace
from raymerge.merging.methods.subspace import iso_c, knots, tsv
from raymerge.merging.rank import parse_rank
from raymerge.merging.site import Dense, Factored, Site, Weighted

SHAPE = (12, 15)
METHODS = {
    "knots": lambda one: knots(one, density=0.4),
    "knots by count": lambda one: knots(one, density=0.4, majority_sign="frequency"),
    "tsv": tsv,
    "iso_c": iso_c,
}
every = pytest.mark.parametrize("name", METHODS)
weights_st = st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.05), min_size=3, max_size=3)


def module(seed, rank=3, scaling=0.7, shape=SHAPE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    return LoraModule(A.to(dtype), B.to(dtype), scaling)


def experts(seed=0, dtype=torch.float64):
    """Of ranks 1 to 3, and one whose third direction repeats the others."""
    deficient = module(seed + 2, dtype=dtype)
    B = torch.cat([deficient.B[:, :2], deficient.B[:, :1] + deficient.B[:, 1:2]], 1)
    return [module(seed, 2, dtype=dtype), module(seed + 1, 1, 3.0, dtype=dtype), LoraModule(deficient.A, B, 0.4)]


def site(modules, weights, anchor=None, rank="keep", shape=SHAPE):
    names = tuple(f"e{i}" for i in range(len(modules)))
    ranks = tuple(0 if m is None else m.rank for m in modules)
    return Site("layers.3.q", shape, names, tuple(weights), ranks, anchor, parse_rank(rank), lambda: iter(modules))


def deltas(one):
    start = torch.zeros(one.shape, dtype=torch.float64) if one.anchor is None else one.anchor.delta(torch.float64)
    return [-start if m is None else m.delta(torch.float64) - start for m in one.read()]


def formed(one, combined):
    if isinstance(combined, Weighted):
        return sum(c * d for c, d in zip(combined.coefficients, deltas(one), strict=True))
    if isinstance(combined, Dense):
        return combined.delta.double()
    assert isinstance(combined, Factored)
    return sum(f.weight * (f.B.double() @ f.A.double()) for f in combined.factors)


def merged(name, one):
    return formed(one, METHODS[name](one))


def norm(x):
    return float(torch.linalg.matrix_norm(x))


def close(left, right, relative=1e-8):
    assert norm(left - right) <= relative * max(norm(right), 1e-12)


def thin_svd(M):
    U, values, Vh = torch.linalg.svd(M, full_matrices=False)
    rank = int((values > 1e-6 * values[0]).sum()) if float(values[0]) > 0 else 0
    return U[:, :rank], values[:rank], Vh[:rank]


def dense_tsv(several, weights):
    parts = [thin_svd(d) for d in several]
    P, _, Qh = thin_svd(torch.cat([U for U, _, _ in parts], 1))
    R, _, Sh = thin_svd(torch.cat([Vh for _, _, Vh in parts]))
    values = torch.cat([w * values for w, (_, values, _) in zip(weights, parts, strict=True)])
    return (P @ Qh) @ torch.diag(values) @ (R @ Sh)


def dense_iso_c(several, weights, rank):
    U, values, Vh = thin_svd(sum(w * d for w, d in zip(weights, several, strict=True)))
    return float(values[:rank].mean()) * U[:, :rank] @ Vh[:rank]


def dense_knots(several, weights, density, majority_sign):
    U, _, _ = thin_svd(torch.cat(several, 1))
    coordinates = [U.T @ d for d in several]
    kept = max(round(density * coordinates[0].numel()), 1)
    for c in coordinates:
        c[c.abs() < c.abs().flatten().sort(descending=True).values[kept - 1]] = 0.0
    result = torch.zeros_like(coordinates[0])
    for k in range(result.shape[0]):
        for j in range(result.shape[1]):
            found = [(w * float(c[k, j]), abs(w)) for w, c in zip(weights, coordinates, strict=True) if c[k, j] != 0]
            sign = sum(x for x, _ in found)
            if majority_sign == "frequency":
                votes = sum(math.copysign(w, x) for x, w in found)
                sign = votes if abs(votes) > 1e-12 * sum(w for _, w in found) else sign
            agreeing = [(x, w) for x, w in found if x * sign > 0]
            if agreeing:
                result[k, j] = sum(x for x, _ in agreeing) / sum(w for _, w in agreeing)
    return U @ result * sum(abs(w) for w in weights)


@given(weights_st, st.integers(0, 1000), st.booleans())
def test_tsv_is_the_dense_formula(weights, seed, anchored):
    one = site(experts(seed), weights, module(77, 2) if anchored else None)
    close(merged("tsv", one), dense_tsv(deltas(one), weights))


@given(weights_st, st.integers(0, 1000), st.sampled_from([1, 2, 4, 12]), st.booleans())
def test_iso_c_is_the_dense_formula(weights, seed, rank, anchored):
    one = site(experts(seed), weights, module(77, 2) if anchored else None, rank)
    close(merged("iso_c", one), dense_iso_c(deltas(one), weights, rank), 1e-7)


@given(
    weights_st, st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.8, 1.0]), st.sampled_from(["total", "frequency"]),
    st.booleans(),
)  # fmt: skip
def test_knots_is_the_dense_formula(weights, seed, density, majority_sign, anchored):
    one = site(experts(seed), weights, module(77, 2) if anchored else None)
    found = formed(one, knots(one, density=density, majority_sign=majority_sign))
    close(found, dense_knots(deltas(one), weights, density, majority_sign))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_and_more_ranks_than_rows(name, dtype):
    modules = [module(i, 3, dtype=dtype) for i in range(8)]
    weights = [0.1 * (i + 1) for i in range(8)]
    one = site(modules, weights)
    wanted = {
        "knots": lambda: dense_knots(deltas(one), weights, 0.4, "total"),
        "knots by count": lambda: dense_knots(deltas(one), weights, 0.4, "frequency"),
        "tsv": lambda: dense_tsv(deltas(one), weights),
        "iso_c": lambda: dense_iso_c(deltas(one), weights, 3),
    }[name]()
    close(merged(name, one), wanted, 1e-5)


@pytest.mark.parametrize("rank", [3, 15], ids=["factors", "dense"])
def test_knots_keeps_nothing_of_many_experts(rank, monkeypatch):
    """Where their ranks exceed the rows: an expert's part is gone when the next but one is made."""
    made, part = [], subspace._part

    def noted(factors):
        assert sum(one() is not None for one in made) <= 1
        found = part(factors)
        made.append(weakref.ref(found.X))
        return found

    monkeypatch.setattr(subspace, "_part", noted)
    one = site([module(i, rank, dtype=torch.float32) for i in range(8)], [0.1] * 8)
    knots(one, density=0.4)
    assert len(made) >= 16


@every
@given(st.permutations(range(3)), st.integers(0, 1000))
def test_order_does_not_matter(name, order, seed):
    modules, weights = experts(seed), [0.5, -0.3, 0.8]
    other = site([modules[i] for i in order], [weights[i] for i in order])
    close(merged(name, other), merged(name, site(modules, weights)))


@every
@given(st.floats(-5, 5).filter(lambda f: abs(f) > 1e-3), weights_st)
def test_they_are_of_degree_one_in_the_weights(name, factor, weights):
    one, other = site(experts(), weights), site(experts(), [factor * w for w in weights])
    close(merged(name, other), factor * merged(name, one))


@every
@given(st.integers(0, 1000), st.floats(1, 10))
def test_rewriting_the_factors_changes_nothing(name, seed, condition):
    generator = torch.Generator().manual_seed(seed)
    modules = [module(i, 2 + i) for i in range(3)]
    other = []
    for one in modules:
        left, _ = torch.linalg.qr(torch.randn(one.rank, one.rank, generator=generator, dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(one.rank, one.rank, generator=generator, dtype=torch.float64))
        R = left @ torch.diag(torch.logspace(0, math.log10(condition), one.rank, dtype=torch.float64)) @ right
        other.append(LoraModule(torch.linalg.inv(R) @ one.A, one.B @ R, one.scaling))
    weights = (0.5, -0.3, 0.8)
    close(merged(name, site(other, weights)), merged(name, site(modules, weights)), 1e-6)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_copies_give_what_is_stated(count, dtype):
    expert, weights = experts(dtype=dtype)[2], [1 / count] * count
    own = expert.delta(torch.float64)
    copies = site([expert] * count, weights)
    relative = 1e-7 if dtype == torch.float64 else 1e-5
    close(merged("tsv", copies), own / count, relative)
    U, values, Vh = thin_svd(own)
    close(merged("iso_c", copies), float(values.mean()) * U @ Vh, relative)
    close(formed(copies, knots(copies, density=1.0)), own, relative)
    close(merged("knots", copies), merged("knots", site([expert], (1.0,))), relative)


def test_copies_at_unequal_weights():
    expert, weights = module(0), (0.2, 0.7, -0.3)
    copies = site([expert] * 3, weights)
    close(merged("tsv", copies), expert.delta(torch.float64) * sum(weights) / 3)
    close(formed(copies, knots(copies, density=1.0)), expert.delta(torch.float64) * 1.2)  # two agree, and one opposes


def apart():
    """Two experts without a common row or column."""
    top, bottom = module(0, shape=(6, 8)), module(1, 2, shape=(6, 7))
    A, B = torch.zeros(3, 15, dtype=torch.float64), torch.zeros(12, 3, dtype=torch.float64)
    A[:, :8], B[:6] = top.A, top.B
    other_A, other_B = torch.zeros(2, 15, dtype=torch.float64), torch.zeros(12, 2, dtype=torch.float64)
    other_A[:, 8:], other_B[6:] = bottom.A, bottom.B
    return [LoraModule(A, B, 0.7), LoraModule(other_A, other_B, 1.3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_experts_that_share_nothing_do_not_disturb_each_other(dtype):
    modules = [LoraModule(m.A.to(dtype), m.B.to(dtype), m.scaling) for m in apart()]
    one = site(modules, (0.25, -0.75))
    first, second = deltas(one)
    close(merged("tsv", one), 0.25 * first - 0.75 * second, 1e-6)
    # No coordinate of one is anything but rounding in the other: the mean is over one expert, times 0.25 + 0.75.
    close(formed(one, knots(one, density=1.0)), first - second, 1e-5)


def test_experts_that_cancel_leave_nothing():
    modules = [module(0), LoraModule(module(0).A, -module(0).B, 0.7)]
    one = site(modules, (0.5, 0.5))
    for name in METHODS:
        assert norm(merged(name, one)) <= 1e-12


@every
@pytest.mark.parametrize("kind", ["absent", "zero B", "equal to the anchor", "weight 0"])
def test_experts_without_a_say_change_nothing_but_the_mean(name, kind):
    anchor = module(50, 2) if kind == "equal to the anchor" else None
    none = {"absent": None, "zero B": LoraModule(torch.ones(2, 15), torch.zeros(12, 2), 1.0), "weight 0": module(9)}
    idle, weight = none.get(kind, anchor), 0.0 if kind == "weight 0" else 0.6
    modules = experts()
    found = merged(name, site([idle, *modules], (weight, 0.5, -0.3, 0.8), anchor, 4))
    wanted = merged(name, site(modules, (0.5, -0.3, 0.8), anchor, 4))
    close(found, wanted * (2.2 / 1.6 if weight and name.startswith("knots") else 1.0), 1e-7)


@every
@pytest.mark.parametrize("rank", [2, 9])
def test_zero_deltas_give_zero(name, rank):
    anchor = module(50, rank)
    for one in (site([None, None], (1, 2)), site([anchor, anchor], (1, 2), anchor), site(experts(), (0, 0, 0))):
        assert norm(merged(name, one)) == 0.0


@every
@given(st.integers(0, 1000))
def test_nothing_lies_outside_the_space_of_the_experts(name, seed):
    one = site(experts(seed), (0.5, -0.3, 0.8), rank=12)
    columns, _, _ = thin_svd(torch.cat(deltas(one), 1))
    found = merged(name, one)
    close(columns @ (columns.T @ found), found)
    if not name.startswith("knots"):  # whose trimmed coordinates leave the row space
        _, _, rows = thin_svd(torch.cat(deltas(one)))
        close(found @ rows.T @ rows, found)


def test_iso_c_flattens_no_more_directions_than_there_are():
    one = site([module(0, 2)], (1.0,), rank=9)
    values = torch.linalg.svdvals(merged("iso_c", one))
    assert values[:2].tolist() == pytest.approx([float(values[0])] * 2)
    assert float(values[2]) <= 1e-10 * float(values[0])


def test_vectors_are_summed():
    modules = [LoraModule(torch.ones(1, 1), torch.randn(12, 1), 2.0) for _ in range(3)]
    one = site(modules, (0.5, -0.3, 0.8), shape=(12, 1))
    for name in METHODS:
        close(merged(name, one), sum(w * d for w, d in zip(one.weights, deltas(one), strict=True)))


def test_whole_tensors_with_an_identity_as_a_factor():
    dense = [module(i, 12).delta(torch.float64) for i in range(2)]
    whole = site([LoraModule(d, torch.eye(12, dtype=torch.float64), 1.0) for d in dense], (0.6, 0.4))
    turned = site([LoraModule(torch.eye(15, dtype=torch.float64), d, 1.0) for d in dense], (0.6, 0.4), rank=12)
    factored = site([module(i, 12) for i in range(2)], (0.6, 0.4))
    for name in METHODS:
        close(merged(name, whole), merged(name, factored), 1e-6)
        close(merged(name, turned), merged(name, factored), 1e-6)


@every
def test_inputs_are_not_written_to(name):
    for dtype in (torch.float64, torch.float32):
        modules, anchor = experts(dtype=dtype), module(8, dtype=dtype)
        before = [(m.A.clone(), m.B.clone()) for m in (*modules, anchor)]
        METHODS[name](site(modules, (0.5, -0.3, 0.8), anchor))
        for m, (A, B) in zip((*modules, anchor), before, strict=True):
            assert torch.equal(m.A, A)
            assert torch.equal(m.B, B)
