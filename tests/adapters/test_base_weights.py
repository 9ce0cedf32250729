"""Weights of a base model in Hugging Face's form, tensor by tensor."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raymerge.adapters.base_weights import BaseWeights
from raymerge.errors import AdapterError, ModelError


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def check_all(base, model):
    for name, parameter in model.state_dict().items():
        assert torch.equal(base.weight(name), parameter), name
        assert base.shape(name) == tuple(parameter.shape)


@pytest.mark.parametrize("size", ["1GB", "5KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_of_a_saved_model_is_found(tmp_path, size, tied):
    model = llama(tied)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
    check_all(BaseWeights(str(tmp_path)), model)
    check_all(BaseWeights(f"file://{tmp_path}"), model)
    check_all(pickle.loads(pickle.dumps(BaseWeights(str(tmp_path)))), model)


def test_a_model_saved_without_its_head_is_found_under_its_full_names(tmp_path):
    """As GPT-2's own checkpoint is: `h.0...` for what the model calls `transformer.h.0...`; and the reverse."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    model.transformer.save_pretrained(tmp_path / "bare")
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "bare/model.safetensors")
    check_all(BaseWeights(str(tmp_path / "bare")), model)
    model.save_pretrained(tmp_path / "whole")
    check_all(BaseWeights(str(tmp_path / "whole")), model.transformer)


def test_weights_are_as_stored(tmp_path):
    tensors = {"a.weight": torch.randn(3, 2).bfloat16(), "b.weight": torch.randn(4).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    base = BaseWeights(str(tmp_path))
    for name, tensor in tensors.items():
        assert base.weight(name).dtype == tensor.dtype
        assert torch.equal(base.weight(name), tensor)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("model.layers.0.self_attn.q_porj.weight", r"(?s)^model.layers.0.self_attn.q_porj.weight: .*self_attn.q_proj"),
        ("score.weight", "there is no such parameter"),
        ("weight", "there is no such parameter"),
        ("lm_head.weight", "there is no such parameter"),  # untied, so it is missing
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest(tmp_path, parameter, message):
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=message):
        BaseWeights(str(tmp_path)).weight(parameter)


def test_a_name_that_may_mean_several_is_refused(tmp_path):
    save_file({"text.a.weight": torch.zeros(1), "vision.a.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match="stands for several"):
        BaseWeights(str(tmp_path)).weight("a.weight")


def test_what_is_no_base_model_is_refused(tmp_path):
    base = BaseWeights(str(tmp_path))  # nothing is read before it is asked for
    with pytest.raises(ModelError, match="holds no weights"):
        base.weight("a.weight")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be understood"):
        BaseWeights(str(tmp_path)).shape("a.weight")
    index = {"weight_map": {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"b.weight": torch.zeros(2)}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match=r"one.safetensors lacks a.weight"):
        BaseWeights(str(tmp_path)).weight("a.weight")
    with pytest.raises(ModelError, match=r"two.safetensors cannot be read"):
        BaseWeights(str(tmp_path)).weight("b.weight")
    os.truncate(tmp_path / "one.safetensors", 5)
    with pytest.raises(ModelError, match=r"one.safetensors is truncated"):
        BaseWeights(str(tmp_path)).weight("a.weight")


def test_quantised_weights_are_refused(tmp_path):
    save_file({"a.weight": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="I8"):
        BaseWeights(str(tmp_path)).weight("a.weight")
