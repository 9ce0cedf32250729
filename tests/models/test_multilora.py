"""Every row of a batch computes what a dense model with that row's merged weights computes."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import ModelError, UnsupportedAdapterError
from raymerge.models.base import BaseModel
from raymerge.models.dealing import plan_layout
from raymerge.models.layers import is_transposed, linear_modules
from raymerge.models.multilora import MultiLora

IDS = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))


def dense_logits(base: BaseModel, adapters: Sequence[LoraAdapter], weights: Sequence[float], ids: Tensor) -> Tensor:
    """Float64 logits of the base with the weighted deltas folded in."""
    model = copy.deepcopy(base.model).double()
    layers = linear_modules(model)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, module in adapter.modules.items():
            delta = weight * module.delta(torch.float64)
            layers[name].weight.data += delta.T if is_transposed(layers[name]) else delta
    return model(input_ids=ids).logits


def logits(base: BaseModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return base.model(input_ids=ids).logits


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 0, 1], [0, 0, 1, 1, 3, 3], [-1, 2, 2, 2, -1, 0], [-1] * 6, [3] * 6])
def test_rows_are_dense_models(base: BaseModel, varied: list[LoraAdapter], index: list[int]) -> None:
    lora = MultiLora(base.model)
    lora.load(varied)
    with lora.rows(index):
        found = logits(base, IDS)
    for row, adapter in enumerate(index):
        weights = [float(i == adapter) for i in range(len(varied))]
        torch.testing.assert_close(
            found[row].double(), dense_logits(_plain(base, lora), varied, weights, IDS[row : row + 1])[0],
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def _plain(base: BaseModel, lora: MultiLora) -> BaseModel:
    """The base's weights in a model without attached adapters."""
    state = base.model.state_dict()
    model = type(base.model)(base.model.config).eval().requires_grad_(False)
    model.load_state_dict(state)
    return replace(base, model=model)


@pytest.mark.parametrize("kind", ["sparse", "dense", "equal", "with_base"])
def test_mixtures_are_dense_merges(base: BaseModel, varied: list[LoraAdapter], kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(6, 4, generator=generator)
    if kind == "sparse":
        weights = torch.eye(4)[[0, 1, 2, 3, 1, 0]] * torch.tensor([0.3, -1.0, 2.0, 1.0, 0.5, 0.3])[:, None]
        weights[0, 1] = 0.7
    elif kind == "equal":
        weights = weights[:1].expand(6, 4)
    elif kind == "with_base":
        weights[2] = 0
        weights[:, 3] = 0
    lora = MultiLora(base.model)
    lora.load(varied)
    with lora.mixtures(weights):
        found = logits(base, IDS)
    for row in range(6):
        wanted = dense_logits(_plain(base, lora), varied, weights[row].tolist(), IDS[row : row + 1])[0]
        torch.testing.assert_close(found[row].double(), wanted, rtol=1e-5, atol=1e-5)


def test_both_ways_of_mixing_agree(base: BaseModel, varied: list[LoraAdapter], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))
    lora = MultiLora(base.model)
    lora.load(varied)
    found = []
    for apart in (True, False):
        monkeypatch.setattr(MultiLora, "_is_cheaper_apart", lambda *_args, apart=apart: apart)
        with lora.mixtures(weights):
            found.append(logits(base, IDS))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0], logits(base, IDS))


def test_conv1d_layers(gpt2: BaseModel, make_adapter: Callable[..., LoraAdapter]) -> None:
    adapters = [make_adapter(gpt2, seed) for seed in range(2)]
    lora = MultiLora(gpt2.model)
    lora.load(adapters)
    with lora.rows([0, 1, -1, 0, 1, 1]):
        found = logits(gpt2, IDS)
    for row, weights in enumerate(([1, 0], [0, 1], [0, 0])):
        wanted = dense_logits(_plain(gpt2, lora), adapters, weights, IDS[row : row + 1])[0]
        torch.testing.assert_close(found[row].double(), wanted, rtol=1e-5, atol=1e-5)


