"""The dialect of PEFT against PEFT: every combination type of `add_weighted_adapter`, number by number."""

import math

import peft.utils.merge_utils as theirs
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from raymerge.adapters.adapter import LoraModule
from raymerge.errors import MergeError
from raymerge.merging.dialects import DIALECTS
from raymerge.merging.dialects.draws import uniform
from raymerge.merging.dialects.selection import keep_largest, topk
from raymerge.merging.rank import parse_rank
from raymerge.merging.site import Dense, Site, Weighted

SHAPE = (10, 12)
WEIGHTS = [(0.7, -0.4, 1.3), (1.0, 1.0, 1.0), (0.2, 0.5, 0.3)]
PRUNED = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(SHAPE[1], SHAPE[0])
        self.words = nn.Embedding(SHAPE[1], SHAPE[0])

    def forward(self, x):
        return self.first(x)


def build(adapters, targets=("first",), coarse=False):
    """A PEFT model with adapters p, q, ..., each (rank, alpha) of random factors; coarse: that fit bfloat16."""
    torch.manual_seed(3)
    model = None
    for name, (rank, alpha) in zip("pqstuv", adapters, strict=False):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        if model is None:
            model = get_peft_model(Base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter)
            if coarse:
                parameter.data = parameter.data.bfloat16().float()
    return model


