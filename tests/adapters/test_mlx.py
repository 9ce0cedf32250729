"""Adapters in MLX's form: read for what they are, refused by name, and written so that nothing is lost."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

from raymerge.adapters import LoraAdapter, LoraModule, mlx
from raymerge.adapters.base_weights import BaseWeights
from raymerge.adapters.peft import encode_adapter as encode_peft
from raymerge.adapters.peft import read_adapter as read_peft
from raymerge.errors import AdapterError, UnsupportedAdapterError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
CONFIG = {
    "fine_tune_type": "lora", "model": "org/base", "num_layers": 2, "iters": 100, "lr_schedule": None,
    "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0},
}  # fmt: skip


def tensors(rank=4, paths=(Q, V), dora=False):
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path in paths:
        found[f"{path}.lora_a"] = torch.randn(6, rank, generator=generator)
        found[f"{path}.lora_b"] = torch.randn(rank, 5, generator=generator)
        if dora:
            found[f"{path}.m"] = torch.rand(5, generator=generator) + 0.5
    return found


def write(folder, weights=None, config=CONFIG, name="adapters.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors() if weights is None else weights, folder / name)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def with_lora(**changed):
    lora = {**CONFIG["lora_parameters"], **changed}
    return {**CONFIG, "lora_parameters": {key: value for key, value in lora.items() if value != "absent"}}


def put(files, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_a_real_adapter_is_read_with_its_scale(test_data):
    folder = test_data / "adapters" / "mlx-qwen2.5-0.5b-r8"
    adapter = mlx.read_adapter(str(folder), "qwen")
    raw = load_file(folder / "adapters.safetensors")
    assert adapter.name == "qwen"
    assert adapter.base_model == "/Users/wyek1n/Downloads/MLX/model/Qwen2.5-0.5B-Instruct"
    assert len(adapter.modules) == 8
    for path, module in adapter.modules.items():
        a, b = raw[f"{path}.lora_a"].double(), raw[f"{path}.lora_b"].double()
        torch.testing.assert_close(module.delta(torch.float64), 10.0 * (a @ b).T)
        assert (module.rank, module.scaling) == (8, 10.0)  # its alpha of 16 says nothing
    assert adapter.modules["model.layers.20.self_attn.v_proj"].shape == (128, 896)


def test_a_checkpoint_is_read_by_its_file(test_data):
    folder = test_data / "adapters" / "mlx-qwen2.5-0.5b-r8"
    path = "model.layers.20.self_attn.q_proj"
    for file in ("0000100_adapters.safetensors", "0000200_adapters.safetensors"):
        adapter = mlx.open_adapter(str(folder / file))
        assert adapter.name == file
        assert torch.equal(adapter.modules[path].A.T, load_file(folder / file)[f"{path}.lora_a"])
    assert mlx.read_header(str(folder / file)).weights == file
    with pytest.raises(AdapterError, match=r"0000300_adapters.safetensors is missing"):
        mlx.read_header(str(folder / "0000300_adapters.safetensors"))


def test_a_real_adapter_written_again_has_the_same_tensors(test_data, tmp_path):
    folder = test_data / "adapters" / "mlx-qwen2.5-0.5b-r8"
    files = mlx.encode_adapter(mlx.open_adapter(str(folder)))
    assert same_tensors(load(files["adapters.safetensors"]), load_file(folder / "adapters.safetensors"))
    again = mlx.encode_adapter(mlx.read_adapter(put(files, tmp_path / "again")))
    assert again == files


def same_tensors(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def test_adapters_is_read_before_best_adapters(tmp_path):
    best = {key: tensor * 2 for key, tensor in tensors().items()}
    folder = write(tmp_path / "a", best, name="best_adapters.safetensors")
    assert mlx.read_header(folder).weights == "best_adapters.safetensors"
    assert torch.equal(mlx.read_adapter(folder).modules[Q].A.T, best[f"{Q}.lora_a"])
    write(tmp_path / "a")
    assert mlx.read_header(folder).weights == "adapters.safetensors"
    assert torch.equal(mlx.read_adapter(folder).modules[Q].A.T, tensors()[f"{Q}.lora_a"])


def test_an_opened_adapter_reads_a_module_when_it_is_asked_for(tmp_path):
    spoilt = tensors()
    spoilt[f"{V}.lora_b"][1, 2] = float("nan")
    folder = write(tmp_path / "a", spoilt)
    adapter = mlx.open_adapter(folder)
    assert {path: header.shape for path, header in adapter.headers.items()} == {Q: (5, 6), V: (5, 6)}
    assert adapter.nbytes == 2 * (6 * 4 + 4 * 5) * 4
    assert torch.equal(adapter.modules[Q].B.T, spoilt[f"{Q}.lora_b"])
    with pytest.raises(AdapterError, match=r"^a: adapters.safetensors holds NaN in .*v_proj.lora_b \(1 of 20"):
        adapter.modules[V]
    with pytest.raises(AdapterError, match="holds NaN"):
        mlx.read_adapter(folder)


def test_headers_say_what_the_modules_are(tmp_path):
    weights = {key: t.half() if key.endswith("a") else t for key, t in tensors().items()}
    opened = mlx.open_adapter(write(tmp_path / "a", weights))
    assert opened.headers == {path: opened.modules[path].header for path in opened.modules}


REFUSED = {
    "full": ({**CONFIG, "fine_tune_type": "full"}, None, "fine_tune_type 'full' stores whole weights"),
    "another type": ({**CONFIG, "fine_tune_type": "ia3"}, None, "fine_tune_type 'ia3'"),
    "dora": ({**CONFIG, "fine_tune_type": "dora"}, tensors(dora=True), r"dora, and .* base's weights.\nPass .*--base"),
    "older dora": (
        {**CONFIG, "fine_tune_type": None, "use_dora": True}, tensors(dora=True), "DoRA's delta depends",
    ),
    "unknown option": (with_lora(rslora=True), None, "lora_parameters has rslora"),
    "magnitude": (CONFIG, tensors(dora=True), "q_proj.m.\nThat is DoRA's magnitude"),
    "whole tensor": (CONFIG, {**tensors(), "lm_head.weight": torch.ones(3, 3)}, "lm_head.weight.\nThat is a whole"),
    "experts": (
        CONFIG,
        {"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(3, 4, 6),
         "model.layers.0.mlp.switch_mlp.up_proj.lora_b": torch.ones(3, 5, 4)},
        "switch_mlp.up_proj adapts all experts .*LoRASwitchLinear",
    ),
    "embedding": (CONFIG, tensors(paths=["model.embed_tokens"]), "model.embed_tokens is an embedding"),
    "integers": (CONFIG, {key: t.to(torch.int8) for key, t in tensors().items()}, "is of type I8"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "weights", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_lora_of_linear_modules_is_refused_by_name(tmp_path, config, weights, message):
    folder = write(tmp_path / "mine", weights, config)
    with pytest.raises(UnsupportedAdapterError, match=message) as refusal:
        mlx.open_adapter(folder)
    assert str(refusal.value).startswith("mine: ")


BROKEN = {
    "no scale": (with_lora(scale="absent", alpha=16), None, "has no scale.*\n.* alpha is not used"),
    "no finite scale": (with_lora(scale=float("inf")), None, "scale is not a number"),
    "no rank": (with_lora(rank="absent"), None, "rank is not a rank"),
    "rank of another training": (with_lora(rank=8), None, r"Expected lora_a \(in, 8\).* found lora_a \(6, 4\)"),
    "no parameters": ({"fine_tune_type": "lora"}, None, "has no lora_parameters"),
    "no mapping": ([1], None, "is not a mapping"),
    "keys": (with_lora(keys=["self_attn.q_proj"]), None, "v_proj, which adapter_config.json does not adapt"),
    "no list of keys": (with_lora(keys="q_proj"), None, "keys is no list"),
    "too few layers": ({**CONFIG, "num_layers": 1}, None, "layers 0 to 1, where .* adapts the last 1,"),
    "half a module": (CONFIG, {f"{Q}.lora_a": torch.ones(6, 4)}, "q_proj has no lora_b"),
    "no magnitude": ({**CONFIG, "fine_tune_type": "dora"}, None, "q_proj has no m.\n"),
    "wrong magnitude": (
        {**CONFIG, "fine_tune_type": "dora"}, {**tensors(dora=True), f"{Q}.m": torch.ones(6)}, r"q_proj.m does not fit",
    ),
    "nothing": (CONFIG, {}, "holds no LoRA factors"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "weights", "message"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_together_is_an_error(tmp_path, config, weights, message):
    folder = write(tmp_path / "mine", weights, config)
    with pytest.raises(AdapterError, match=message) as error:
        mlx.open_adapter(folder)
    assert not isinstance(error.value, UnsupportedAdapterError)


def test_missing_and_truncated_files_are_named(tmp_path):
    folder = write(tmp_path / "mine")
    weights = tmp_path / "mine" / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError, match=r"mine: adapters.safetensors is truncated"):
        mlx.read_header(folder)
    weights.unlink()
    with pytest.raises(AdapterError, match=r"mine: adapters.safetensors is missing.\n.* or best_adapters.safetensors"):
        mlx.read_header(folder)
    (tmp_path / "mine" / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"mine: adapter_config.json is missing"):
        mlx.read_header(folder)


@pytest.mark.parametrize("keys", [["self_attn.q_proj", "self_attn.v_proj"], [Q, V], [Q, "self_attn.v_proj"], None])
def test_keys_name_modules_in_a_layer_or_in_the_model(tmp_path, keys):
    config = {**with_lora(keys=keys), "num_layers": 2}
    assert list(mlx.read_adapter(write(tmp_path / "a", config=config)).modules) == [Q, V]


def dora_folders(tmp_path):
    generator = torch.Generator().manual_seed(1)
    base = {f"{path}.weight": torch.randn(5, 6, generator=generator) for path in (Q, V)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    config = {**CONFIG, "fine_tune_type": "dora"}
    return write(tmp_path / "dora", tensors(dora=True), config), str(tmp_path / "base"), base


def test_dora_is_a_dense_delta_where_the_base_is_given(tmp_path):
    folder, location, base = dora_folders(tmp_path)
    adapter = mlx.open_adapter(folder, base=BaseWeights(location))
    raw = tensors(dora=True)
    for path in (Q, V):
        W = base[f"{path}.weight"].double()
        adapted = W + 2.5 * (raw[f"{path}.lora_a"].double() @ raw[f"{path}.lora_b"].double()).T
        wanted = raw[f"{path}.m"].double()[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
        module = adapter.modules[path]
        torch.testing.assert_close(W + module.delta(torch.float64), wanted, rtol=1e-5, atol=1e-6)
        assert module.nominal == 4
        assert module.header == adapter.headers[path]


def test_dora_and_a_base_that_do_not_fit_each_other(tmp_path):
    folder, location, base = dora_folders(tmp_path)
    base[f"{V}.weight"] = torch.ones(5, 7)
    save_file(base, tmp_path / "base" / "model.safetensors")
    with pytest.raises(AdapterError, match=r"dora: .*v_proj does not fit the base model.\nExpected a weight \(5, 6\)"):
        mlx.open_adapter(folder, base=BaseWeights(location))


def module(rank, scaling, seed=0, dtype=torch.float32, sizes=(5, 6), **more):
    generator = np.random.default_rng(seed)
    A, B = generator.standard_normal((rank, sizes[1])), generator.standard_normal((sizes[0], rank))
    return LoraModule(torch.tensor(A, dtype=dtype), torch.tensor(B, dtype=dtype), scaling, **more)


SCALINGS = st.floats(-64, 64).map(lambda value: float(np.float32(value)))
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def adapters(draw, scalings):
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), scalings, DTYPES), min_size=1, max_size=5))
    modules = {
        f"model.layers.{i}.mlp.up_proj": module(rank, scaling, i, dtype)
        for i, (rank, scaling, dtype) in enumerate(shapes)
    }
    return LoraAdapter(
        "x", modules, "org/base", task_type="CAUSAL_LM", started_from="start", errors={"*": 0.1, Q: 0.25}
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("mlx")


def there_and_back(adapter, place):
    """PEFT -> MLX -> PEFT."""
    first = read_peft(put(encode_peft(adapter), place / "peft"), "x")
    middle = mlx.read_adapter(put(mlx.encode_adapter(first), place / "mlx"), "x")
    return first, read_peft(put(encode_peft(middle), place / "again"), "x")


@given(scaling=SCALINGS, data=st.data())
def test_from_peft_to_mlx_and_back_nothing_is_lost(place, scaling, data):
    first, last = there_and_back(data.draw(adapters(st.just(scaling))), place)
    for path, before in first.modules.items():
        after = last.modules[path]
        assert torch.equal(after.A, before.A)
        assert torch.equal(after.B, before.B)
        assert after.scaling == pytest.approx(before.scaling, rel=1e-15)
    told = [(a.base_model, a.task_type, a.started_from, a.errors, a.headers.keys()) for a in (first, last)]
    assert told[0] == told[1]


@given(adapter=adapters(st.sampled_from([0.25, 0.5, 2.0, -4.0])))
def test_scalings_that_differ_by_powers_of_two_lose_nothing_either(place, adapter):
    first, last = there_and_back(adapter, place)
    for path, before in first.modules.items():
        after = last.modules[path]
        assert torch.equal(after.delta(torch.float64), before.delta(torch.float64))
        assert after.dtype == before.dtype


@given(adapter=adapters(SCALINGS))
def test_other_scalings_are_rounded_to_float32(place, adapter):
    first, last = there_and_back(adapter, place)
    for path, before in first.modules.items():
        wanted = before.delta(torch.float64)
        assert (last.modules[path].delta(torch.float64) - wanted).norm() <= 1e-7 * wanted.norm()
        assert last.modules[path].rank == before.rank


@given(adapter=adapters(SCALINGS))
def test_written_again_it_has_the_same_bytes(place, adapter):
    files = mlx.encode_adapter(adapter)
    assert mlx.encode_adapter(mlx.read_adapter(put(files, place / "again"), "x")) == files


def test_modules_are_named_in_full_with_one_rank_and_the_commonest_scale():
    adapter = LoraAdapter("x", {"a": module(2, 3.0), "b": module(4, 1.5), "c": module(1, 3.0), "d": module(1, 0.0)})
    files = mlx.encode_adapter(adapter)
    config = json.loads(files["adapter_config.json"])
    assert config["lora_parameters"] == {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["a", "b", "c", "d"]}
    assert config["num_layers"] == -1
    written = load(files["adapters.safetensors"])
    assert {tuple(t.shape) for t in written.values()} == {(6, 4), (4, 5)}
    assert not written["a.lora_a"][:, 2:].any()
    assert not written["a.lora_b"][2:].any()
    assert not written["d.lora_b"].any()


UNWRITABLE = {
    "bias": (LoraAdapter("mine", {Q: module(2, 1.0, bias=torch.ones(5))}), "q_proj has a trained bias"),
    "embedding": (LoraAdapter("mine", {"model.emb": module(2, 1.0, embedding=True)}), "model.emb has a LoRA of an emb"),
    "its name": (LoraAdapter("mine", {"model.embed_tokens": module(2, 1.0)}), "embed_tokens has a LoRA of an embedd"),
    "whole": (LoraAdapter("mine", {Q: module(2, 1.0)}, whole={"lm_head.weight": torch.ones(2, 2)}), "lm_head.weight"),
    "conv1d": (LoraAdapter("mine", {Q: module(2, 1.0)}, fan_in_fan_out=True), "fan_in_fan_out"),
    "float64": (LoraAdapter("mine", {Q: module(2, 1.0, dtype=torch.float64)}), "dtype float32"),
    "far scalings": (LoraAdapter("mine", {Q: module(2, 1e-30), V: module(2, 1e30)}), "too far from"),
    "and farther": (LoraAdapter("mine", {Q: module(2, 1e30), "a": module(2, 1e-30), "b": module(2, 1e-30)}), "1e-30"),
}


@pytest.mark.parametrize(("adapter", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_mlx_has_no_form_for_is_refused_by_name(adapter, message):
    with pytest.raises(UnsupportedAdapterError, match=message) as refusal:
        mlx.encode_adapter(adapter)
    assert str(refusal.value).startswith("mine: ")
    assert "cannot be written in MLX's form" in str(refusal.value)


def test_an_adapter_without_modules_is_not_written():
    with pytest.raises(AdapterError, match="has no modules"):
        mlx.encode_adapter(LoraAdapter("x", {}))


@pytest.mark.parametrize("ranks", ['{"gone": 1}', f'{{"{Q}": 5}}', f'{{"{Q}": 1.5}}', "[", "[1]"])
def test_ranks_that_cannot_be_are_an_error(tmp_path, ranks):
    folder = write(tmp_path / "a")
    save_file(tensors(), tmp_path / "a" / "adapters.safetensors", {"raymerge.ranks": ranks})
    with pytest.raises(AdapterError, match=r"a: adapters.safetensors has ranks in its metadata that can"):
        mlx.read_header(folder)
