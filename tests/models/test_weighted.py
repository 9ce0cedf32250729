"""Weighted groups compute what dense models compute, and so do the gradients of weights, factors and inputs."""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel, load_base
from raymerge.models.layers import is_transposed, linear_modules
from raymerge.models.multilora import MultiLora

needs_bits = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
IDS = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))
EXPERTS = torch.tensor([[0, 2], [3, -1], [1, 0]])  # three groups of two rows
WEIGHTS = torch.tensor([[0.7, -0.4], [1.2, 5.0], [0.3, 0.9]])


def double(base: BaseModel) -> BaseModel:
    """The same base in float64."""
    return replace(base, model=copy.deepcopy(base.model).double(), dtype=torch.float64)


def loss_of(logits: Tensor) -> Tensor:
    """Something of all logits whose gradient differs from place to place."""
    places = torch.arange(logits.numel(), dtype=logits.dtype, device=logits.device)
    return (logits * places.cos().view(logits.shape)).sum() + (logits**2).sum() / 7


def attached(base: BaseModel, adapters: Sequence[LoraAdapter]) -> MultiLora:
    lora = MultiLora(base.model)
    lora.load(adapters)
    return lora


def dense_logits(
    model: Any, adapters: Sequence[LoraAdapter], mixture: Tensor, factors: Mapping[str, Tensor], embedded: Tensor
) -> Tensor:
    """Logits of rows with deltas added to the layers' weights, all of it seen by autograd; mixture (adapters,)."""
    layers = linear_modules(model)
    weights = {}
    for name in {path for adapter in adapters for path in adapter.modules}:
        deltas = [
            mixture[number] * adapter.modules[name].delta(torch.float64)
            for number, adapter in enumerate(adapters)
            if name in adapter.modules
        ]
        delta = torch.stack(deltas).sum(0) * factors.get(name, 1.0)
        weights[f"{name}.weight"] = layers[name].weight + (delta.T if is_transposed(layers[name]) else delta)
    return functional_call(model, weights, kwargs={"inputs_embeds": embedded}).logits


def by_dense(
    base: BaseModel, adapters: Sequence[LoraAdapter], weights: Tensor, factors: Mapping[str, Tensor], embedded: Tensor
) -> Tensor:
    """Logits of the batch of EXPERTS, group after group."""
    size = len(embedded) // len(EXPERTS)
    found = []
    for group, own in enumerate(EXPERTS.tolist()):
        mixture = torch.zeros(len(adapters), dtype=weights.dtype)
        for place, expert in enumerate(own):
            if expert >= 0:
                mixture = mixture.index_add(0, torch.tensor([expert]), weights[group, place : place + 1])
        rows = embedded[group * size : (group + 1) * size]
        found.append(dense_logits(base.model, adapters, mixture, factors, rows))
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_those_of_dense_models(
    base: BaseModel,
    gpt2: BaseModel,
    varied: list[LoraAdapter],
    make_adapter: Callable[..., LoraAdapter],
    kind: str,
) -> None:
    """Adapters of different ranks, some without some modules; somebody has one expert less than the others."""
    exact = double(base if kind == "llama" else gpt2)
    adapters = varied if kind == "llama" else [make_adapter(exact, seed, rank=seed + 1) for seed in range(4)]
    names = attached(exact, adapters).module_names
    plain = double(base if kind == "llama" else gpt2)
    lora = attached(exact, adapters)

    def run(ours: bool) -> tuple[Tensor, ...]:
        weights = WEIGHTS.double().requires_grad_()
        factors = {
            name: torch.tensor(0.5 + i / 10, dtype=torch.float64, requires_grad=True)
            for i, name in enumerate(names[::3])
        }
        embedded = exact.model.get_input_embeddings()(IDS).detach().requires_grad_()
        if ours:
            with lora.weighted(EXPERTS, weights, factors):
                logits = exact.model(inputs_embeds=embedded).logits
        else:
            logits = by_dense(plain, adapters, weights, factors, embedded)
        loss_of(logits).backward()
        return logits.detach(), weights.grad, embedded.grad, *(factor.grad for factor in factors.values())

    for found, wanted in zip(run(True), run(False), strict=True):
        assert float(wanted.abs().max()) > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


