"""Adapters in PEFT's form, against PEFT itself: what it saves is read exactly, what we write it loads."""

import json
import math
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from raymerge.adapters import LoraAdapter, LoraModule, load_adapter, open_adapter, read_adapter, save_adapter
from raymerge.adapters.peft import encode_adapter, read_header
from raymerge.errors import AdapterError, UnsupportedAdapterError

IDS = torch.tensor([[1, 9, 12, 30, 8]])


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return lambda: LlamaForCausalLM.from_pretrained(tiny_llama)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=32))


class Blocks(torch.nn.Module):
    """Module names of which one is the beginning or the end of another."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(12))
        self.inner = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))})


def peft_adapter(model, folder, **options):
    """A PEFT adapter with random factors, saved."""
    torch.manual_seed(1)
    config = LoraConfig(init_lora_weights=False, **options)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted


def peft_deltas(adapted):
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in adapted.named_modules()
        if hasattr(layer, "get_delta_weight") and "default" in layer.lora_A
    }


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"]},
    "all-linear": {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.1},
    "regex": {"r": 2, "target_modules": r".*layers\.1\..*(q|down)_proj"},
    "patterns": {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.self_attn\.o_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "up_proj": 1},
    },
    "one layer": {"r": 3, "target_modules": ["q_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_deltas_read_are_those_that_peft_computes(llama, tmp_path, options):
    theirs = peft_deltas(peft_adapter(llama(), tmp_path, task_type="CAUSAL_LM", **options))
    adapter = read_adapter(str(tmp_path), "mine")
    assert adapter.name == "mine"
    assert list(adapter.modules) == sorted(theirs)
    for path, delta in theirs.items():
        torch.testing.assert_close(adapter.modules[path].delta(), delta, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT corrects it, as it says
def test_conv1d_deltas_are_stored_as_those_of_a_linear_layer(tmp_path):
    adapted = peft_adapter(gpt2(), tmp_path, r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    adapter = read_adapter(str(tmp_path))
    assert adapter.fan_in_fan_out
    for path, delta in peft_deltas(adapted).items():
        torch.testing.assert_close(adapter.modules[path].delta(), delta.T, rtol=1e-5, atol=1e-7)
    written = tmp_path / "again"
    save_adapter(adapter, str(written))
    again = PeftModel.from_pretrained(gpt2(), written)
    torch.testing.assert_close(again(IDS).logits, adapted.eval()(IDS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_peft_computes_the_same_from_what_is_written(llama, tmp_path, options):
    adapted = peft_adapter(llama(), tmp_path / "theirs", task_type="CAUSAL_LM", **options).eval()
    save_adapter(read_adapter(str(tmp_path / "theirs")), str(tmp_path / "ours"))
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(again(IDS).logits, adapted(IDS).logits, rtol=1e-5, atol=1e-6)


def test_each_pattern_written_matches_one_module_only(tmp_path):
    paths = ["layers.1", "layers.11", "inner.layers.1", "layers.0", "inner.layers.0"]
    generator = torch.Generator().manual_seed(0)
    modules = {
        path: LoraModule(torch.randn(rank, 6, generator=generator), torch.randn(6, rank, generator=generator), scaling)
        for path, rank, scaling in zip(paths, (1, 2, 3, 2, 2), (0.3, 2.0, 1.0, -1.5, 1.0), strict=True)
    }
    adapter = LoraAdapter("patterns", modules)
    save_adapter(adapter, str(tmp_path))
    adapted = PeftModel.from_pretrained(Blocks(), tmp_path)
    theirs = peft_deltas(adapted)
    assert set(theirs) == set(paths)
    for path, delta in theirs.items():
        torch.testing.assert_close(delta, modules[path].delta(), rtol=1e-5, atol=1e-7)


def adapter_of(**kept):
    generator = torch.Generator().manual_seed(0)
    modules = {
        path: LoraModule(
            torch.randn(2, 4, generator=generator).to(a), torch.randn(5, 2, generator=generator).to(b), 0.7
        )
        for path, a, b in [
            ("m.0.q", torch.bfloat16, torch.float32), ("m.0.v", torch.float16, torch.float16),
            ("m.1.q", torch.float64, torch.bfloat16),
        ]
    }  # fmt: skip
    return LoraAdapter("a", modules, **kept)


def test_saved_and_read_again_is_the_same(tmp_path):
    adapter = adapter_of(
        base_model="b", task_type="CAUSAL_LM", started_from="unified", errors={"*": 0.25, "m.0.q": 1e-9}
    )
    save_adapter(adapter, str(tmp_path / "a"))
    again = load_adapter(str(tmp_path / "a"))
    for name in ("name", "base_model", "task_type", "started_from", "errors", "fan_in_fan_out"):
        assert getattr(again, name) == getattr(adapter, name)
    for path, module in adapter.modules.items():
        assert torch.equal(again.modules[path].A, module.A)
        assert torch.equal(again.modules[path].B, module.B)
        assert again.modules[path].A.dtype == module.A.dtype
        assert again.modules[path].scaling == pytest.approx(module.scaling, rel=1e-15)
    assert encode_adapter(again) == encode_adapter(adapter)
    assert json.loads((tmp_path / "a/manifest.json").read_text())["errors"] == adapter.errors


def test_an_opened_adapter_is_the_read_one(tmp_path):
    save_adapter(adapter_of(), str(tmp_path))
    opened, read = open_adapter(str(tmp_path)), read_adapter(str(tmp_path))
    assert opened.headers == read.headers
    assert (opened.dtype, opened.nbytes) == (read.dtype, read.nbytes)
    assert list(opened.modules) == list(read.modules)
    assert "m.0.q" in opened.modules
    assert opened.modules.get("elsewhere") is None
    assert all(torch.equal(opened.modules[path].A, read.modules[path].A) for path in read.modules)


def test_an_adapter_without_modules_is_not_written():
    with pytest.raises(AdapterError, match=r"^empty: has no modules"):
        encode_adapter(LoraAdapter("empty", {}))


@pytest.fixture
def folder(llama, tmp_path):
    peft_adapter(llama(), tmp_path / "persona_3", r=2, target_modules=["q_proj"])
    return tmp_path / "persona_3"


def change(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def change_config(folder, **options):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **options}))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def spoil(value):
    def edit(tensors):
        tensors[f"{Q}.lora_B.weight"].view(-1)[:3] = value

    return edit


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf")], ids=str)
def test_nan_and_inf_are_refused_by_tensor(folder, value, word):
    change(folder, spoil(value))
    with pytest.raises(
        AdapterError, match=rf"^persona_3: .*{word} in model.layers.0.self_attn.q_proj.lora_B \(3 of 64"
    ):
        read_adapter(str(folder))
    with pytest.raises(AdapterError, match=word):
        open_adapter(str(folder)).modules["model.layers.0.self_attn.q_proj"]


def test_values_whose_sum_overflows_are_not_inf(folder):
    change(folder, spoil(3e38))
    assert read_adapter(str(folder)).modules["model.layers.0.self_attn.q_proj"].B.max() > 1e38


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "q_proj has no lora_A"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 32)}), "does not have the rank"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(32)}), "does not set use_dora"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.zeros(32)}), "does not set lora_bias"),
        (lambda t: t.update({f"{Q}.lora_A.bias": torch.zeros(2)}), "bias of the first factor"),
        (lambda t: t.update({f"{Q}.weight": torch.zeros(32, 32)}), "expects a base_layer"),
        (lambda t: t.update({f"{Q}.bias": torch.zeros(32)}), "expects a base_layer"),
        (lambda t: t.update({"base_model.model.mlp.base_layer.weight": torch.zeros(2, 2)}), "expects a base_layer"),
        (lambda t: t.update({"base_model.model.model.scale": torch.zeros(32)}), "neither a factor nor a weight"),
        (lambda t: t.update({"model.lm_head.weight": torch.zeros(64, 32)}), "named without"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(64, 32).int()}), "I32"),
        (lambda t: t.update({"base_model.model.q_proj.lora_embedding_A": torch.zeros(2, 64)}), "no lora_embedding_B"),
        (lambda t: t.update({f"{Q}.lora_embedding_{f}": torch.zeros(2, 2) for f in "AB"}), "of an embedding and of a"),
        (lambda t: t.update({f"{Q}.lora_A.default.weight": torch.zeros(2, 32)}), "under an adapter's name"),
        (lambda t: t.update({"model.q_proj.lora_A.weight": torch.zeros(2, 32)}), "named without"),
        (lambda t: t.update({f"{Q}.lora_diag": torch.zeros(2)}), "no factor of plain LoRA"),
        (lambda t: t.update({k: v[..., None, None] for k, v in t.items()}), "no linear module"),
        (lambda t: t.update({f"{Q}.lora_{f}.weight": t[f"{Q}.lora_{f}.weight"].to(torch.int8) for f in "AB"}), "I8"),
        (
            lambda t: t.update({
                f"{Q.replace('q_proj', 'k_proj')}.lora_A.weight": torch.zeros(2, 32),
                f"{Q.replace('q_proj', 'k_proj')}.lora_B.weight": torch.zeros(16, 2),
            }),
            "does not target",
        ),
        (lambda t: t.clear(), "no LoRA factors"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_configured_lora_are_refused(folder, edit, named):
    change(folder, edit)
    with pytest.raises(AdapterError, match=f"^persona_3: (?s:.*){named}"):
        read_header(str(folder))


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(AdapterError, match=r"nobody: there is no adapter"):
        read_adapter(str(tmp_path / "nobody"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"^persona_3: adapter_model\.safetensors is missing"):
        read_adapter(str(folder))


def test_a_truncated_file_is_refused(folder):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterError, match=r"^persona_3: adapter_model\.safetensors is truncated: expected"):
        read_adapter(str(folder))


def test_metadata_that_cannot_be_read_is_refused(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"raymerge.errors": "[1]"})
    with pytest.raises(AdapterError, match=r"^persona_3: .*errors"):
        read_adapter(str(folder))


def test_a_pickle_needs_leave_and_runs_nothing(folder, tmp_path):
    expected = read_adapter(str(folder))
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(AdapterError, match="--allow-pickle"):
        read_adapter(str(folder))
    found = read_adapter(str(folder), allow_pickle=True)
    assert all(torch.equal(found.modules[path].B, expected.modules[path].B) for path in expected.modules)
    torch.save({"x": _Hostile(tmp_path / "ran")}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin cannot be read"):
        read_adapter(str(folder), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_mlx_adapter_is_refused_as_one(test_data):
    with pytest.raises(UnsupportedAdapterError, match="MLX"):
        read_header(str(test_data / "adapters/mlx-qwen2.5-0.5b-r8"))


@pytest.mark.parametrize(
    ("name", "count", "shape", "scaling", "dtype"),
    [
        ("gpt2-r8-fan-in-fan-out", 36, (2304, 768), 4.0, torch.float32),
        ("open-calm-1b-r1-fp16", 24, (6144, 2048), 32.0, torch.float16),
    ],
)
def test_real_adapters_are_read_and_survive_rewriting(test_data, tmp_path, name, count, shape, scaling, dtype):
    location = tmp_path / name
    shutil.copytree(test_data / "adapters" / name, location)
    adapter = read_adapter(str(location))
    first = next(iter(adapter.modules.values()))
    assert (len(adapter.modules), first.shape, first.scaling, adapter.dtype) == (count, shape, scaling, dtype)
    assert adapter.fan_in_fan_out == name.startswith("gpt2")
    save_adapter(adapter, str(tmp_path / "again"))
    raw = load_file(location / "adapter_model.safetensors")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert set(raw) == set(again)
    assert all(torch.equal(raw[key], again[key]) for key in raw)
