"""DoRA as a dense delta on its base, against PEFT's own merge."""

import json
import math
import shutil
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raymerge.adapters import LoraModule, open_adapter, read_adapter, save_adapter
from raymerge.adapters.base_weights import BaseWeights
from raymerge.adapters.dora import dense_module, dora_delta, transposed_weights
from raymerge.adapters.peft import read_header
from raymerge.errors import AdapterError, UnsupportedAdapterError

IDS = torch.tensor([[1, 9, 12, 30, 8]])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2)
    )


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


CASES = {
    "linear": (llama, {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rslora and patterns": (
        llama,
        {
            "r": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.mlp.down_proj": 3},
        },
    ),
    "conv1d": (gpt2, {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "embedding": (llama, {"r": 3, "target_modules": ["embed_tokens", "v_proj"]}),
    "embeddings of Conv1D's model": (gpt2, {"r": 2, "target_modules": ["wte", "wpe", "c_fc"], "fan_in_fan_out": True}),
    "with a saved head": (llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _peft_warns_of_what_we_ask_for():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(make, folder, **options):
    torch.manual_seed(1)
    adapted = get_peft_model(make(), LoraConfig(init_lora_weights=False, use_dora=True, **options)).eval()
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name or "modules_to_save" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "persona_5")
    make().save_pretrained(folder / "base")
    return adapted


def both(folder):
    return str(folder / "persona_5"), BaseWeights(str(folder / "base"))


@pytest.fixture(params=CASES)
def trained(request, tmp_path):
    make, options = CASES[request.param]
    return make, train(make, tmp_path, **options), tmp_path


def output(model):
    with torch.no_grad():
        return model(IDS).logits


def test_deltas_are_what_peft_adds_to_the_base(trained):
    make, adapted, folder = trained
    location, base = both(folder)
    adapter = read_adapter(location, base=base)
    ranks = {path: module.rank for path, module in _lora(adapted).items()}
    orientation = {path: module.turned for path, module in _lora(adapted).items()}
    before = make().state_dict()
    after = adapted.merge_and_unload().state_dict()
    assert set(adapter.modules) == set(ranks)
    for path, module in adapter.modules.items():
        theirs = (after[f"{path}.weight"] - before[f"{path}.weight"]).double()
        theirs = theirs.T if orientation[path] else theirs
        error = (module.delta(torch.float64) - theirs).norm() / theirs.norm()
        assert error < 1e-6
        assert (module.scaling, module.nominal, module.rank) == (1.0, ranks[path], min(module.shape))


class _Layer:
    def __init__(self, layer):
        self.rank = layer.r["default"]
        self.turned = isinstance(layer.base_layer, torch.nn.Embedding) or layer.fan_in_fan_out


def _lora(adapted):
    return {
        name.removeprefix("base_model.model."): _Layer(layer)
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_magnitude_vector") and layer.r
    }


def test_written_as_plain_lora_peft_computes_the_same(trained):
    make, adapted, folder = trained
    location, base = both(folder)
    save_adapter(read_adapter(location, base=base), str(folder / "ours"))
    assert not json.loads((folder / "ours" / CONFIG).read_text())["use_dora"]
    again = PeftModel.from_pretrained(make(), folder / "ours").eval()
    torch.testing.assert_close(output(again), output(adapted), rtol=1e-4, atol=2e-6)
    assert not torch.allclose(output(adapted), output(make().eval()), atol=1e-3)


def test_an_opened_one_is_the_read_one(trained):
    _, _, folder = trained
    location, base = both(folder)
    opened, read = open_adapter(location, base=base), read_adapter(location, base=base)
    assert opened.headers == read.headers
    assert opened.nbytes == read.nbytes
    for path, module in opened.modules.items():
        assert torch.equal(module.A, read.modules[path].A)
        assert torch.equal(module.B, read.modules[path].B)


def test_without_its_base_it_is_described_but_refused(trained):
    _, _, folder = trained
    location, _ = both(folder)
    assert read_header(location).settings.dora
    for read in (open_adapter, read_adapter):
        with pytest.raises(UnsupportedAdapterError, match=r"(?s)^persona_5: use_dora is set.*--base"):
            read(location)


@pytest.mark.parametrize("name", ["lora-rank32.json", "lora-rank32-dora.json"])
def test_real_configurations_of_dora_are_refused_without_base_and_read_with_it(test_data, tmp_path, name):
    config = json.loads((test_data / "adapter-configs" / name).read_text())
    path, rank = "model.layers.0.self_attn.q_proj", config["r"]
    tensors = {
        f"base_model.model.{path}.lora_A.weight": torch.randn(rank, 48),
        f"base_model.model.{path}.lora_B.weight": torch.randn(40, rank),
        f"base_model.model.{path}.lora_magnitude_vector": torch.rand(40),
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    save_file({f"{path}.weight": torch.randn(40, 48)}, tmp_path / "b/model.safetensors")
    with pytest.raises(UnsupportedAdapterError, match=r"(?s)use_dora.*--base"):
        read_adapter(str(tmp_path / "a"))
    read = read_adapter(str(tmp_path / "a"), base=BaseWeights(str(tmp_path / "b")))
    assert read.headers[path].nominal == rank


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_dtypes_are_computed_in_float32_or_better(tmp_path, stored, kept):
    make, options = CASES["linear"]
    train(make, tmp_path, **options)
    location, base = both(tmp_path)
    for file, dtype in ((f"{location}/{WEIGHTS}", stored), (f"{base.location}/model.safetensors", kept)):
        save_file({key: t.to(dtype) for key, t in load_file(file).items()}, file)
    adapter = open_adapter(location, base=base)
    assert adapter.dtype == torch.promote_types(stored, torch.float32)
    tensors, scaling = load_file(f"{location}/{WEIGHTS}"), options["lora_alpha"] / options["r"]
    for path, module in adapter.modules.items():
        A, B, m = (
            tensors[f"base_model.model.{path}.lora_{part}"].double()
            for part in ("A.weight", "B.weight", "magnitude_vector")
        )
        W = BaseWeights(base.location).weight(f"{path}.weight").double()
        total = W + scaling * B @ A
        expected = m[:, None] * total / total.norm(dim=1, keepdim=True) - W
        assert (module.delta(torch.float64) - expected).norm() / expected.norm() < 1e-6


def test_a_pickle_with_dora(tmp_path):
    make, options = CASES["embedding"]
    train(make, tmp_path, **options)
    location, base = both(tmp_path)
    expected = read_adapter(location, base=base)
    torch.save(load_file(f"{location}/{WEIGHTS}"), f"{location}/adapter_model.bin")
    (tmp_path / "persona_5" / WEIGHTS).unlink()
    with pytest.raises(UnsupportedAdapterError, match="--base"):
        read_adapter(location, allow_pickle=True)
    found = read_adapter(location, allow_pickle=True, base=base)
    assert found.headers == expected.headers
    assert all(torch.equal(found.modules[path].B, expected.modules[path].B) for path in expected.modules)


def test_an_embedding_saved_beside_its_factors_is_what_they_are_measured_from(tmp_path):
    """PEFT puts the saved weight into the base before it adapts it, so the delta is measured from that one."""
    make, options = CASES["embedding"]
    train(make, tmp_path, **options)
    location, base = both(tmp_path)
    tensors = load_file(f"{location}/{WEIGHTS}")
    saved = tensors["base_model.model.model.embed_tokens.base_layer.weight"]
    saved += torch.randn(saved.shape, generator=torch.Generator().manual_seed(3))
    save_file(tensors, f"{location}/{WEIGHTS}")
    adapter = read_adapter(location, base=base)
    merged = PeftModel.from_pretrained(make(), location).merge_and_unload().model.embed_tokens.weight
    found = adapter.whole["model.embed_tokens.weight"] + adapter.modules["model.embed_tokens"].delta().T
    torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-6)


M = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t[M].fill_(math.nan), "NaN in model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        (lambda t: t[M].view(-1)[3:4].fill_(math.inf), r"Inf in .*lora_magnitude_vector \(1 of 16"),
        (lambda t: t.pop(M), "q_proj has no magnitude, although .* use_dora"),
        (lambda t: t.update({M: torch.ones(5)}), r"lora_magnitude_vector is \(5,\)"),
        (lambda t: t.update({M: torch.ones(16, 1)}), r"lora_magnitude_vector is \(16, 1\)"),
    ],
)
def test_a_spoilt_magnitude_is_refused(tmp_path, edit, named):
    train(llama, tmp_path, r=2, target_modules=["q_proj"])
    location, base = both(tmp_path)
    tensors = load_file(f"{location}/{WEIGHTS}")
    edit(tensors)
    save_file(tensors, f"{location}/{WEIGHTS}")
    with pytest.raises(AdapterError, match=rf"(?s)^persona_5: .*{named}"):
        read_adapter(location, base=base)


def test_another_base_is_refused_before_anything_is_merged(tmp_path):
    train(llama, tmp_path, r=2, target_modules=["q_proj"])
    location, _ = both(tmp_path)
    gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"q_proj\.weight: there is no such parameter in the base model"):
        open_adapter(location, base=BaseWeights(str(tmp_path / "other")))
    shutil.copytree(tmp_path / "base", tmp_path / "wide")
    tensors = load_file(tmp_path / "wide/model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(16, 20)
    save_file(tensors, tmp_path / "wide/model.safetensors")
    with pytest.raises(AdapterError, match=r"(?s)^persona_5: .*layers.1.*does not fit the base.*found \(16, 20\)"):
        open_adapter(location, base=BaseWeights(str(tmp_path / "wide")))


def test_a_row_without_direction_is_refused(tmp_path):
    """W + D = 0 has no direction to scale: PEFT divides by zero."""
    train(llama, tmp_path, r=2, target_modules=["q_proj"])
    location, base = both(tmp_path)
    for file, key in (
        (f"{location}/{WEIGHTS}", "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"),
        (f"{base.location}/model.safetensors", "model.layers.0.self_attn.q_proj.weight"),
    ):
        tensors = load_file(file)
        tensors[key][2] = 0
        save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"^persona_5: .*NaN in the DoRA delta of model.layers.0"):
        read_adapter(location, base=base)


def test_a_square_weight_whose_orientation_is_unknown_is_refused():
    shapes = {"conv": (12, 4), "linear": (6, 4), "square": (4, 4), "embedding": (4, 4)}
    stored = {"conv": (4, 12), "linear": (6, 4), "square": (4, 4), "embedding": (4, 4)}

    def find(names, fan_in_fan_out):
        kept = {name: shapes[name] for name in names}
        return transposed_weights(kept, stored, ["embedding"], fan_in_fan_out, "a")

    assert find(["conv", "square"], True) == {"conv", "square"}
    assert find(["linear", "square", "embedding"], False) == {"embedding"}
    assert find(["square"], True) == {"square"}
    assert find(["conv", "linear", "embedding"], False) == {"conv", "embedding"}
    for names, fan in ((["conv", "square"], False), (["linear", "square"], True), (["conv", "linear", "square"], True)):
        with pytest.raises(AdapterError, match=r"^a: whether the base stores square as"):
            find(names, fan)


dimensions = st.integers(1, 9)


@given(dimensions, dimensions, st.integers(0, 99), st.floats(0.1, 3))
def test_with_the_magnitude_of_the_sum_it_is_the_plain_delta(outer, inner, seed, scaling):
    generator = torch.Generator().manual_seed(seed)
    lora = LoraModule(torch.randn(2, inner, generator=generator), torch.randn(outer, 2, generator=generator), scaling)
    weight = torch.randn(outer, inner, generator=generator)
    magnitude = (weight.double() + lora.delta(torch.float64)).norm(dim=1)
    found = dora_delta(lora, magnitude, weight)
    torch.testing.assert_close(found, lora.delta(torch.float64), rtol=1e-9, atol=1e-11)
    dense = dense_module(found, 2)
    assert torch.equal(dense.delta(torch.float64), found)
    assert dense.rank == min(outer, inner)


def test_a_small_delta_on_a_large_weight_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    lora = LoraModule(
        torch.randn(2, 40, generator=generator) * 1e-3, torch.randn(300, 2, generator=generator) * 1e-3, 1.0
    )
    weight = torch.randn(300, 40, generator=generator)
    total = weight.double() + lora.delta(torch.float64)
    magnitude = (total.norm(dim=1) * (1 + 1e-6 * torch.randn(300, generator=generator).double())).float()
    expected = magnitude.double()[:, None] * total / total.norm(dim=1, keepdim=True) - weight.double()
    found = dora_delta(lora, magnitude, weight)
    assert found.dtype == torch.float32
    assert (found.double() - expected).norm() < 1e-6 * expected.norm()