def module_of(model, adapter, path="first"):
    layer = model.get_submodule(f"base_model.model.{path}")
    if adapter in layer.lora_A:
        return LoraModule(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
    A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return LoraModule(A, B, layer.scaling[adapter], embedding=True)


def site_of(modules, weights, path="first"):
    names = tuple("pqstuv"[: len(modules)])
    ranks = tuple(0 if module is None else module.rank for module in modules)
    shape = next(module.shape for module in modules if module is not None)
    return Site(path, shape, names, tuple(weights), ranks, None, parse_rank("keep"), lambda: iter(modules))


def delta_of(site, method, **parameters):
    with torch.no_grad():
        found = DIALECTS["peft"][method].load()(site, **parameters)
        if isinstance(found, Dense):
            return found.delta
        if isinstance(found, Weighted):
            terms = zip(found.coefficients, site.read(), strict=True)
            return sum((c * module.delta() for c, module in terms if module is not None), torch.zeros(site.shape))
        return sum((f.weight * f.B @ f.A for f in found.factors), torch.zeros(site.shape))


def merged_by_peft(model, names, weights, method, path="first", **options):
    if method.endswith("svd"):
        options["svd_rank"] = min(SHAPE)
    model.add_weighted_adapter(list(names), list(weights), "merged", combination_type=method, **options)
    delta = model.get_submodule(f"base_model.model.{path}").get_delta_weight("merged").detach()
    model.delete_adapter("merged")
    return delta


def same_drops(monkeypatch, seed, names, path="first"):
    """Let PEFT drop what the dialect drops; it asks expert by expert, first for all A."""
    asked = []

    def pruning(tensor, density, rescale):
        factors = tensor.shape != SHAPE
        suffix = (".lora_A" if len(asked) < len(names) else ".lora_B") if factors else ""
        mask = uniform(seed, names[len(asked) % len(names)], path + suffix, tensor.shape) < density
        asked.append(tensor)
        return tensor * mask / density if rescale else tensor * mask

    monkeypatch.setattr(theirs, "random_pruning", pruning)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("method", sorted(DIALECTS["peft"]))
def test_every_combination_type_is_what_peft_computes(method, weights, monkeypatch):
    model = build([(4, 8), (4, 3), (4, 16)])
    pruned = any(method.startswith(name) for name in PRUNED)
    options = {"density": 0.4} if pruned else {}
    seed = {"seed": 5} if method.startswith("dare") else {}
    same_drops(monkeypatch, 5, "pqs")
    expected = merged_by_peft(model, "pqs", weights, method, **options)
    ours = delta_of(
        site_of([module_of(model, name) for name in "pqs"], weights), method, **defaults(method, options, seed)
    )
    assert torch.linalg.matrix_norm(expected) > 0.1
    assert_same(ours, expected)


def assert_same(found, expected):
    assert torch.linalg.matrix_norm(found - expected) < 1e-5 * torch.linalg.matrix_norm(expected)


def defaults(method, *given):
    parameters = dict(DIALECTS["peft"][method].defaults)
    for one in given:
        parameters.update(one)
    return parameters


@pytest.mark.parametrize("method", ["ties", "ties_svd", "dare_ties", "dare_ties_svd"])
def test_signs_by_frequency(method, monkeypatch):
    model = build([(4, 8), (4, 3), (4, 16)])
    same_drops(monkeypatch, 0, "pqs")
    options = {"density": 0.6, "majority_sign_method": "frequency"}
    expected = merged_by_peft(model, "pqs", (0.7, -0.4, 1.3), method, **options)
    site = site_of([module_of(model, name) for name in "pqs"], (0.7, -0.4, 1.3))
    assert_same(delta_of(site, method, **defaults(method, options)), expected)
    other = delta_of(site, method, **defaults(method, options, {"majority_sign_method": "total"}))
    assert torch.linalg.matrix_norm(other - expected) > 0.01


@pytest.mark.parametrize("method", ["linear", "cat", "ties", "ties_svd", "magnitude_prune", "svd"])
def test_embeddings(method):
    model = build([(4, 8), (4, 3)], targets=["words"])
    options = {"density": 0.5} if method in ("ties", "ties_svd", "magnitude_prune") else {}
    expected = merged_by_peft(model, "pq", (0.7, -0.4), method, path="words", **options)
    site = site_of([module_of(model, name, "words") for name in "pq"], (0.7, -0.4), "words")
    assert_same(delta_of(site, method, **defaults(method, options)).T, expected)


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "magnitude_prune_svd"])
def test_ranks_that_differ(method):
    model = build([(4, 8), (2, 3)])
    options = {"density": 0.5} if "_" in method else {}
    expected = merged_by_peft(model, "pq", (0.7, 0.4), method, **options)
    site = site_of([module_of(model, name) for name in "pq"], (0.7, 0.4))
    assert_same(delta_of(site, method, **defaults(method, options)), expected)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_factors_of_ranks_that_differ_are_refused_as_peft_refuses_them(method):
    model = build([(4, 8), (2, 3)])
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(["p", "q"], [0.5, 0.5], "merged", combination_type=method, density=0.5)
    site = site_of([module_of(model, name) for name in "pq"], (0.5, 0.5))
    options = {"density": 0.5} if method != "linear" else {}
    with pytest.raises(MergeError, match=r"^peft's .* one rank.\nFound ranks 2, 4; .*svd"):
        delta_of(site, method, **defaults(method, options))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "cat", "ties_svd", "magnitude_prune_svd"])
def test_one_adapter_is_only_weighted(method):
    model = build([(4, 8)])
    options = {} if method == "cat" else {"density": 0.2}
    expected = merged_by_peft(model, "p", [-0.6], method, **options)
    site = site_of([module_of(model, "p")], [-0.6])
    assert_same(delta_of(site, method, **defaults(method, options)), expected)


@pytest.mark.parametrize("method", ["linear", "ties", "ties_svd", "svd", "cat"])
def test_a_module_that_one_lacks_is_left_out(method):
    model = build([(4, 8), (4, 3)])
    lacking = LoraConfig(r=4, lora_alpha=8, target_modules=["words"])
    model.add_adapter("s", lacking)
    options = {"density": 0.5} if "ties" in method else {}
    expected = merged_by_peft(model, "pqs", (0.7, 0.4, 9.0), method, **options)
    site = site_of([module_of(model, "p"), module_of(model, "q"), None], (0.7, 0.4, 9.0))
    assert_same(delta_of(site, method, **defaults(method, options)), expected)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.9])
