"""The dialect of mergekit against mergekit: every method, on deltas in the place of task vectors."""

import pytest
import torch

from raymerge.adapters.adapter import LoraModule
from raymerge.errors import MergeError
from raymerge.merging.dialects import DIALECTS
from raymerge.merging.dialects.draws import uniform
from raymerge.merging.rank import parse_rank
from raymerge.merging.site import Dense, Site, Weighted

registry = pytest.importorskip("mergekit.merge_methods.registry")
TensorGroup = pytest.importorskip("mergekit.merge_methods.base").TensorGroup

NAMES = ("a", "b", "c")
WEIGHTS = [(0.7, -0.4, 1.3), (1.0, 1.0, 1.0), (0.2, 0.5, 0.3)]
PER_EXPERT = {"density", "gamma", "epsilon"}
MEANS = {"slerp", "karcher", "linear"}  # of weights themselves: mergekit gives them no base
SPARSE = [
    ("task_arithmetic", {}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 0.4, "normalize": False, "rescale": True}),
    ("dare_linear", {"density": 0.5}),
    ("dare_linear", {"density": 0.5, "rescale": False, "normalize": True}),
    ("dare_ties", {"density": 0.5}),
    ("dare_ties", {"density": 0.5, "normalize": True}),
    ("della_linear", {"density": 0.5, "epsilon": 0.3}),
    ("della", {"density": 0.6}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.3}),
    ("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": 0.6, "rescale": True, "normalize": True}),
]


def make(seed=0, shapes=((10, 12),) * 3, ranks=(4, 2, 3), shared=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shapes[0][1], shapes[0][0], generator=generator)
    modules = []
    for (out, into), rank in zip(shapes, ranks, strict=True):
        A = torch.randn(rank, into, generator=generator) + shared * common[:into, :rank].T
        B = torch.randn(out, rank, generator=generator) + shared * common[:rank, :out].T
        modules.append(LoraModule(A.to(dtype), B.to(dtype), 0.5 + 0.25 * rank))
    return modules


def site_of(modules, weights, path="layer"):
    ranks = tuple(0 if module is None else module.rank for module in modules)
    shape = next(module.shape for module in modules if module is not None)
    names = NAMES[: len(modules)] if len(modules) <= 3 else tuple(f"{i:03}" for i in range(len(modules)))
    return Site(path, shape, names, tuple(weights), ranks, None, parse_rank("keep"), lambda: iter(modules))


def delta_of(site, method, **options):
    """The merged delta, with the defaults of the dialect."""
    chosen = DIALECTS["mergekit"][method]
    found = chosen.load()(site, **{**chosen.defaults, **options})
    if isinstance(found, Dense):
        return found.delta
    if isinstance(found, Weighted):
        deltas = [torch.zeros(site.shape) if m is None else m.delta() for m in site.read()]
        return sum(c * delta for c, delta in zip(found.coefficients, deltas, strict=True))
    return sum(f.weight * f.B.double() @ f.A.double() for f in found.factors)


def merged_by_mergekit(deltas, weights, method, **options):
    base_index = 0 if method == "slerp" else None
    tensors, ids = list(deltas), list(range(1, len(deltas) + 1))
    if method not in MEANS:
        base_index, tensors, ids = 0, [torch.zeros_like(deltas[0]), *tensors], [0, *ids]
    if method in {"linear", "task_arithmetic", *(name for name, _ in SPARSE)}:
        options["weight"] = dict(enumerate(weights, 1))
    experts = range(1, len(deltas) + 1)
    given = {key: dict.fromkeys(experts, value) if key in PER_EXPERT else value for key, value in options.items()}
    group = TensorGroup.from_tensors(tensors, ids=ids, base_index=base_index)
    (result,) = registry.get(method)([group], parameters=given)
    return result


def assert_same(found, expected, tolerance=1e-5):
    assert expected.norm() > 0
    assert (found - expected).norm() < tolerance * expected.norm()


@pytest.fixture
def same_draws(monkeypatch):
    """Let mergekit draw what the dialect draws: expert by expert."""
    asked = []

    def bernoulli(chances):
        asked.append(chances)
        name = NAMES[(len(asked) - 1) % len(NAMES)]
        return (uniform(7, name, "layer", chances.shape) < chances).to(chances.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return asked


def seeded(method):
    return {"seed": 7} if "seed" in DIALECTS["mergekit"][method].defaults else {}


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("method", "options"), SPARSE, ids=str)
def test_task_arithmetic_and_all_sparse_methods(method, options, weights, same_draws):
    modules = make()
    expected = merged_by_mergekit([m.delta() for m in modules], weights, method, **options)
    assert_same(delta_of(site_of(modules, weights), method, **options, **seeded(method)), expected)
    assert len(same_draws) == (3 if seeded(method) else 0)


