"""A base in 8 or 4 bits answers and scores with adapters as PEFT computes it on the same quantised base."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raymerge.adapters.adapter import LoraAdapter
from raymerge.errors import ModelError
from raymerge.models.answers import encode_rows, pad_right
from raymerge.models.base import BaseModel, load_base
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.layers import compute_dtype, frozen_weight, is_quantised, linear_modules, shape_of
from raymerge.models.multilora import MultiLora
from raymerge.models.training import TrainingGroup, TrainingSettings, learning_rate, train
from raymerge.runtime.workers import ModelWorker

needed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
BITS = ("8bit", "4bit")
ROWS = (("w1 w2", "w3 w4 w5"), ("w6", "w7 w8 w9"), ("w10 w11 w12", "w13"), ("w3", "w2 w1"))
IDS = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))


def logits(base: BaseModel) -> Tensor:
    with torch.inference_mode():
        return base.model(input_ids=IDS).logits


def dequantised(layer: nn.Module) -> Tensor:
    """A layer's weight (out_features, in_features) as its own forward pass sees it."""
    inner = shape_of(layer)[1]
    with torch.inference_mode():
        return layer(torch.eye(inner)).T - (0 if layer.bias is None else layer.bias[:, None])


@needed
@pytest.mark.parametrize(("bits", "bytes_each"), [("8bit", 1.0), ("4bit", 0.5)])
def test_linear_layers_but_the_head_are_kept_in_few_bits(tiny_llama: Path, bits: str, bytes_each: float) -> None:
    base = load_base(str(tiny_llama), quantization=bits)
    layers = linear_modules(base.model)
    assert {name for name, layer in layers.items() if not is_quantised(layer)} == {"lm_head"}
    assert layers.keys() == linear_modules(load_base(str(tiny_llama)).model).keys()
    layer = layers["model.layers.0.mlp.up_proj"]
    assert (layer.weight.nbytes, shape_of(layer)) == (64 * 32 * bytes_each, (64, 32))
    assert (base.quantization, base.dtype, base.device.type) == (bits, torch.float32, "cpu")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    with pytest.raises(ModelError, match=r"the base model's weights are torch\.u?int8"):
        frozen_weight(layer)


@needed
@pytest.mark.parametrize("bits", BITS)
def test_rows_equal_peft_on_the_same_base(
    tiny_llama: Path, bits: str, make_adapter: Callable[..., LoraAdapter]
) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_base(str(tiny_llama), quantization=bits)
    adapters = [make_adapter(base, seed) for seed in range(3)]
    lora = MultiLora(base.model)
    lora.load(adapters)
    with lora.rows([2, -1, 0, 1, 1, 0]):
        ours = logits(base)
    lora.detach()
    plain = logits(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(base.model, config, adapter_name="adapter_0")
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
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert float((ours - plain).norm()) > float(plain.norm()) / 10
    # LLM.int8 takes the columns that are large in any row of a batch out of all rows: neighbours matter a little.
    close = 1e-4 if bits == "4bit" else 5e-3
    torch.testing.assert_close(ours[1], plain[1], rtol=close, atol=close)


@needed
@pytest.mark.parametrize("bits", BITS)
def test_mixtures_of_one_are_rows(tiny_llama: Path, bits: str, make_adapter: Callable[..., LoraAdapter]) -> None:
    base = load_base(str(tiny_llama), quantization=bits)
    lora = MultiLora(base.model)
    lora.load([make_adapter(base, seed) for seed in range(3)])
    with lora.rows([2, 1, 0, 1, 1, 0]):
        rows = logits(base)
    with lora.mixtures(torch.eye(3)[[2, 1, 0, 1, 1, 0]]):
        torch.testing.assert_close(logits(base), rows, rtol=1e-4, atol=1e-4)


@needed
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_have_the_dtype_that_the_layers_compute_in(
    tiny_llama: Path, bits: str, dtype: str, make_adapter: Callable[..., LoraAdapter]
) -> None:
    exact, half = (load_base(str(tiny_llama), dtype=d, quantization=bits) for d in ("float32", dtype))
    layer = linear_modules(half.model)["model.layers.0.mlp.up_proj"]
    assert compute_dtype(half.model, layer) == half.dtype == getattr(torch, dtype)
    found = []
    for base in (exact, half):
        lora = MultiLora(base.model)
        lora.load([make_adapter(base, seed) for seed in range(2)])
        with lora.rows([0, 1, -1, 0, 1, 1]):
            found.append(logits(base))
    assert found[1].dtype == half.dtype
    assert float((found[1].float() - found[0]).norm() / found[0].norm()) < 0.1


@needed
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("width", "inner"), [(20, 38), (36, 50), (64, 128)])
def test_any_width_is_quantised_or_left_as_it_is(
    tiny_llama: Path, tmp_path: Path, bits: str, width: int, inner: int
) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=10, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = shutil.copytree(tiny_llama, tmp_path / "odd")
    LlamaForCausalLM(config).save_pretrained(folder)
    plain, base = load_base(str(folder)), load_base(str(folder), quantization=bits)
    for name, layer in linear_modules(base.model).items():
        weight = frozen_weight(linear_modules(plain.model)[name])
        assert float((dequantised(layer) - weight).norm() / weight.norm()) < 0.12, name


@needed
@pytest.mark.parametrize("bits", BITS)
def test_conv1d_layers(tiny_llama: Path, tmp_path: Path, bits: str, make_adapter: Callable[..., LoraAdapter]) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "gpt2")
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    base = load_base(str(folder), quantization=bits)
    adapter = make_adapter(base, 0)
    lora = MultiLora(base.model)
    lora.load([adapter])
    name = "transformer.h.0.attn.c_attn"
    layer, delta = linear_modules(base.model)[name], adapter.modules[name].delta()
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        plain = layer(x)
        with lora.rows([0]):
            torch.testing.assert_close(layer(x), plain + x @ delta.T)
    assert is_quantised(layer)
    lora.detach()
    (one,) = train(base, [TrainingGroup("a", ROWS)], TrainingSettings(rank=2, epochs=1))
    assert one.adapter.fan_in_fan_out  # as PEFT says of an adapter of the unquantised model