class Small(nn.Module):
    """Two layers; `flat` joins batch and tokens before them."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.first, self.second, self.flat = nn.Linear(4, 5), nn.Linear(5, 3, bias=False), flat

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(0, 1) if self.flat else x).tanh()).view(*x.shape[:2], 3)


def small(flat: bool, ranks: Sequence[int] = (2, 1, 3)) -> tuple[nn.Module, MultiLora]:
    """A float64 model with adapters; every other lacks the second layer."""
    generator = torch.Generator().manual_seed(5)

    def module(inner: int, outer: int, rank: int) -> LoraModule:
        A = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
        return LoraModule(A, torch.randn(outer, rank, generator=generator, dtype=torch.float64), 1.5)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small(flat).double().requires_grad_(False)
    adapters = []
    for number, rank in enumerate(ranks):
        modules = {"first": module(4, 5, rank)}
        if number % 2 == 0:
            modules["second"] = module(5, 3, rank)
        adapters.append(LoraAdapter(f"a{number}", modules))
    lora = MultiLora(model)
    lora.load(adapters)
    return model, lora


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_are_finite_differences(flat: bool) -> None:
    model, lora = small(flat)
    generator = torch.Generator().manual_seed(1)
    experts = torch.tensor([[2, 0, -1], [1, 1, 2]])

    def answer(x: Tensor, weights: Tensor, first: Tensor, second: Tensor) -> Tensor:
        with lora.weighted(experts, weights, {"first": first, "second": second}):
            return model(x)

    def number(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(answer, (number(4, 2, 4), number(2, 3), number(), number()))


@given(
    st.integers(1, 4).flatmap(
        lambda k: st.lists(st.lists(st.integers(-1, 2), min_size=k, max_size=k), min_size=1, max_size=4)
    ),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_weighted_groups_are_mixtures(experts: list[list[int]], size: int, flat: bool, seed: int) -> None:
    """Also where an expert is named twice, which counts twice."""
    model, lora = small(flat)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(experts), len(experts[0]), generator=generator, dtype=torch.float64)
    x = torch.randn(len(experts) * size, 3, 4, generator=generator, dtype=torch.float64)
    dense = torch.zeros(len(experts), 4, dtype=torch.float64)
    dense.scatter_add_(1, torch.tensor(experts) % 4, weights)  # -1 goes to the last column
    with torch.no_grad():
        with lora.mixtures(dense[:, :3].repeat_interleave(size, 0)):
            wanted = model(x)
        with lora.weighted(torch.tensor(experts), weights):
            found = model(x)
    torch.testing.assert_close(found, wanted)


def test_forward_equals_mixtures(base: BaseModel, varied: list[LoraAdapter]) -> None:
    lora = attached(base, varied)
    dense = torch.zeros(3, 5).scatter_add_(1, EXPERTS % 5, WEIGHTS)[:, :4]
    with torch.no_grad():
        with lora.mixtures(dense.repeat_interleave(2, 0)):
            wanted = base.model(input_ids=IDS).logits
        with lora.weighted(EXPERTS, WEIGHTS):
            found = base.model(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_nobody_is_the_base_and_gets_no_gradient(base: BaseModel, varied: list[LoraAdapter]) -> None:
    with torch.no_grad():
        plain = base.model(input_ids=IDS).logits
    lora = attached(base, varied)
    experts = torch.tensor([[-1, -1], [2, -1], [-1, -1]])
    weights = torch.tensor([[3.0, 1.0], [1.0, 7.0], [-2.0, 0.0]], requires_grad=True)
    with lora.weighted(experts, weights):
        found = base.model(input_ids=IDS).logits
    torch.testing.assert_close(found[[0, 1, 4, 5]], plain[[0, 1, 4, 5]])
    assert float((found[2:4] - plain[2:4]).detach().norm()) > 0.1 * float(plain.norm())
    loss_of(found).backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad != 0, experts >= 0)


def test_only_what_learns_has_a_gradient(base: BaseModel, varied: list[LoraAdapter]) -> None:
    lora = attached(base, varied)
    weights = WEIGHTS.clone().requires_grad_()
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    factors = [t.clone() for own in lora._factors.values() for t in (own.A, own.Bt)]
    for parameter in base.model.parameters():
        parameter.requires_grad_(True)  # whoever forgot to freeze the base pays nothing for its linear layers
    with lora.weighted(EXPERTS, weights):
        loss_of(base.model(input_ids=IDS).logits).backward()
    linear = {f"{name}.weight" for name in linear_modules(base.model)}
    for name, parameter in base.model.named_parameters():
        assert name not in linear or parameter.grad is None, name
        assert torch.equal(parameter, before[name])
    assert "forward" not in base.model.lm_head.__dict__  # no adapter changes it, and it is itself again
    kept = [t for own in lora._factors.values() for t in (own.A, own.Bt)]
    assert all(t.grad is None and not t.requires_grad for t in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, factors, strict=True))


def test_the_backward_pass_may_come_after_the_block(base: BaseModel, varied: list[LoraAdapter]) -> None:
    lora = attached(base, varied)
    gradients = []
    for inside in (True, False):
        weights = WEIGHTS.clone().requires_grad_()
        with lora.weighted(EXPERTS, weights):
            loss = loss_of(base.model(input_ids=IDS).logits)
            if inside:
                loss.backward()
        if not inside:
            with lora.weighted(EXPERTS.flip(0), torch.zeros_like(WEIGHTS)):
                loss.backward()
        gradients.append(weights.grad)
    assert torch.equal(gradients[0], gradients[1])


class Largest(TorchDispatchMode):
    """Counts the numbers of every tensor that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given_bytes = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given_bytes:
                self.largest, self.calls = max(self.largest, made.numel()), self.calls + 1
        return out