def test_equals_peft(base: BaseModel, make_adapter: Callable[..., LoraAdapter]) -> None:
    from peft import LoraConfig, get_peft_model

    adapters = [make_adapter(base, seed, rank=4) for seed in range(3)]
    lora = MultiLora(base.model)
    lora.load(adapters)
    with lora.rows([2, -1, 0, 1, 1, 0]):
        ours = logits(base, IDS)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(_plain(base, lora).model, config, adapter_name="adapter_0")
    for adapter in adapters[1:]:
        theirs.add_adapter(adapter.name, config)
    for adapter in adapters:
        for name, module in adapter.modules.items():
            layer = theirs.base_model.model.get_submodule(name)
            layer.lora_A[adapter.name].weight.data.copy_(module.A)
            layer.lora_B[adapter.name].weight.data.copy_(module.B)
    theirs.eval()
    names = ["adapter_2", "__base__", "adapter_0", "adapter_1", "adapter_1", "adapter_0"]
    with torch.inference_mode():
        wanted = theirs(input_ids=IDS, adapter_names=names).logits
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_outside_a_block_and_after_detach_the_model_is_the_base(base: BaseModel, varied: list[LoraAdapter]) -> None:
    before = logits(base, IDS)
    lora = MultiLora(base.model)
    lora.load(varied)
    with lora.rows([0] * 6):
        assert not torch.equal(logits(base, IDS), before)
    assert torch.equal(logits(base, IDS), before)
    lora.detach()
    assert all("forward" not in module.__dict__ for module in base.model.modules())
    assert torch.equal(logits(base, IDS), before)


def test_loading_replaces_what_was_loaded(base: BaseModel, varied: list[LoraAdapter]) -> None:
    lora = MultiLora(base.model)
    lora.load(varied)
    lora.load(varied[1:2])
    assert lora.names == ("adapter_1",)
    assert not any("mlp" in name for name in lora.module_names)
    with lora.rows([0] * 6):
        found = logits(base, IDS)
    wanted = dense_logits(_plain(base, lora), varied[1:2], [1.0], IDS)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


