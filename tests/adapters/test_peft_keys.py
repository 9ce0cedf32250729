"""What PEFT trains beside the factors of linear modules: biases, embeddings, whole modules. Against PEFT itself."""

import json
import math
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raymerge.adapters import LoraAdapter, LoraModule, encode_adapter, open_adapter, read_adapter, save_adapter
from raymerge.adapters.peft import read_header
from raymerge.adapters.peft_config import saves
from raymerge.errors import AdapterError

IDS = torch.tensor([[1, 9, 12, 30, 8]])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def gpt2(kind=GPT2LMHeadModel):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    return kind(config)


def llama(vocabulary=64):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if vocabulary != 64:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


CONV = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True}
CASES = {
    "lora_bias": (gpt2, {**CONV, "target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "lora_bias, no bias in the base": (llama, {"r": 2, "target_modules": ["q_proj"], "lora_bias": True}),
    "lora_bias, rslora, pattern": (
        gpt2,
        {**CONV, "target_modules": ["c_attn"], "lora_bias": True, "use_rslora": True, "rank_pattern": {"h.1.*": 2}},
    ),
    "bias: all": (gpt2, {**CONV, "target_modules": ["c_attn"], "bias": "all"}),
    "bias: lora_only": (gpt2, {**CONV, "target_modules": ["c_attn", "mlp.c_proj"], "bias": "lora_only"}),
    "bias: all and a saved module": (
        gpt2,
        {**CONV, "target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["mlp"]},
    ),
    "modules_to_save": (
        llama,
        {"r": 2, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "a classifier": (
        lambda: gpt2(GPT2ForSequenceClassification),
        {**CONV, "target_modules": ["c_attn"], "task_type": "SEQ_CLS"},
    ),
    "embedding": (llama, {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "embed_tokens"]}),
    "embedding by expression": (llama, {"r": 3, "target_modules": r".*(v_proj|embed_tokens)", "use_rslora": True}),
    "embedding and head": (
        llama,
        {"r": 3, "target_modules": ["embed_tokens", "lm_head"], "alpha_pattern": {"embed_tokens": 9}},
    ),
    "embeddings of Conv1D's model": (gpt2, {**CONV, "target_modules": ["wte", "wpe", "c_attn"]}),
    "resized vocabulary": (lambda: llama(70), {"r": 2, "target_modules": ["q_proj"]}),
}
SAVED_EMBEDDINGS = {"resized vocabulary": True}


@pytest.fixture(autouse=True)
def _peft_warns_of_what_we_ask_for():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(model, folder, save_embeddings="auto", **options):
    """An adapter in which everything that would be trained has moved, saved by PEFT."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad or (save_embeddings is True and name.endswith(("embed_tokens.weight",))):
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=save_embeddings)
    return adapted


@pytest.fixture(params=CASES)
def trained(request, tmp_path):
    make, options = CASES[request.param]
    folder = tmp_path / "theirs"
    adapted = train(make(), folder, SAVED_EMBEDDINGS.get(request.param, "auto"), **options)
    return request.param, make, adapted, folder


def output(model):
    with torch.no_grad():
        return model(IDS).logits


def own_tensors(folder):
    """Tensors of a file without the copies that PEFT writes of a saved module's biases and never reads."""
    found = load_file(folder / WEIGHTS)
    return {key: t for key, t in found.items() if ".original_module." not in key and ".modules_to_save." not in key}


def test_peft_computes_the_same_from_what_is_read_and_written(trained, tmp_path):
    _, make, adapted, folder = trained
    save_adapter(read_adapter(str(folder)), str(tmp_path / "ours"))
    again = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert not torch.allclose(output(adapted), output(make().eval()), atol=1e-3)
    torch.testing.assert_close(output(again), output(adapted), rtol=1e-5, atol=1e-6)


def test_nothing_is_lost_by_reading_and_writing(trained, tmp_path):
    _, _, _, folder = trained
    adapter = read_adapter(str(folder))
    save_adapter(adapter, str(tmp_path / "ours"))
    before, after = own_tensors(folder), load_file(tmp_path / "ours" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    theirs, ours = (json.loads((f / CONFIG).read_text()) for f in (folder, tmp_path / "ours"))
    assert (ours["bias"], ours["lora_bias"]) == (theirs["bias"], theirs["lora_bias"])
    assert ours["modules_to_save"] == theirs["modules_to_save"]
    again = read_adapter(str(tmp_path / "ours"))
    assert encode_adapter(again) == encode_adapter(adapter)
    assert again.headers == adapter.headers


def test_deltas_biases_and_whole_tensors_are_those_of_peft(trained):
    _, _, adapted, folder = trained
    adapter = read_adapter(str(folder))
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in adapted.named_modules()
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "scaling")
    }
    assert list(adapter.modules) == sorted(layers)
    for path, layer in layers.items():
        module, theirs = adapter.modules[path], layer.get_delta_weight("default").detach()
        as_stored = module.delta().T if module.embedding or getattr(layer, "fan_in_fan_out", False) else module.delta()
        torch.testing.assert_close(as_stored, theirs, rtol=1e-5, atol=1e-7)
        assert module.embedding == isinstance(layer.base_layer, torch.nn.Embedding)
        assert (module.bias is None) == (not layer.lora_bias["default"])
        if module.bias is not None:
            assert torch.equal(module.bias, layer.lora_B["default"].bias)
    parameters = dict(adapted.base_model.model.state_dict())
    for name, tensor in adapter.whole.items():
        path, _, last = name.rpartition(".")
        theirs = [
            value for key, value in parameters.items()
            if key in (name, f"{path}.base_layer.{last}")
            or (".modules_to_save.default" in key and key.replace(".modules_to_save.default", "") == name)
        ]  # fmt: skip
        assert any(torch.equal(tensor, value) for value in theirs), name


EXPECTED_WHOLE = {
    "bias: lora_only": {f"transformer.h.{i}.{m}.bias" for i in (0, 1) for m in ("attn.c_attn", "mlp.c_proj")},
    "modules_to_save": {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    | {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("input_layernorm", "post_attention_layernorm")},
    "a classifier": {"score.weight"},
    "embedding": {"model.embed_tokens.weight"},  # PEFT saves the base's too; it is what the delta is added to
    "resized vocabulary": {"lm_head.weight", "model.embed_tokens.weight"},
    "lora_bias": set(),
}


def test_whole_tensors_have_their_names_in_the_base(trained):
    case, _, _, folder = trained
    opened, read = open_adapter(str(folder)), read_adapter(str(folder))
    assert opened.whole_shapes == read.whole_shapes
    assert opened.nbytes == read.nbytes
    assert opened.headers == read.headers
    assert list(opened.whole) == sorted(opened.whole)
    if case in EXPECTED_WHOLE:
        assert set(opened.whole) == EXPECTED_WHOLE[case]
    for name in opened.whole:
        assert torch.equal(opened.whole[name], read.whole[name])


@pytest.mark.parametrize(
    "dtypes", [("float16",), ("bfloat16",), ("bfloat16", "float32", "float16", "float64")], ids=str
)
@pytest.mark.parametrize("case", ["lora_bias", "embedding", "bias: all"])
def test_dtypes_stay_as_they_are(case, dtypes, tmp_path):
    make, options = CASES[case]
    train(make(), tmp_path / "a", **options)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    cast = {key: t.to(getattr(torch, dtypes[i % len(dtypes)])) for i, (key, t) in enumerate(sorted(tensors.items()))}
    save_file(cast, tmp_path / "a" / WEIGHTS)
    save_adapter(read_adapter(str(tmp_path / "a")), str(tmp_path / "b"))
    again = load_file(tmp_path / "b" / WEIGHTS)
    assert {key: t.dtype for key, t in again.items()} == {key: t.dtype for key, t in cast.items()}
    assert all(torch.equal(again[key], cast[key]) for key in cast)


@pytest.mark.parametrize("case", ["lora_bias", "embedding", "bias: all"])
def test_a_pickle_holds_the_same(case, tmp_path):
    make, options = CASES[case]
    train(make(), tmp_path, **options)
    expected = read_adapter(str(tmp_path))
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    found = read_adapter(str(tmp_path), allow_pickle=True)
    assert encode_adapter(found) == encode_adapter(expected)


SPOILT = {
    "lora_bias": (
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.bias",
        "transformer.h.0.attn.c_attn.lora_B.bias",
    ),
    "embedding": ("base_model.model.model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_A"),
    "modules_to_save": ("base_model.model.lm_head.weight", "lm_head.weight"),
    "bias: lora_only": (
        "base_model.model.transformer.h.0.attn.c_attn.base_layer.bias",
        "transformer.h.0.attn.c_attn.bias",
    ),
}


@pytest.mark.parametrize("form", [WEIGHTS, "adapter_model.bin"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", SPOILT)
def test_nan_and_inf_are_refused_wherever_they_are(case, value, form, tmp_path):
    make, options = CASES[case]
    key, shown = SPOILT[case]
    train(make(), tmp_path / "persona_4", **options)
    tensors = load_file(tmp_path / "persona_4" / WEIGHTS)
    tensors[key].view(-1)[1] = value
    if form == WEIGHTS:
        save_file(tensors, tmp_path / "persona_4" / WEIGHTS)
    else:
        (tmp_path / "persona_4" / WEIGHTS).unlink()
        torch.save(tensors, tmp_path / "persona_4" / form)
    word = "NaN" if math.isnan(value) else "Inf"
    with pytest.raises(AdapterError, match=rf"^persona_4: {form} holds {word} in {shown} \(1 of"):
        read_adapter(str(tmp_path / "persona_4"), allow_pickle=True)


def change(folder, edit, **config):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**found, **config}))


def nothing(_tensors):
    pass


C = "base_model.model.transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("case", "edit", "config", "named"),
    [
        ("lora_bias", lambda t: t.pop(f"{C}.lora_B.bias"), {}, "c_attn has no bias, although .* sets lora_bias"),
        ("lora_bias", lambda t: t.update({f"{C}.lora_B.bias": torch.zeros(3)}), {}, r"lora_B.bias is \(3,\)"),
        ("lora_bias", nothing, {"lora_bias": False}, "does not set lora_bias"),
        ("embedding", nothing, {"target_modules": "all-linear"}, "embed_tokens, which .* does not target"),
        ("embedding", nothing, {"modules_to_save": ["embed_tokens"]}, "modules_to_save names too"),
        ("embedding", nothing, {"modules_to_save": ["proj"]}, "modules_to_save names too"),
    ],
)  # fmt: skip
def test_what_peft_would_not_load_is_refused(case, edit, config, named, tmp_path):
    make, options = CASES[case]
    train(make(), tmp_path / "p", **options)
    change(tmp_path / "p", edit, **config)
    with pytest.raises(AdapterError, match=f"(?s)^p: .*{named}"):
        read_header(str(tmp_path / "p"))


def test_a_bias_of_a_module_as_old_versions_saved_it_is_refused_since_peft_passes_over_it(tmp_path):
    make, options = CASES["bias: lora_only"]
    adapted = train(make(), tmp_path / "p", **options)
    change(tmp_path / "p", lambda t: t.update({f"{C}.bias": t.pop(f"{C}.base_layer.bias")}))
    again = PeftModel.from_pretrained(make(), tmp_path / "p").eval()
    assert not torch.allclose(output(again), output(adapted))
    with pytest.raises(AdapterError, match="where PEFT expects a base_layer"):
        read_header(str(tmp_path / "p"))


def test_modules_without_a_bias_get_zeros_where_others_have_one(tmp_path):
    make, options = CASES["lora_bias"]
    train(make(), tmp_path / "a", **options)
    read = read_adapter(str(tmp_path / "a"))
    first = next(iter(read.modules))
    modules = {p: m if p == first else LoraModule(m.A, m.B, m.scaling) for p, m in read.modules.items()}
    save_adapter(LoraAdapter("b", modules, fan_in_fan_out=True), str(tmp_path / "b"))
    again = read_adapter(str(tmp_path / "b"))
    for path, module in again.modules.items():
        expected = modules[path].bias
        assert torch.equal(module.bias, torch.zeros(module.out_features) if expected is None else expected)
    assert PeftModel.from_pretrained(make(), tmp_path / "b") is not None


def test_a_module_that_is_both_adapted_and_saved_whole_loads_in_peft(tmp_path):
    """As a merge of two adapters gives: one has a LoRA of the head, the other a trained head."""
    make, options = CASES["modules_to_save"]
    train(make(), tmp_path / "a", **options)
    read = read_adapter(str(tmp_path / "a"))
    head = LoraModule(torch.randn(2, 16), torch.randn(64, 2), 0.5)
    both = LoraAdapter("b", {**read.modules, "lm_head": head}, whole=read.whole, modules_to_save=read.modules_to_save)
    save_adapter(both, str(tmp_path / "b"))
    layer = PeftModel.from_pretrained(make(), tmp_path / "b").base_model.model.lm_head
    assert torch.equal(layer.base_layer.weight, read.whole["lm_head.weight"])
    torch.testing.assert_close(layer.get_delta_weight("default"), head.delta())
    again = read_adapter(str(tmp_path / "b"))
    assert torch.equal(again.whole["lm_head.weight"], read.whole["lm_head.weight"])


def test_biases_and_embeddings_have_no_common_form():
    linear = LoraModule(torch.zeros(1, 3), torch.zeros(4, 1), 1.0, torch.zeros(4))
    embedding = LoraModule(torch.zeros(1, 9), torch.zeros(3, 1), 1.0, embedding=True)
    with pytest.raises(AdapterError, match=r"^mixed: has trained biases .* and an adapted embedding \(e\)"):
        encode_adapter(LoraAdapter("mixed", {"q": linear, "e": embedding}))


@pytest.mark.parametrize(
    "names", [["norm"], ["mlp"], ["up_proj", "lm_head"], ["layers.1.mlp"], ["0"], ["nothing"]], ids=str
)
def test_saved_modules_are_those_that_peft_wraps(names):
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names))
    wrapped, others = set(), set()
    for key, _ in adapted.base_model.model.named_parameters():
        if ".original_module." in key or ".lora_" in key:
            continue
        module = key.replace(".modules_to_save.default", "").replace(".base_layer", "").rpartition(".")[0]
        (wrapped if ".modules_to_save." in key else others).add(module)
    assert {path for path in wrapped | others if saves(names, path)} == wrapped