@pytest.mark.parametrize("method", sorted({name for name, _ in SPARSE}))
def test_the_defaults_keep_everything(method):
    modules = make(1)
    expected = merged_by_mergekit([m.delta() for m in modules], (0.7, 0.4, 1.3), method)
    assert_same(delta_of(site_of(modules, (0.7, 0.4, 1.3)), method), expected)


@pytest.mark.parametrize(("method", "options"), [*SPARSE, ("linear", {})], ids=str)
def test_a_module_that_one_lacks_is_a_delta_of_zeros(method, options, same_draws):
    modules = make(2)
    deltas = [modules[0].delta(), modules[1].delta(), torch.zeros(modules[0].shape)]
    expected = merged_by_mergekit(deltas, (0.5, 0.7, 2.0), method, **options)
    found = delta_of(site_of([modules[0], modules[1], None], (0.5, 0.7, 2.0)), method, **options, **seeded(method))
    assert_same(found, expected)


@pytest.mark.parametrize(("method", "options"), [one for one in SPARSE if "della" in one[0]], ids=str)
def test_a_vector_is_one_row(method, options, same_draws):
    modules = make(3, shapes=((10, 1),) * 3, ranks=(1, 1, 1))
    expected = merged_by_mergekit([m.delta()[:, 0] for m in modules], (0.5, 0.7, 0.2), method, **options)

    assert_same(delta_of(site_of(modules, (0.5, 0.7, 0.2)), method, **options, seed=7)[:, 0], expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize):
    modules = make()
    expected = merged_by_mergekit([m.delta() for m in modules], (0.7, -0.4, 1.3), "linear", normalize=normalize)
    assert_same(delta_of(site_of(modules, (0.7, -0.4, 1.3)), "linear", normalize=normalize), expected)


def test_linear_with_weights_that_sum_to_zero():
    with pytest.raises(MergeError, match="the weights sum to 0"):
        delta_of(site_of(make(), (0.5, 0.5, -1.0)), "linear")


@pytest.mark.parametrize("shared", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t, shared):
    modules = make(shared=shared)[:2]
    expected = merged_by_mergekit([m.delta() for m in modules], (), "slerp", t=t)
    assert_same(delta_of(site_of(modules, (1.0, 1.0)), "slerp", t=t), expected)
    by_weights = delta_of(site_of(modules, (2 - 2 * t, 2 * t)), "slerp")
    assert_same(by_weights, expected)


def test_slerp_of_parallel_deltas_is_linear():
    (module, *_) = make()
    double = LoraModule(module.A, module.B, 2 * module.scaling)
    expected = merged_by_mergekit([module.delta(), double.delta()], (), "slerp", t=0.25)
    assert_same(delta_of(site_of([module, double], (1.0, 1.0)), "slerp", t=0.25), expected)


@pytest.mark.parametrize("max_iter", [1, 10])
@pytest.mark.parametrize("shared", [0.0, 1.0, -1.5])
def test_karcher(shared, max_iter):
    modules = make(5, shared=shared)
    deltas = [module.delta(torch.float64) for module in modules]
    expected = merged_by_mergekit(deltas, (), "karcher", max_iter=max_iter).float()
    assert_same(delta_of(site_of(modules, (0.4, 0.4, 0.4)), "karcher", max_iter=max_iter), expected)


def test_karcher_leaves_tiny_deltas_out_of_the_direction():
    modules = make(6)
    modules[1] = LoraModule(modules[1].A * 1e-8, modules[1].B, 1.0)
    deltas = [module.delta(torch.float64) for module in modules]
    expected = merged_by_mergekit(deltas, (), "karcher").float()
    assert_same(delta_of(site_of(modules, (1.0, 1.0, 1.0)), "karcher"), expected)
    silent = [LoraModule(m.A * 0, m.B, 1.0) for m in modules]
    assert not delta_of(site_of(silent, (1.0, 1.0, 1.0)), "karcher").any()


def test_karcher_of_opposite_deltas_is_refused():
    (module, *_) = make()
    opposite = LoraModule(module.A, -module.B, module.scaling)
    with pytest.raises(MergeError, match="opposite"):
        delta_of(site_of([module, opposite], (0.5, 0.5)), "karcher")


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_model_stock(shared, filter_wise):
    modules = make(8, shared=shared)
    expected = merged_by_mergekit([m.delta() for m in modules], (), "model_stock", filter_wise=filter_wise)
    assert_same(delta_of(site_of(modules, (1.0, 1.0, 1.0)), "model_stock", filter_wise=filter_wise), expected)
    deltas = [modules[0].delta(), modules[1].delta(), torch.zeros(modules[0].shape)]
    expected = merged_by_mergekit(deltas, (), "model_stock", filter_wise=filter_wise)
    lacking = site_of([modules[0], modules[1], None], (1.0, 1.0, 1.0))
    assert_same(delta_of(lacking, "model_stock", filter_wise=filter_wise), expected)