def test_of_equal_entries_the_same_are_kept(density):
    """bfloat16 has 8 bits: hundreds of entries are as large as the smallest that is kept."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(16, 2048).to(dtype).float()
        expected = theirs.magnitude_based_pruning(x, density)
        assert torch.equal(keep_largest(x, int(density * x.numel()), topk), expected)
    mostly_zero = torch.randn(40, 50).relu() * (torch.rand(40, 50) < 0.1)
    expected = theirs.magnitude_based_pruning(mostly_zero, 0.5)
    assert torch.equal(keep_largest(mostly_zero, 1000, topk), expected)


def test_coarse_factors_give_what_peft_gives():
    model = build([(4, 8), (4, 3)], coarse=True)
    expected = merged_by_peft(model, "pq", (0.7, 0.4), "ties", density=0.3)
    modules = [module_of(model, name) for name in "pq"]
    stored = [LoraModule(m.A.bfloat16(), m.B.bfloat16(), m.scaling) for m in modules]
    found = delta_of(site_of(stored, (0.7, 0.4)), "ties", **defaults("ties", {"density": 0.3}))
    assert_same(found, expected)


def test_ties_shrinks_what_it_merges():
    """Weights of 1/N and a division by the votes: N copies of one adapter come back N times too small."""
    model = build([(4, 8)])
    module, count = module_of(model, "p"), 5
    site = site_of([module] * count, [1 / count] * count)
    found = delta_of(site, "ties_svd", density=1.0, majority_sign_method="total")
    assert_same(found, module.delta().detach() / count)


def test_linear_is_not_the_sum_and_depends_on_the_factors():
    model = build([(4, 8), (4, 3)])
    a, b = (module_of(model, name) for name in "pq")
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    rewritten = LoraModule(turn.T @ a.A, a.B @ turn, a.scaling)
    assert_same(rewritten.delta(), a.delta())
    one, other = (delta_of(site_of([first, b], (0.5, 0.5)), "linear") for first in (a, rewritten))
    assert torch.linalg.matrix_norm(one - other) > 0.5 * torch.linalg.matrix_norm(one)


def test_density_has_to_be_given():
    model = build([(4, 8), (4, 3)])
    site = site_of([module_of(model, name) for name in "pq"], (0.5, 0.5))
    with pytest.raises(MergeError, match="PEFT has no default"):
        delta_of(site, "ties", **defaults("ties"))


def test_float64_stays_float64():
    torch.manual_seed(0)
    modules = [LoraModule(torch.randn(3, 12), torch.randn(10, 3, dtype=torch.float64), 2.0) for _ in range(3)]
    modules[0] = LoraModule(torch.randn(3, 12), torch.randn(10, 3), 1.0)
    merged = delta_of(site_of(modules, (0.5, -0.5, 1.0)), "ties_svd", **defaults("ties_svd", {"density": 0.5}))
    assert merged.dtype == torch.float64
    deltas = [module.delta(torch.float64) for module in modules]
    weights = torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(merged, theirs.ties(deltas, weights, 0.5), rtol=1e-5, atol=1e-5)


def test_drops_differ_by_expert_tensor_and_seed_only():
    first = uniform(0, "a", "m", (50, 40))
    assert torch.equal(first, uniform(0, "a", "m", (50, 40)))
    for other in (uniform(1, "a", "m", (50, 40)), uniform(0, "b", "m", (50, 40)), uniform(0, "a", "n", (50, 40))):
        assert abs(float(((first < 0.5) == (other < 0.5)).float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(2000)


def test_trained_biases_are_lost_and_whole_tensors_refused():
    module = LoraModule(torch.ones(1, 1), torch.randn(10, 1), 2.0)
    assert not delta_of(site_of([module, module], (0.5, 0.5), "first.bias"), "ties", density=0.5, seed=0).any()
    model = build([(4, 8)])
    with pytest.raises(MergeError, match="stored whole"):
        delta_of(site_of([module_of(model, "p")], [1.0], "head.weight"), "linear")