def test_cost_grows_with_the_experts_in_use_alone(base: BaseModel, make_adapter: Callable[..., LoraAdapter]) -> None:
    largest = {}
    for count in (4, 64):
        lora = attached(base, [make_adapter(base, seed) for seed in range(count)])
        weights = WEIGHTS.clone().requires_grad_()
        with Largest() as watched, lora.weighted(EXPERTS, weights):
            loss_of(base.model(input_ids=IDS).logits).backward()
        largest[count] = watched.largest, watched.calls
        lora.detach()
    assert largest[4] == largest[64]
    assert 0 < largest[64][0] < 64 * 4 * 32  # one factor of one layer, of all adapters


def test_bfloat16_is_close(base: BaseModel, varied: list[LoraAdapter]) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(base.model).to(dtype)
        weights = WEIGHTS.clone().requires_grad_()
        with attached(replace(base, model=model), varied).weighted(EXPERTS, weights):
            logits = model(input_ids=IDS).logits
        assert logits.dtype == dtype
        logits.float().logsumexp(2).sum().backward()
        assert weights.grad is not None
        assert weights.grad.dtype == torch.float32
        found[dtype] = logits.detach().float(), weights.grad
    for exact, rounded in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        assert float((rounded - exact).norm() / exact.norm()) < 0.05


