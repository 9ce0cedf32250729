"""The bound of every way to truncate a sum, against a dense SVD in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.errors import MergeError, RankError
from raymerge.merging import lowrank
from raymerge.merging.factors import Factor
from raymerge.merging.lowrank import costs, sum_norm, truncate, truncated_sum
from raymerge.merging.rank import parse_rank

OUT, IN = 90, 70
PATHS = ("gram", "qr", "dense", "randomised")
RANKS = ("keep", "exact", 6, {"energy": 0.9, "max": 12}, {"energy": 0.95})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(normal(rows, columns, seed=seed))[0]


def gauge(rank, condition, seed=0):
    values = torch.logspace(0, torch.log10(torch.tensor(condition)).item(), rank, dtype=torch.float64)
    left, right = (orthonormal(rank, rank, seed + i).double() for i in (0, 1))
    return left @ torch.diag(values) @ right.T


def spectrum(values):
    values = torch.as_tensor(values)
    k = len(values)
    return [Factor(orthonormal(OUT, k, 1) * values, orthonormal(IN, k, 2).T)]


def rewritten(condition):
    R = gauge(8, condition)
    B, A = normal(OUT, 8, seed=3).double(), normal(8, IN, seed=4).double()
    return [Factor(B @ R, torch.linalg.inv(R) @ A, 0.5), Factor(normal(OUT, 8, seed=5), normal(8, IN, seed=6), 0.3)]


B0, A0 = normal(OUT, 8, seed=7), normal(8, IN, seed=8)
SUMS = {
    "independent": [Factor(normal(OUT, 4, seed=i), normal(4, IN, seed=50 + i), 0.2 * (i - 2.5)) for i in range(5)],
    "more than the dense rank": [Factor(normal(OUT, 8, seed=i), normal(8, IN, seed=50 + i), 0.1) for i in range(30)],
    "ranks differ": [Factor(normal(OUT, r, seed=r), normal(r, IN, seed=50 + r), 1.0) for r in (1, 2, 9)],
    "one shared A": [Factor(normal(OUT, 8, seed=i), A0, 0.2) for i in range(6)],
    "nearly one A": [Factor(normal(OUT, 8, seed=i), A0 + 1e-4 * normal(8, IN, seed=50 + i)) for i in range(6)],
    "copies": [Factor(B0, A0, 0.05)] * 20,
    "nearly cancelling": [Factor(B0, A0), Factor(B0 + 1e-3 * normal(OUT, 8), A0, -1.0)],
    "all but cancelling": [Factor(B0, A0), Factor(B0 + 1e-6 * normal(OUT, 8), A0, -1.0)],
    "flat": spectrum(torch.ones(60)),
    "steep": spectrum(10.0 ** (-torch.arange(60) / 8)),
    "a gap": spectrum(torch.cat([torch.ones(6), torch.full((40,), 1e-3)])),
    "unequal scales": [Factor(normal(OUT, 8, seed=i) * 10.0**-i, normal(8, IN, seed=50 + i)) for i in range(8)],
    "unequal factors": [
        Factor(0.1**i * normal(OUT, 8, seed=i), 10.0**i * normal(8, IN, seed=50 + i)) for i in range(8)
    ],
    "rewritten": rewritten(10.0),
    "badly rewritten": rewritten(1e6),
    "tiny": [Factor(1e-18 * B0, 1e-18 * A0)],
    "a zero among them": [Factor(torch.zeros(OUT, 4), normal(4, IN)), Factor(B0, A0)],
    "bfloat16": [Factor(B0.bfloat16(), A0.bfloat16(), 0.3), Factor(normal(OUT, 4).half(), normal(4, IN).half(), 0.7)],
}


def dense(factors):
    return sum(weight * B.double() @ A.double() for B, A, weight in factors)


@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_every_way_keeps_the_bound_and_states_its_error(name, rank):
    factors = SUMS[name]
    S = dense(factors)
    norm, values = torch.linalg.matrix_norm(S), torch.linalg.svdvals(S)
    for path in (None, *PATHS):
        found = truncated_sum(factors, rank, path=path)
        assert found.A.dtype == found.B.dtype == torch.float32
        error = torch.linalg.matrix_norm(S - found.B.double() @ found.A.double())
        optimum = torch.linalg.vector_norm(values[found.A.shape[0] :])
        assert error <= (1 + 1e-4) * optimum + 1e-6 * norm, (path, found.path)
        assert abs(error - found.error * norm) <= 1e-6 * error + 2e-7 * norm, (path, found.path)
        assert found.norm == pytest.approx(float(norm), rel=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_ranks_are_those_asked_for(path):
    independent, few = SUMS["independent"], SUMS["copies"]
    assert truncated_sum(independent, "exact", path=path).A.shape[0] == 20
    assert truncated_sum(independent, "keep", path=path).A.shape[0] == 4
    assert truncated_sum(independent, 30, path=path).A.shape[0] == 30  # with zeros, as 20 hold everything
    assert truncated_sum(few, "exact", path=path).A.shape[0] == 8
    values = torch.linalg.svdvals(dense(independent))
    share = (values.square().cumsum(0) / values.square().sum()).tolist()
    wanted = next(i + 1 for i, s in enumerate(share) if s >= 0.9)
    assert truncated_sum(independent, {"energy": 0.9}, path=path).A.shape[0] == wanted
    assert truncated_sum(independent, {"energy": 0.9, "max": 3}, path=path).A.shape[0] == 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", ["keep", "exact", 5, {"energy": 0.9, "max": 4}], ids=str)
@pytest.mark.parametrize(
    "factors",
    [[Factor(torch.zeros(OUT, 8), A0)], [Factor(B0, A0), Factor(B0, A0, -1.0)], [Factor(B0, A0, 0.0)]],
    ids=["zeros", "cancelled", "weightless"],
)
def test_a_zero_delta_has_rank_1_and_error_0(path, rank, factors):
    found = truncated_sum(factors, rank, path=path)
    assert found.A.shape == (1, IN)
    assert found.B.shape == (OUT, 1)
    assert found.error == 0.0
    assert not found.B.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", ["exact", 6], ids=str)
def test_the_stated_error_includes_the_rounding(dtype, rank):
    factors = SUMS["independent"]
    S = dense(factors)
    found = truncated_sum(factors, rank, dtype=dtype)
    error = torch.linalg.matrix_norm(S - found.B.double() @ found.A.double()) / torch.linalg.matrix_norm(S)
    assert found.error == pytest.approx(float(error), rel=1e-4)
    assert found.error > truncated_sum(factors, rank).error


def test_a_value_that_does_not_fit_is_refused():
    with pytest.raises(MergeError, match=r"does not fit into torch\.float16"):
        truncated_sum([Factor(B0 * 1e6, A0 * 1e6)], dtype=torch.float16)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(PATHS), st.integers(1, 9))
def test_small_sums_of_any_form(count, rank, seed, path, wanted):
    out, into = 11, 9
    factors = [
        Factor(normal(out, rank, seed=seed + i), normal(rank, into, seed=seed + 100 + i), float(i % 3 - 1))
        for i in range(count)
    ]
    S = dense(factors)
    found = truncated_sum(factors, wanted, path=path, dtype=torch.float64)
    optimum = torch.linalg.vector_norm(torch.linalg.svdvals(S)[wanted:])
    error = torch.linalg.matrix_norm(S - found.B @ found.A)
    assert error <= (1 + 1e-4) * optimum + 1e-6 * torch.linalg.matrix_norm(S)


def blocks_of(rows, columns, values):
    left, right = orthonormal(rows, len(values), 1), orthonormal(columns, len(values), 2)
    return [Factor(left[:, i : i + 8] * values[i : i + 8], right[:, i : i + 8].T) for i in range(0, len(values), 8)]


LARGE = {
    "flat": [Factor(normal(400, 8, seed=i), normal(8, 300, seed=50 + i), 1 / 40) for i in range(40)],
    "equal values": blocks_of(300, 400, torch.ones(240)),
    "steep": blocks_of(400, 300, 10.0 ** (-torch.arange(240) / 30)),
    "equal at the edge": blocks_of(400, 300, torch.cat([torch.full((40,), 2.0), torch.ones(200)])),
}


@pytest.mark.parametrize("rank", ["keep", 6, {"energy": 0.9, "max": 12}], ids=str)
@pytest.mark.parametrize("path", ["randomised", "dense"])
@pytest.mark.parametrize("name", LARGE)
def test_the_iteration_proves_the_bound(name, path, rank):
    factors = LARGE[name]
    S = dense(factors)
    norm, values = torch.linalg.matrix_norm(S), torch.linalg.svdvals(S)
    found = truncated_sum(factors, rank, path=path)
    assert found.path == path
    error = torch.linalg.matrix_norm(S - found.B.double() @ found.A.double())
    assert error <= (1 + 1e-4) * torch.linalg.vector_norm(values[found.A.shape[0] :]) + 1e-6 * norm
    assert found.error * norm == pytest.approx(float(error), rel=1e-6)


def test_the_iteration_gives_up_for_a_factorisation_when_it_cannot_prove_itself(monkeypatch):
    monkeypatch.setattr("raymerge.merging.randomised.MAX_STEPS", 1)
    factors = SUMS["more than the dense rank"]
    assert truncated_sum(factors, 6, path="randomised").path == "qr"
    monkeypatch.undo()
    many = [Factor(normal(400, 8, seed=i), normal(8, 300, seed=50 + i)) for i in range(8)]
    assert truncated_sum(many, 6, path="randomised").path == "randomised"


def cheapest(shape, inner, rank="keep", kept=16):
    rule = parse_rank(rank)
    estimated = costs(shape, inner, rule.ceiling(shape, kept), rule)
    return min(estimated, key=estimated.get)


def test_the_cost_model_forms_a_delta_only_where_that_is_cheapest():
    assert cheapest((2048, 2048), 80) == "gram"
    assert cheapest((256, 2048), 80) == "gram"
    assert cheapest((4096, 4096), 800, kept=4) == "randomised"
    assert cheapest((256, 2048), 3200) == "dense"
    assert cheapest((2048, 2048), 3200) == "dense"
    assert cheapest((8192, 28672), 160) == "gram"


def test_more_than_fits_side_by_side_is_summed_one_by_one(monkeypatch):
    monkeypatch.setattr(lowrank, "_MAX_STACKED", 1000)
    fetched = []

    def factors():
        for factor in SUMS["independent"]:
            fetched.append(factor.rank)
            yield factor

    found = truncate((OUT, IN), [4] * 5, factors, parse_rank("keep"))
    assert (found.path, fetched) == ("dense", [4] * 5)


@pytest.mark.parametrize("name", SUMS)
def test_the_norm_of_a_sum(name):
    factors = SUMS[name]
    expected = float(torch.linalg.matrix_norm(dense(factors)))
    ranks = [factor.rank for factor in factors]
    assert sum_norm((OUT, IN), ranks, lambda: iter(factors)) == pytest.approx(expected, rel=1e-4)


def test_what_makes_no_sum_is_refused():
    with pytest.raises(MergeError, match="no products"):
        truncated_sum([])
    with pytest.raises(MergeError, match="do not fit"):
        truncated_sum([Factor(B0, A0), Factor(B0[1:], A0)])
    with pytest.raises(RankError, match="exceeds"):
        truncated_sum([Factor(B0, A0)], 71)
    with pytest.raises(RankError, match="no rank"):
        truncated_sum([Factor(B0, A0)], 0)