def test_model_stock_of_a_vector():
    modules = make(9, shapes=((10, 1),) * 3, ranks=(1, 1, 1))
    expected = merged_by_mergekit([m.delta()[:, 0] for m in modules], (), "model_stock", filter_wise=True)
    assert_same(delta_of(site_of(modules, (1.0, 1.0, 1.0)), "model_stock", filter_wise=True)[:, 0], expected)


@pytest.mark.parametrize("select_topk", [1.0, 0.5, 0.1])
def test_sce(select_topk):
    modules = make(10, shared=0.5)
    expected = merged_by_mergekit([m.delta() for m in modules], (), "sce", select_topk=select_topk)
    assert_same(delta_of(site_of(modules, (0.3, 0.3, 0.3)), "sce", select_topk=select_topk), expected)
    deltas = [modules[0].delta(), torch.zeros(modules[0].shape), modules[2].delta()]
    expected = merged_by_mergekit(deltas, (), "sce", select_topk=select_topk)
    lacking = site_of([modules[0], None, modules[2]], (0.3, 0.3, 0.3))
    assert_same(delta_of(lacking, "sce", select_topk=select_topk), expected)


@pytest.mark.parametrize("method", ["karcher", "sce", "model_stock"])
def test_methods_without_weights_want_equal_ones(method):
    with pytest.raises(MergeError, match=f"mergekit's {method} has no weights"):
        delta_of(site_of(make(), (0.5, 0.3, 0.2)), method)


def test_breadcrumbs_of_a_small_tensor_is_not_nothing():
    """Where gamma is less than one entry older versions dropped all; 0.1.5 drops no outlier."""
    modules = make(shapes=((4, 4),) * 3)
    expected = merged_by_mergekit([m.delta() for m in modules], (1.0, 1.0, 1.0), "breadcrumbs", density=0.5)
    found = delta_of(site_of(modules, (1.0, 1.0, 1.0)), "breadcrumbs", density=0.5)
    assert_same(found, expected)
    assert int(merged_by_mergekit([modules[0].delta()], [1.0], "breadcrumbs", density=0.5).count_nonzero()) == 8


def test_of_equal_entries_the_same_are_kept():
    """Products of numbers of few bits: many entries are equal."""
    generator = torch.Generator().manual_seed(0)
    modules = [
        LoraModule(torch.randint(-3, 4, (1, 40), generator=generator).float(),
                   torch.randint(-3, 4, (30, 1), generator=generator).float(), 1.0)
        for _ in NAMES
    ]  # fmt: skip
    deltas = [module.delta() for module in modules]
    for method, options in (("ties", {"density": 0.3}), ("breadcrumbs", {"density": 0.3, "gamma": 0.2})):
        expected = merged_by_mergekit(deltas, (0.5, 0.2, 0.4), method, **options)
        assert_same(delta_of(site_of(modules, (0.5, 0.2, 0.4)), method, **options), expected)


def test_epsilon_has_to_fit_the_density():
    deltas = [module.delta() for module in make()]
    with pytest.raises(ValueError, match="Epsilon"):
        merged_by_mergekit(deltas, (1.0, 1.0, 1.0), "della", density=0.9, epsilon=0.2)
    with pytest.raises(MergeError, match=r"epsilon 0\.2 does not go with density 0\.9"):
        delta_of(site_of(make(), (1.0, 1.0, 1.0)), "della", density=0.9, epsilon=0.2)


def test_it_equals_the_ties_of_peft_only_when_every_weight_is_one():
    modules = make()
    for weights, equal in (((1.0, 1.0, 1.0), True), ((0.5, 0.3, 0.2), False)):
        site = site_of(modules, weights)
        found = delta_of(site, "ties", density=0.5)
        peft = DIALECTS["peft"]["ties_svd"].load()(site, density=0.5, majority_sign_method="total").delta
        assert ((found - peft).norm() < 1e-5 * found.norm()) == equal


def test_an_embedding_is_turned_for_its_rows(same_draws):
    modules = [LoraModule(m.A, m.B, m.scaling, embedding=True) for m in make(4)]
    deltas = [module.delta().T.contiguous() for module in modules]
    expected = merged_by_mergekit(deltas, (0.5, 0.2, 0.4), "della", density=0.5)
    assert_same(delta_of(site_of(modules, (0.5, 0.2, 0.4)), "della", density=0.5, seed=7).T, expected)