@needs_bits
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_learns_weights(
    tiny_llama: Path, make_adapter: Callable[..., LoraAdapter], bits: str, dtype: str
) -> None:
    """Against torch's own autograd through the quantised layers and dense deltas beside them."""
    base = load_base(str(tiny_llama), dtype=dtype, quantization=bits)
    adapters = [make_adapter(base, seed, rank=seed + 1) for seed in range(4)]
    found = []
    for way in (attached(base, adapters).weighted, beside(base, adapters)):
        weights = WEIGHTS.clone().requires_grad_()
        with way(EXPERTS, weights):
            logits = base.model(input_ids=IDS).logits
        assert logits.dtype == base.dtype
        logits.float().logsumexp(2).sum().backward()
        found.append((logits.detach().float(), weights.grad))
    close = 1e-4 if dtype == "float32" and bits == "4bit" else 0.05  # 8 bits round what enters a layer
    for ours, wanted in zip(*found, strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < close


def beside(base: BaseModel, adapters: Sequence[LoraAdapter]) -> Callable[[Tensor, Tensor], Any]:
    """What `weighted` computes, by hooks behind the layers."""

    @contextmanager
    def way(experts: Tensor, weights: Tensor) -> Iterator[None]:
        layers = linear_modules(base.model)

        def hook_of(name: str) -> Callable[..., Tensor]:
            deltas = torch.stack([adapter.modules[name].delta() for adapter in adapters])
            mixed = torch.einsum("gk,gkoi->goi", weights * (experts >= 0), deltas[experts.clamp_min(0)])
            rows = mixed.repeat_interleave(len(IDS) // len(experts), 0)
            return lambda _layer, inputs, out: out + torch.bmm(inputs[0].float(), rows.mT).to(out.dtype)

        hooks = [layers[name].register_forward_hook(hook_of(name)) for name in adapters[0].modules]
        yield
        for hook in hooks:
            hook.remove()

    return way


@one_gpu
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_a_gpu_computes_what_the_cpu_does(
    tiny_llama: Path, varied: list[LoraAdapter], dtype: str, close: float
) -> None:
    found = []
    for device, kind in (("cpu", "float32"), ("cuda", dtype)):
        base = load_base(str(tiny_llama), device, kind)
        weights = WEIGHTS.clone().requires_grad_()
        with attached(base, varied).weighted(EXPERTS, weights):
            logits = base.model(input_ids=IDS.to(base.device)).logits
        logits.float().logsumexp(2).sum().backward()
        found.append((logits.detach().float().cpu(), weights.grad))
    for cpu, gpu in zip(*found, strict=True):
        assert float((gpu - cpu).norm() / cpu.norm()) < close


def test_what_does_not_fit_is_refused(base: BaseModel, varied: list[LoraAdapter]) -> None:
    lora = attached(base, varied)
    one = torch.tensor([[1.0]])
    refused: list[tuple[str, tuple[Any, ...]]] = [
        (r"experts are \(1, 2\) and their weights \(1, 1\)", (torch.tensor([[0, 1]]), one)),
        (r"experts are \(0, 2\)", (torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))),
        (r"experts are \(1,\)", (torch.tensor([0]), torch.tensor([1.0]))),
        (r"groups name experts 0 to 4\.\nExpected -1 to 3", (torch.tensor([[0], [4]]), torch.ones(2, 1))),
        (r"groups name experts -2 to 0", (torch.tensor([[0], [-2]]), torch.ones(2, 1))),
        ("NaN or Inf", (torch.tensor([[0]]), one * torch.nan)),
        (r"a factor names lm_head, which no loaded adapter", (torch.tensor([[0]]), one, {"lm_head": one[0, 0]})),
        (r"is \(1,\)\.\nExpected a single", (torch.tensor([[0]]), one, {lora.module_names[0]: one[0]})),
    ]
    for message, arguments in refused:
        with pytest.raises(ModelError, match=message), lora.weighted(*arguments):
            pass
    with (
        pytest.raises(ModelError, match="active already"),
        lora.weighted(torch.tensor([[0]]), one),
        lora.rows([0] * 6),
    ):
        pass
    with (
        pytest.raises(ModelError, match="a batch of 6 rows meets weights for 4 groups"),
        lora.weighted(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)),
    ):
        base.model(input_ids=IDS)
