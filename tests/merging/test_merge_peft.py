"""Merged adapters against PEFT: it loads them, and computes what its own exact merge computes."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from raymerge.adapters import read_adapter, save_adapter
from raymerge.merging.merge import merge

IDS = torch.tensor([[1, 9, 12, 30, 8], [1, 40, 41, 42, 43]])
CONFIGS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "c": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.1.*q_proj": 5}},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory):
    """Three real PEFT adapters with random factors, by name."""
    folder = tmp_path_factory.mktemp("peft")
    for seed, (name, options) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
        get_peft_model(LlamaForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(folder / name)
    return folder


def deltas_of(model, adapter):
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and adapter in layer.lora_A
    }


@pytest.mark.parametrize("rank", ["exact", "keep", {"energy": 0.9, "max": 6}], ids=str)
def test_peft_computes_the_merge_as_stated(saved, tiny_llama, tmp_path, rank):
    weights = {"a": 0.5, "b": -0.3, "c": 0.8}
    merged = merge([read_adapter(str(saved / n)) for n in weights], list(weights.values()), rank=rank)
    save_adapter(merged, str(tmp_path / "merged"))
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), tmp_path / "merged")
    theirs = deltas_of(loaded, "default")
    assert set(theirs) == set(merged.modules)

    by_hand = LlamaForCausalLM.from_pretrained(tiny_llama)
    experts = {}
    for name in weights:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), saved / name)
        experts[name] = deltas_of(model, "default")
    for path, delta in theirs.items():
        S = sum(w * experts[n][path] for n, w in weights.items() if path in experts[n])
        error = torch.linalg.matrix_norm(delta - S) / torch.linalg.matrix_norm(S)
        assert merged.errors[path] == pytest.approx(float(error), rel=1e-3, abs=2e-6)
        by_hand.get_submodule(path).weight.data += S if rank == "exact" else delta
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, by_hand(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_exact_merge_is_the_cat_of_peft(saved, tiny_llama):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_llama), saved / "a", adapter_name="a")
    torch.manual_seed(7)
    model.add_adapter("d", LoraConfig(init_lora_weights=False, r=3, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(saved, selected_adapters=["d"])
    model.add_weighted_adapter(["a", "d"], [0.7, 0.4], "cat", combination_type="cat")
    ours = merge([read_adapter(str(saved / n)) for n in "ad"], [0.7, 0.4], rank="exact")
    for path, delta in deltas_of(model, "cat").items():
        torch.testing.assert_close(ours.modules[path].delta(), delta, rtol=1e-5, atol=1e-6)


def test_a_real_adapter_merged_with_itself_is_itself(test_data):
    location = str(test_data / "adapters/open-calm-1b-r1-fp16")
    expert = read_adapter(location)
    expert = replace(expert, modules=dict(list(expert.modules.items())[:4]))
    merged = merge([expert, replace(expert, name="again")], [0.25, 0.75])
    assert merged.dtype == torch.float16
    for path, module in expert.modules.items():
        if not module.B.any():
            assert merged.errors[path] == 0.0
        else:
            difference = torch.linalg.matrix_norm(merged.modules[path].delta() - module.delta())
            assert difference <= 1e-3 * torch.linalg.matrix_norm(module.delta())
