"""Adapters in MLX's form against mlx-lm itself: what we write it loads, what it trains we read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raymerge import merge
from raymerge.adapters import LoraAdapter, LoraModule, mlx, open_adapter, save_adapter
from raymerge.adapters.base_weights import BaseWeights

mx = pytest.importorskip("mlx.core", reason="needs the extra `mlx`")
pytest.importorskip("mlx_lm", reason="needs the extra `mlx`")

from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402

IDS = mx.array([[1, 9, 12, 30, 8]])
Q0, Q2, V1 = (f"model.layers.{i}.self_attn.{name}_proj" for i, name in ((0, "q"), (2, "q"), (1, "v")))
UP, HEAD = "model.layers.1.mlp.up_proj", "lm_head"


def model():
    """A random Llama of three layers, the same at each call."""
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=32, num_hidden_layers=3, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


def weights(base):
    return {name: torch.tensor(np.array(array)) for name, array in tree_flatten(base.parameters())}


def logits(base):
    return torch.tensor(np.array(base(IDS)))


def with_deltas(adapter):
    """Logits of the base whose weights got the deltas added."""
    base = model()
    found = weights(base)
    for path, module in adapter.modules.items():
        found[f"{path}.weight"] += module.delta()
    base.load_weights([(name, mx.array(tensor.numpy())) for name, tensor in found.items()])
    return logits(base)


def adapter_of(name, seed, ranks, scalings, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {path: tuple(tensor.shape) for path, tensor in weights(model()).items()}

    def module(path, rank, scaling):
        out_features, in_features = shapes[f"{path}.weight"]
        A = torch.randn(rank, in_features, generator=generator) / 8
        return LoraModule(A.to(dtype), torch.randn(out_features, rank, generator=generator).to(dtype), scaling)

    paths = (Q0, Q2, V1, UP, HEAD)
    return LoraAdapter(name, {p: module(p, r, s) for p, r, s in zip(paths, ranks, scalings, strict=True) if r})


WRITTEN = {
    "equal": adapter_of("equal", 0, (4, 4, 4, 4, 4), (2.0,) * 5),
    "ranks and scalings": adapter_of("mixed", 1, (1, 4, 3, 2, 5), (2.0, 0.3, 1.7, 2.0, -0.4)),
    "some modules": adapter_of("some", 2, (0, 4, 0, 0, 0), (1.0,) * 5),
    "half": adapter_of("half", 3, (2, 4, 0, 2, 2), (1.5, 0.7, 1.0, 0.7, 0.7), torch.float16),
}


@pytest.mark.parametrize("adapter", WRITTEN.values(), ids=WRITTEN)
def test_mlx_lm_computes_what_was_written(tmp_path, adapter):
    save_adapter(adapter, str(tmp_path), format="mlx")
    adapted = load_adapters(model(), str(tmp_path))
    tolerance = 1e-2 if adapter.dtype == torch.float16 else 1e-4
    torch.testing.assert_close(logits(adapted), with_deltas(adapter), rtol=tolerance, atol=tolerance)
    assert (with_deltas(adapter) - logits(model())).abs().max() > 30 * tolerance
    made = {name.rpartition(".")[0] for name, _ in tree_flatten(adapted.parameters()) if name.endswith("lora_a")}
    assert made == set(adapter.modules)


def test_mlx_lm_computes_what_was_merged(tmp_path):
    experts = [WRITTEN["equal"], WRITTEN["ranks and scalings"]]
    merged = merge(experts, [0.6, 0.4], rank="exact")
    save_adapter(merged, str(tmp_path), format="mlx")
    wanted = merge(experts, [0.6, 0.4], rank="exact", dtype="float32")
    torch.testing.assert_close(logits(load_adapters(model(), str(tmp_path))), with_deltas(wanted), rtol=1e-4, atol=1e-4)


def trained(folder, keys, use_dora=False, num_layers=2):
    """An adapter as mlx-lm's training leaves it, with random factors. Returns the adapted model."""
    adapted = model()
    adapted.freeze()
    parameters = {"rank": 3, "scale": 1.75, "dropout": 0.1} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(adapted, num_layers, parameters, use_dora=use_dora)
    factors = dict(tree_flatten(adapted.trainable_parameters()))
    mx.random.seed(1)
    factors = {
        name: array * (1 + mx.random.uniform(shape=array.shape)) if name.endswith(".m")
        else mx.random.normal(array.shape) / 3
        for name, array in factors.items()
    }  # fmt: skip
    adapted.load_weights(list(factors.items()), strict=False)
    mx.save_safetensors(str(folder / "adapters.safetensors"), factors)
    kind = "dora" if use_dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters, "model": "m"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapted.eval()
    return adapted


KEYS = {
    "default": (None, 14),
    "in a layer": (["self_attn.q_proj", "mlp.down_proj"], 4),
    "in the model": (["lm_head", Q0], 2),
}


@pytest.mark.parametrize(("keys", "count"), KEYS.values(), ids=KEYS)
def test_what_mlx_lm_trained_is_read(tmp_path, keys, count):
    adapted = trained(tmp_path, keys)
    adapter = open_adapter(str(tmp_path))
    assert len(adapter.modules) == count
    torch.testing.assert_close(with_deltas(adapter), logits(adapted), rtol=1e-4, atol=1e-4)
    assert (logits(adapted) - logits(model())).abs().max() > 0.01


def test_dora_as_mlx_lm_trained_it_is_read_with_the_base(tmp_path):
    adapted = trained(tmp_path, None, use_dora=True)
    (tmp_path / "base").mkdir()
    save_file(weights(model()), tmp_path / "base" / "model.safetensors")
    adapter = open_adapter(str(tmp_path), base=BaseWeights(str(tmp_path / "base")))
    assert len(adapter.modules) == 14
    torch.testing.assert_close(with_deltas(adapter), logits(adapted), rtol=1e-4, atol=1e-4)


def test_fused_weights_are_the_base_with_the_deltas(tmp_path):
    adapter = WRITTEN["ranks and scalings"]
    save_adapter(adapter, str(tmp_path), format="mlx")
    adapted = load_adapters(model(), str(tmp_path))
    base = weights(model())
    for path, module in mlx.read_adapter(str(tmp_path)).modules.items():
        layer = adapted
        for part in path.split("."):
            layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
        fused = torch.tensor(np.array(layer.fuse().weight))
        torch.testing.assert_close(fused, base[f"{path}.weight"] + module.delta(), rtol=1e-5, atol=1e-5)
