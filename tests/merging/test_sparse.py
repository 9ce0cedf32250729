"""The sparse methods: a dense float64 reference of each, and their laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.adapters import LoraModule
from raymerge.merging import sparsify, thresholds, tiles
from raymerge.merging.masks import WHOLE, Draw
from raymerge.merging.methods import METHODS, sparse
from raymerge.merging.rank import RankRule
from raymerge.merging.site import Site

SHAPE = (150, 40)  # rows that no tile divides
PARAMETERS = {
    "magnitude_prune": {"density": 0.3},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.6, "seed": 1},
    "dare_ties": {"density": 0.6, "seed": 1},
    "della_linear": {"density": 0.6, "epsilon": 0.3, "seed": 1},
    "della": {"density": 0.6, "epsilon": 0.3, "seed": 1},
    "breadcrumbs": {"density": 0.5, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.05},
    "sce": {"density": 0.3},
}
WHOLE_DENSITY = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}
ELECTED = ("ties", "dare_ties", "della", "breadcrumbs_ties")
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
weights_st = st.lists(st.floats(-2, 2).map(lambda w: round(w, 2)), min_size=4, max_size=4)


def module(seed, rank=3, shape=SHAPE, dtype=torch.float64, scaling=0.5):
    own, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(999)

    def factor(*size):
        start = torch.randn(*size, generator=common, dtype=torch.float64)
        return (start + torch.randn(*size, generator=own, dtype=torch.float64)).to(dtype)

    return LoraModule(factor(rank, shape[1]), factor(shape[0], rank), scaling)


def mixed(seed=0, dtype=torch.float64, shape=SHAPE):
    """Experts of several ranks and scalings, one that lacks the module, one that is dense."""
    dense = module(seed + 3, shape=shape, dtype=dtype)
    whole = LoraModule(torch.eye(shape[1], dtype=dtype), dense.delta(dtype) * 2, 0.5)
    return [module(seed, 3, shape, dtype), None, module(seed + 1, 5, shape, dtype, 0.25), whole]


def site_of(modules, weights, anchor=None, names=None, shape=SHAPE):
    names = names or [f"expert {i}" for i in range(len(modules))]
    ranks = tuple(0 if m is None else m.rank for m in modules)
    return Site(
        "layers.0.q", shape, tuple(names), tuple(weights), ranks, anchor, RankRule("exact"), lambda: iter(modules)
    )


def run(method, site, **parameters):
    return getattr(sparse, method)(site, **{**PARAMETERS[method], **parameters}).delta


def nothing_left_out(method):
    return {key: value for key, value in WHOLE_DENSITY.items() if key in PARAMETERS[method]}


def dense(modules, anchor=None, shape=SHAPE):
    zero = torch.zeros(shape, dtype=torch.float64)
    start = zero if anchor is None else anchor.delta(torch.float64)
    return [(zero if m is None else m.delta(torch.float64)) - start for m in modules]


def close(left, right, relative=1e-9):
    assert float((left.double() - right).norm()) <= relative * max(float(right.norm()), 1e-12)


# A plain reference: whole matrices, one line of the definition after the other.


def between(x, density, gamma=0.0):
    count = x.numel()
    kept = max(round(density * count), 1)
    dropped = min(math.floor(gamma * count + 1e-9), count - kept)
    ordered = x.abs().flatten().sort(descending=True).values
    return torch.where((x.abs() <= ordered[dropped]) & (x.abs() >= ordered[dropped + kept - 1]), x, 0.0)


def drawn(x, probability, seed, name):
    numbers = torch.from_numpy(
        Draw.of(seed, name, "layers.0.q").numbers(slice(0, x.shape[0]), x.shape[1]).astype(float)
    )
    return torch.where(numbers < probability * WHOLE, x / probability, 0.0)


def by_rank(x, density, epsilon):
    ranks = x.abs().float().argsort(dim=1, stable=True).argsort(dim=1).double() / (x.shape[1] - 1)
    half = min(epsilon / 2, 1 - density, density / 2)
    return torch.round((density - half + 2 * half * ranks) * WHOLE) / WHOLE


def mean_of_the_majority(votes, numerators, weights, majority_sign="total"):
    total = sum(votes)
    total[total.abs() < 1e-12 * sum(v.abs() for v in votes)] = 0
    if majority_sign == "frequency":
        count = sum(abs(w) * v.sign() for v, w in zip(votes, weights, strict=True))
        total = torch.where(count.abs() > 1e-12, count, total)
    above = divisor = torch.zeros_like(total)
    for vote, numerator, weight in zip(votes, numerators, weights, strict=True):
        agrees = (vote * total > 0).double()
        above, divisor = above + agrees * numerator, divisor + agrees * abs(weight)
    return torch.where(divisor > 0, above / divisor, 0.0) * sum(abs(w) for w in weights)


def reference(method, deltas, weights, names, density, epsilon=0.0, gamma=0.0, seed=0, majority_sign="total"):
    if method == "sce":
        return sce_reference(deltas, weights, density)
    if method in RANDOM:
        shares = [torch.full_like(x, density) if "dare" in method else by_rank(x, density, epsilon) for x in deltas]
        kept = [drawn(x, p, seed, name) for x, p, name in zip(deltas, shares, names, strict=True)]
    else:
        kept = [between(x, density, gamma) for x in deltas]
    kept = [w * x for w, x in zip(weights, kept, strict=True)]
    if method not in ELECTED:
        return sum(kept)
    votes = [w * x for w, x in zip(weights, deltas, strict=True)] if method in RANDOM else kept
    return mean_of_the_majority(votes, kept, weights, majority_sign)


def sce_reference(deltas, weights, density):
    live = [(x, w) for x, w in zip(deltas, weights, strict=True) if w != 0]
    if not any(x.any() for x, _ in live):
        return torch.zeros_like(deltas[0])
    variance = torch.stack([x for x, _ in live]).var(dim=0, unbiased=False)
    none = variance < 1e-24
    kept = max(round(density * int((~none).sum())), 1)
    chosen = none | (variance >= variance.flatten().sort(descending=True).values[kept - 1])
    shares = [w * float((x * chosen).square().mean()) for x, w in live]
    whole = sum(abs(w) for _, w in live) / sum(abs(s) for s in shares)
    parts = [s * whole * x * chosen for (x, _), s in zip(live, shares, strict=True)]
    return mean_of_the_majority(parts, parts, [s * whole for s in shares])


@pytest.mark.parametrize("method", PARAMETERS)
@given(weights=weights_st, seed=st.integers(0, 1000), anchored=st.booleans(), density=st.floats(0.01, 1))
def test_against_the_dense_reference(method, weights, seed, anchored, density):
    modules, anchor = mixed(seed), module(seed + 7, 2) if anchored else None
    site = site_of(modules, weights, anchor)
    parameters = {**PARAMETERS[method], "density": density}
    majority = {"majority_sign": "frequency"} if method in ELECTED and seed % 2 else {}
    wanted = reference(method, dense(modules, anchor), weights, site.names, **parameters, **majority)
    found = run(method, site, **parameters, **majority)
    assert found.dtype == torch.float64
    close(found, wanted, 1e-6 if method in RANDOM else 1e-9)  # probabilities are whole numbers of 2^-32


@pytest.mark.parametrize("method", PARAMETERS)
def test_in_float32_too(method):
    modules, weights = mixed(dtype=torch.bfloat16), [0.5, 0.2, -0.3, 0.6]
    found = run(method, site_of(modules, weights))
    assert found.dtype == torch.float32
    names = [f"expert {i}" for i in range(4)]
    close(found, reference(method, dense(modules), weights, names, **PARAMETERS[method]), 2e-2)


@pytest.mark.parametrize("method", PARAMETERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (300, 1), (70, 3)], ids=str)
def test_vectors_and_small_modules(method, shape):
    bias = module(1, 1, shape)
    modules = [LoraModule(torch.ones(1, shape[1], dtype=torch.float64), bias.B, 2.0), module(2, 1, shape)]
    found = run(method, site_of(modules, [0.5, 0.5], shape=shape), **nothing_left_out(method))
    assert found.shape == shape
    wanted = dense(modules, shape=shape)
    if method not in (*ELECTED, "sce"):
        close(found, 0.5 * wanted[0] + 0.5 * wanted[1])
    run(method, site_of(modules, [0.5, 0.5], shape=shape))


# Laws.


@pytest.mark.parametrize("method", PARAMETERS)
@given(weights=weights_st, factor=st.floats(-4, 4).filter(lambda f: abs(f) > 0.01))
def test_degree_one_in_the_weights(method, weights, factor):
    modules = mixed()
    one = run(method, site_of(modules, weights))
    close(run(method, site_of(modules, [factor * w for w in weights])), factor * one)


@pytest.mark.parametrize("method", PARAMETERS)
@given(seed=st.integers(0, 1000), condition=st.floats(1, 10), anchored=st.booleans())
def test_rewriting_the_factors_does_not_change_a_result(method, seed, condition, anchored):
    def rewritten(m):
        if m is None:
            return None
        generator = torch.Generator().manual_seed(seed)
        Q, _ = torch.linalg.qr(torch.randn(m.rank, m.rank, generator=generator, dtype=torch.float64))
        R = Q * torch.logspace(0, math.log10(condition), m.rank, dtype=torch.float64)
        return LoraModule(torch.linalg.solve(R, m.A), m.B @ R, m.scaling)

    twin = module(seed)
    modules = [*mixed(seed), twin, rewritten(twin)]  # the last two cancel: which sign has their sum?
    weights = [0.5, 0.1, -0.3, 0.4, 0.2, -0.2]
    anchor = module(seed + 9) if anchored else None
    one = run(method, site_of(modules, weights, anchor))
    other = run(method, site_of([rewritten(m) for m in modules], weights, rewritten(anchor)))
    close(other, one, 1e-4)


@pytest.mark.parametrize("method", PARAMETERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_copies_are_the_adapter_itself_at_density_one(method, dtype, count):
    one = module(4, dtype=dtype)
    found = run(method, site_of([one] * count, [1 / count] * count), density=1.0)  # epsilon and gamma as they are
    close(found, one.delta(torch.float64), 1e-6)


@pytest.mark.parametrize("method", [m for m in PARAMETERS if m not in RANDOM])
def test_copies_are_one_copy(method):
    one = module(4)
    close(run(method, site_of([one] * 5, [0.2] * 5)), run(method, site_of([one], [1.0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sce_keeps_every_entry_of_copies_however_they_are_written(dtype):
    one = module(4, dtype=dtype)
    other = LoraModule((one.A.double() / 3).to(dtype), (one.B.double() * 3).to(dtype), one.scaling)
    close(run("sce", site_of([one, other], [0.5, 0.5]), density=0.1), one.delta(torch.float64), 1e-6)


@pytest.mark.parametrize("method", [m for m in PARAMETERS if m not in (*ELECTED, "sce")])
@given(weights=weights_st, gamma=st.floats(0, 0.9))
def test_nothing_left_out_is_linear(method, weights, gamma):
    modules = mixed()
    own = {"gamma": gamma} if "gamma" in PARAMETERS[method] else {}
    found = run(method, site_of(modules, weights), **{**nothing_left_out(method), **own})
    wanted = sum(w * x for w, x in zip(weights, dense(modules), strict=True))
    assert float((found - wanted).norm()) <= 1e-9 * sum(float(x.norm()) for x in dense(modules))


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("weights", [[0.5, 0.1, 0.3, 0.1], [0.5, 0.1, -0.3, 0.7]], ids=str)
def test_random_drops_are_right_in_expectation(method, weights):
    """The mean of 400 draws lies within its own standard error of what nothing dropped gives, as often as it should."""
    modules, draws = mixed(), 400
    whole = run(method, site_of(modules, weights), **nothing_left_out(method))
    total, squares = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    for seed in range(draws):
        one = run(method, site_of(modules, weights), seed=seed)
        total += one
        squares += one.square()
    mean = total / draws
    error = ((squares / draws - mean.square()) / (draws - 1)).sqrt()
    live = whole != 0
    assert torch.equal(mean == 0, whole == 0)
    off = ((mean - whole) / error)[live]
    assert float(off.abs().max()) < 6
    assert float(off.square().mean()) == pytest.approx(1, abs=0.1)


def test_zero_weights_zero_experts_and_zero_deltas():
    nothing = LoraModule(torch.randn(2, 40), torch.zeros(150, 2), 1.0)
    for method in PARAMETERS:
        assert torch.count_nonzero(run(method, site_of([None, nothing], [1.0, 1.0]))) == 0
        assert torch.count_nonzero(run(method, site_of([module(1)], [0.0]))) == 0
        assert torch.count_nonzero(run(method, site_of([module(1), module(1)], [1.0, -1.0]))) == 0 or method in (
            "dare_linear", "della_linear",
        )  # fmt: skip
        start = module(1, dtype=torch.bfloat16)
        assert torch.count_nonzero(run(method, site_of([start, start], [0.5, 0.5], start))) == 0


def test_experts_that_agree_with_no_sign_count_in_the_sum_of_weights():
    one = module(1)
    close(run("ties", site_of([one, None], [0.5, 0.5]), density=1.0), one.delta(torch.float64))


# What is kept.


@given(st.integers(0, 1000), st.floats(0.001, 1), st.floats(0, 0.99))
def test_exactly_so_many_entries_are_kept(seed, density, gamma):
    one, count = module(seed), math.prod(SHAPE)
    wanted = max(round(density * count), 1)
    assert torch.count_nonzero(run("magnitude_prune", site_of([one], [1.0]), density=density)) == wanted
    kept = run("breadcrumbs", site_of([one], [1.0]), density=density, gamma=gamma)
    assert torch.count_nonzero(kept) == wanted
    dropped = min(math.floor(gamma * count + 1e-9), count - wanted)
    larger = one.delta(torch.float64).abs() > kept.abs().max() * (1 + 1e-12)
    assert torch.count_nonzero(larger) == dropped


def test_entries_as_large_as_the_last_one_are_kept_too():
    signs = LoraModule(torch.ones(1, 40), torch.ones(150, 1), 1.0)
    assert torch.count_nonzero(run("magnitude_prune", site_of([signs], [1.0]), density=0.1)) == 6000


def test_breadcrumbs_of_few_entries_are_not_all_zero():
    one = module(1, 1, (3, 4))
    found = run("breadcrumbs", site_of([one], [1.0], shape=(3, 4)), density=1.0, gamma=0.01)
    close(found, one.delta(torch.float64))


def test_della_keeps_large_entries_of_a_row_more_often():
    one = module(1)
    x = one.delta(torch.float64)
    kept = sum((run("della_linear", site_of([one], [1.0]), seed=seed) != 0).double() for seed in range(200)) / 200
    order = x.abs().argsort(dim=1)
    by_place = kept.gather(1, order).mean(0)
    assert float((by_place - torch.linspace(0.45, 0.75, 40)).abs().max()) < 0.015  # 6 standard errors of 30,000 draws


@pytest.mark.parametrize(("density", "epsilon"), [(0.02, 0.5), (0.97, 0.5), (0.5, 0.99), (1.0, 0.5)])
def test_della_keeps_its_density_where_the_range_is_narrowed(density, epsilon):
    one = module(1)
    parameters = {"density": density, "epsilon": epsilon}
    found = [run("della_linear", site_of([one], [1.0]), seed=seed, **parameters) for seed in range(20)]
    share = sum(int(torch.count_nonzero(x)) for x in found) / (20 * 6000)
    assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / 120_000) + 1e-12
    largest = max(float((x / one.delta(torch.float64)).abs().max()) for x in found)
    assert largest <= 2 / density + 1e-9


def test_the_draw_depends_on_seed_name_and_module():
    one = module(1)
    first = run("dare_linear", site_of([one], [1.0]))
    assert torch.equal(first, run("dare_linear", site_of([one], [1.0])))
    assert not torch.equal(first, run("dare_linear", site_of([one], [1.0]), seed=2))
    assert not torch.equal(first, run("dare_linear", site_of([one], [1.0], names=["other"])))


# Memory and inputs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", PARAMETERS)
def test_memory_changes_no_byte(method, dtype, monkeypatch):
    """Experts that are streamed in lots, over groups of rows, against experts that are held."""
    modules, weights = mixed(dtype=dtype), [0.5, 0.2, -0.3, 0.6]
    site = site_of(modules, weights, module(9, dtype=dtype))
    plain = run(method, site)
    monkeypatch.setattr(tiles, "TILE", 700)  # 16 rows
    monkeypatch.setattr(thresholds, "FEW", 100)
    monkeypatch.setattr(sparsify, "FEW", 100)
    held = run(method, site)
    close(held, plain.double(), 1e-5)
    monkeypatch.setattr(tiles, "HELD", 10_000)
    for sums in (1, 100_000, 10**9):
        monkeypatch.setattr(tiles, "SUMS", sums)
        assert torch.equal(run(method, site), held)


def test_experts_are_read_once_for_each_group_of_rows(monkeypatch):
    reads = []

    def read():
        reads.append(1)
        return iter(mixed())

    site = Site("m", SHAPE, tuple("abcd"), (0.25,) * 4, (3, 0, 5, 40), None, RankRule("exact"), read)
    run("ties", site)
    assert len(reads) == 1
    monkeypatch.setattr(tiles, "HELD", 0)
    run("ties", site)
    assert len(reads) == 3  # to see whether they fit, and then for all rows at once
    monkeypatch.setattr(tiles, "TILE", 64 * 40)
    monkeypatch.setattr(tiles, "SUMS", 1)
    run("ties", site)
    assert len(reads) == 3 + 1 + 3  # for each 64 rows


@pytest.mark.parametrize("method", PARAMETERS)
def test_inputs_stay_as_they_are(method):
    modules, anchor = [m for m in mixed() if m is not None], module(9)
    before = [(m.A.clone(), m.B.clone()) for m in (*modules, anchor)]
    run(method, site_of(modules, [0.5, 0.2, -0.3], anchor))
    run(method, site_of(modules, [1.0, 1.0, 1.0]))
    for m, (A, B) in zip((*modules, anchor), before, strict=True):
        assert torch.equal(m.A, A)
        assert torch.equal(m.B, B)


def test_the_registry_names_each_with_these_parameters():
    for name, parameters in PARAMETERS.items():
        method = METHODS[name]
        assert method.load() is getattr(sparse, name)
        assert set(parameters) <= set(method.defaults)