def peft_steps(base: BaseModel, start: LoraAdapter, settings: TrainingSettings) -> LoraAdapter:
    """The same training with PEFT's layers, torch's autograd, loss, clipping and optimiser; all rows in each step."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=settings.rank, lora_alpha=int(settings.alpha), target_modules=list(start.modules))
    model = get_peft_model(base.model, config).eval()
    layers = {name: model.base_model.model.get_submodule(name) for name in start.modules}
    for name, module in start.modules.items():
        layers[name].lora_A["default"].weight.data.copy_(module.A)
        layers[name].lora_B["default"].weight.data.copy_(module.B)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=settings.weight_decay)
    encoded = encode_rows(base, [p for p, _ in ROWS], [a for _, a in ROWS], end=True)
    batch = pad_right(sorted(encoded, key=len), base.pad_id)
    labels = batch.ids.masked_fill(~batch.answer, -100)
    for step in range(settings.epochs):
        optimiser.zero_grad()
        model(input_ids=batch.ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimiser.param_groups[0]["lr"] = learning_rate(step, settings.epochs, settings)
        optimiser.step()
    factors = {
        name: replace(module, A=layers[name].lora_A["default"].weight, B=layers[name].lora_B["default"].weight)
        for name, module in start.modules.items()
    }
    return replace(start, modules=factors)


@needed
@pytest.mark.parametrize(("bits", "close"), [("8bit", 0.01), ("4bit", 1e-4)])
def test_training_equals_peft(
    tiny_llama: Path, make_adapter: Callable[..., LoraAdapter], bits: str, close: float
) -> None:
    """8 bits round what enters a layer to 127 steps, so that the last digit of a float can move one of them."""
    base = load_base(str(tiny_llama), quantization=bits)
    start = make_adapter(base, 5, rank=3, scaling=2.0)
    settings = TrainingSettings(rank=3, alpha=6.0, epochs=5, learning_rate=5e-3, batch_size=len(ROWS))
    groups = [TrainingGroup("a", ROWS), TrainingGroup("b", ROWS)]
    ours = train(base, groups, settings, start_from=start)[1]
    wanted = peft_steps(load_base(str(tiny_llama), quantization=bits), start, settings)
    moved = change(ours.adapter, start)
    assert float((moved - change(wanted, start)).norm()) < close * float(moved.norm())
    assert ours.losses[-1] < ours.losses[0]
    assert ours.adapter.dtype == torch.float32


def change(adapter: LoraAdapter, start: LoraAdapter) -> Tensor:
    """What training did to the factors, in one vector."""
    return torch.cat(
        [
            (after - before).flatten()
            for name, module in start.modules.items()
            for after, before in ((adapter.modules[name].A, module.A), (adapter.modules[name].B, module.B))
        ]
    ).detach()


@needed
@pytest.mark.parametrize("bits", BITS)
def test_checkpointing_changes_nothing(tiny_llama: Path, bits: str) -> None:
    settings = TrainingSettings(rank=2, epochs=3, learning_rate=1e-2)
    found = []
    for again in (False, True):
        base = load_base(str(tiny_llama), quantization=bits)
        (one,) = train(base, [TrainingGroup("a", ROWS)], replace(settings, gradient_checkpointing=again))
        found.append(one.losses)
    assert found[0] == pytest.approx(found[1], rel=1e-4 if bits == "4bit" else 1e-2)


@needed
@pytest.mark.parametrize("bits", BITS)
def test_a_real_base_keeps_its_sense(test_data: Path, bits: str) -> None:
    place, prompt, story = str(test_data / "stories260k"), "Once upon a time", ", there was a little girl named Lily."
    base = load_base(place, quantization=bits)
    said = generate(base, None, [prompt], None, GenerationSettings(max_new_tokens=12))[0]
    assert said.startswith(", there was a little girl named Lily")
    score = {
        q: score_references(load_base(place, quantization=q), None, [prompt], [story], None)[0] for q in ("none", bits)
    }
    assert score[bits] == pytest.approx(score["none"], abs=0.3)


@needed
def test_a_base_that_is_quantised_already_is_not_quantised_again(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ready"
    load_base(str(tiny_llama), quantization="4bit").model.save_pretrained(folder)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    ready = load_base(str(folder))
    assert is_quantised(linear_modules(ready.model)["model.layers.0.mlp.up_proj"])
    torch.testing.assert_close(logits(ready), logits(load_base(str(tiny_llama), quantization="4bit")))
    with pytest.raises(ModelError, match=r"is quantised already \(bitsandbytes\).*8bit"):
        load_base(str(folder), quantization="8bit")


def test_without_bitsandbytes_it_is_said_what_to_install(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        ModelError, match=r"^quantization 4bit needs bitsandbytes.*\npip install 'raymerge\[quantised\]'"
    ):
        load_base(str(tiny_llama), quantization="4bit")


def test_an_unknown_quantization_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="quantization '3bit' is not known"):
        load_base(str(tiny_llama), quantization="3bit")


def test_results_depend_on_what_the_base_is_kept_in(tiny_llama: Path) -> None:
    names = [ModelWorker(str(tiny_llama), "base", quantization=q, device="cpu").dtype_name for q in ("none", *BITS)]
    assert names == ["float32", "float32 8bit", "float32 4bit"]