class Flattening(nn.Module):
    """A model that joins batch and tokens before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).view(*x.shape[:2], 3)


@pytest.mark.parametrize("index", [[0, 0, 1, 1], [1, -1, 0, 1]])
def test_a_model_may_flatten_batch_and_tokens(index: list[int]) -> None:
    torch.manual_seed(0)
    model = Flattening().requires_grad_(False)
    adapters = [
        LoraAdapter(name=f"a{i}", modules={"layer": LoraModule(torch.randn(2, 4), torch.randn(3, 2), 1.5)})
        for i in range(2)
    ]
    x = torch.randn(4, 5, 4)
    plain = model(x)
    lora = MultiLora(model)
    lora.load(adapters)
    wanted = torch.stack(
        [plain[row] + (x[row] @ adapters[i].modules["layer"].delta().T if i >= 0 else 0) for row, i in enumerate(index)]
    )
    with lora.rows(index), torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])[index]
    with lora.mixtures(weights), torch.no_grad():
        torch.testing.assert_close(model(x), wanted)


def test_gradients_pass_through(base: BaseModel, varied: list[LoraAdapter]) -> None:
    lora = MultiLora(base.model)
    lora.load(varied)
    embedded = base.model.get_input_embeddings()(IDS).requires_grad_(True)
    with lora.rows([0, 1, 2, 3, -1, 0]):
        base.model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert bool(embedded.grad.abs().sum((1, 2)).gt(0).all())


def test_bfloat16_is_close(base: BaseModel, varied: list[LoraAdapter]) -> None:
    plain = copy.deepcopy(base.model)
    lora = MultiLora(base.model)
    lora.load(varied)
    with lora.rows([0, 1, 2, 3, -1, 0]):
        exact = logits(base, IDS)
    half = MultiLora(plain.bfloat16())
    half.load(varied)
    with half.rows([0, 1, 2, 3, -1, 0]), torch.inference_mode():
        rounded = plain(input_ids=IDS).logits
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.05


def test_an_adapter_of_another_base_is_refused(base: BaseModel, varied: list[LoraAdapter]) -> None:
    name = "model.layers.0.self_attn.q_proj"
    wrong = replace(varied[0], modules={name: LoraModule(torch.zeros(2, 31), torch.zeros(32, 2), 1.0)})
    with pytest.raises(ModelError, match=r"adapter_0: model\.layers\.0\.self_attn\.q_proj is \(32, 31\)"):
        MultiLora(base.model).load([wrong])
    unknown = replace(varied[0], modules={"model.layers.9.q": varied[0].modules[name]})
    with pytest.raises(ModelError, match=r"adapter_0: the model has no linear layer model\.layers\.9\.q"):
        MultiLora(base.model).load([varied[0], unknown])


def test_what_is_more_than_deltas_is_refused_by_name(base: BaseModel, varied: list[LoraAdapter]) -> None:
    path, module = next(iter(varied[0].modules.items()))
    biased = replace(module, bias=torch.ones(module.out_features))
    whole = {"lm_head.weight": torch.zeros(64, 32)}
    for adapter, held in (
        (replace(varied[0], modules={path: biased}), r"trained biases \(lora_bias\)"),
        (replace(varied[0], modules={path: replace(module, embedding=True)}), "a LoRA of an embedding"),
        (replace(varied[0], whole=whole), r"whole tensors \(lm_head\.weight\)"),
    ):
        with pytest.raises(UnsupportedAdapterError, match=f"^adapter_0: cannot be run in a batch.*{held}"):
            MultiLora(base.model).load([varied[1], adapter])


def test_choices_that_do_not_fit_are_refused(base: BaseModel, varied: list[LoraAdapter]) -> None:
    lora = MultiLora(base.model)
    lora.load(varied)
    for index in ([4], [-2]):
        with pytest.raises(ModelError, match="Expected -1 to 3"), lora.rows(index):
            pass
    with pytest.raises(ModelError, match=r"Expected \(rows, 4\)"), lora.mixtures(torch.ones(2, 3)):
        pass
    with pytest.raises(ModelError, match="NaN or Inf"), lora.mixtures(torch.full((2, 4), torch.nan)):
        pass
    with pytest.raises(ModelError, match="active already"), lora.rows([0]), lora.rows([1]):
        pass
    for rows in (5, 4, 2):  # also where rows times tokens could be dealt evenly
        with pytest.raises(ModelError, match=f"a batch of 6 rows meets adapters for {rows}"), lora.rows([0] * rows):
            logits(base, IDS[:, :8])


@given(st.lists(st.integers(-1, 5), max_size=40))
def test_layout_deals_every_row_once(index: list[int]) -> None:
    layout = plan_layout(index)
    owners = layout.adapters.repeat_interleave(layout.size)
    slots = torch.arange(len(index)) if layout.slots is None else layout.slots
    rows = slots if layout.rows is None else layout.rows
    places = slots if layout.places is None else layout.places
    assert sorted(rows.tolist()) == [row for row, adapter in enumerate(index) if adapter >= 0]
    assert slots[places].tolist() == rows.tolist()
    assert [index[row] for row in rows.tolist()] == owners[places].tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8, unique=True), st.integers(1, 6))
def test_layout_reads_equal_neighbours_in_place(adapters: list[int], each: int) -> None:
    index = [adapter for adapter in adapters for _ in range(each)]
    layout = plan_layout(index)
    assert layout.slots is None
    assert Counter(layout.adapters.tolist()).keys() == set(adapters)
    assert layout.size == each
