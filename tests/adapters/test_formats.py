"""One door to adapters in PEFT's and MLX's form."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from raymerge import merge, storage
from raymerge.adapters import (
    FORMATS,
    LoraAdapter,
    LoraModule,
    encode_adapter,
    format_of,
    load_adapter,
    open_adapter,
    read_adapter,
    read_header,
    save_adapter,
    weight_files,
)
from raymerge.errors import AdapterError
from raymerge.manifest import read_manifest

Q = "model.layers.3.self_attn.q_proj"
FILES = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}


def adapter_of(seed=0, scaling=2.0):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    return LoraAdapter("x", {Q: LoraModule(A, B, scaling)}, "org/base", errors={"*": 0.5, Q: 0.25})


def save(folder, format, **more):
    save_adapter(adapter_of(**more), str(folder), format)
    return str(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_known_and_read(tmp_path, format):
    folder = save(tmp_path / "a", format)
    assert format_of(folder) == format
    assert weight_files(folder) == (f"{folder}/{FILES[format]}", f"{folder}/adapter_config.json")
    assert read_header(folder, "me").name == "me"
    assert read_header(folder).settings.base_model == "org/base"
    for adapter in (load_adapter(folder), read_adapter(folder), open_adapter(folder)):
        assert adapter.name == "a"
        assert torch.equal(adapter.modules[Q].delta(), adapter_of().modules[Q].delta())
        assert adapter.errors == adapter_of().errors
    assert read_manifest(folder)["errors"] == adapter_of().errors


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_never_finished_is_not_read_and_a_foreign_manifest_says_nothing(tmp_path, format):
    folder = save(tmp_path / "a", format)
    for foreign in ("", "[1]", "\xff"):
        (tmp_path / "a/manifest.json").write_bytes(foreign.encode("latin-1"))
        assert read_adapter(folder).name == open_adapter(folder).name == "a"
    (tmp_path / "a/manifest.json").write_text(json.dumps({"unfinished": True}))
    for read in (read_adapter, open_adapter):
        with pytest.raises(AdapterError, match=r"^me: was begun and not finished"):
            read(folder, "me")
        with pytest.raises(AdapterError, match="was begun and not finished"):
            read(f"{folder}/{FILES[format]}")


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_may_be_named_by_its_weights(tmp_path, format):
    folder = save(tmp_path / "a", format)
    file = f"{folder}/{FILES[format]}"
    assert weight_files(file) == weight_files(folder)
    assert read_adapter(file, "a").headers == read_adapter(folder).headers


def test_a_checkpoint_is_an_adapter(tmp_path):
    folder = save(tmp_path / "a", "mlx")
    other = encode_adapter(adapter_of(1), "mlx")["adapters.safetensors"]
    (tmp_path / "a" / "0000100_adapters.safetensors").write_bytes(other)
    checkpoint = f"{folder}/0000100_adapters.safetensors"
    assert format_of(checkpoint) == "mlx"
    assert torch.equal(open_adapter(checkpoint).modules[Q].A, adapter_of(1).modules[Q].A)
    assert read_header(f"file://{checkpoint}").weights == "0000100_adapters.safetensors"
    assert weight_files(f"file://{checkpoint}")[0] == f"file://{checkpoint}"


def test_another_file_is_no_adapter_in_peft_form(tmp_path):
    folder = save(tmp_path / "a", "peft")
    (tmp_path / "a" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(
        AdapterError, match=r"optimizer.safetensors: is no adapter .*\n.* its adapter_model.safetensors"
    ):
        read_header(f"{folder}/optimizer.safetensors")


def test_formats_merge_with_each_other(tmp_path):
    ours = [open_adapter(save(tmp_path / f, f, seed=i, scaling=i + 1.5), f) for i, f in enumerate(FORMATS)]
    wanted = sum(0.5 * adapter_of(i, i + 1.5).modules[Q].delta(torch.float64) for i in range(2))
    merged = merge(ours, [0.5, 0.5], rank="exact")
    torch.testing.assert_close(merged.modules[Q].delta(torch.float64), wanted, rtol=1e-5, atol=1e-5)


def test_real_adapters_of_both_formats_are_told_apart(test_data):
    found = {folder: format_of(str(test_data / "adapters" / folder)) for folder in (
        "gpt2-r8-fan-in-fan-out", "open-calm-1b-r1-fp16", "mlx-qwen2.5-0.5b-r8"
    )}  # fmt: skip
    assert list(found.values()) == ["peft", "peft", "mlx"]


def test_a_real_adapter_goes_from_mlx_to_peft_and_back(test_data, tmp_path):
    folder = test_data / "adapters" / "mlx-qwen2.5-0.5b-r8"
    save_adapter(read_adapter(str(folder)), str(tmp_path / "peft"))
    save_adapter(read_adapter(str(tmp_path / "peft")), str(tmp_path / "mlx"), format="mlx")
    ours, theirs = (load_file(place / "adapters.safetensors") for place in (tmp_path / "mlx", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    wanted = json.loads((folder / "adapter_config.json").read_text())
    written = storage.read_json(str(tmp_path / "mlx" / "adapter_config.json"))
    assert written["model"] == wanted["model"]
    assert {k: written["lora_parameters"][k] for k in ("rank", "scale")} == {"rank": 8, "scale": 10.0}


def test_where_there_is_no_adapter_the_files_are_listed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "README.md").write_text("")
    with pytest.raises(AdapterError) as error:
        format_of(str(tmp_path))
    first, second = str(error.value).splitlines()
    assert first == f"{tmp_path}: there is no adapter."
    assert second.startswith("Expected adapter_config.json with adapter_model.safetensors (PEFT) or adapters.")
    assert second.endswith("found README.md, sub.")
    with pytest.raises(AdapterError, match=rf"^me: there is no adapter in {tmp_path}/none\.\n.*found nothing\.$"):
        open_adapter(f"{tmp_path}/none", "me")


@pytest.mark.parametrize("format", FORMATS)
def test_a_configuration_that_is_missing_or_says_nothing_is_named(tmp_path, format):
    folder = save(tmp_path / "a", format)
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text("{}")
    assert format_of(folder) == format
    with pytest.raises(AdapterError, match=r"^a: "):
        read_header(folder)
    for text in ("{", None):
        config.write_text(text) if text else config.unlink()
        with pytest.raises(AdapterError, match=r"^a: adapter_config.json is missing or cannot be read"):
            read_header(folder)


def test_the_configuration_decides_where_both_weights_are_there(tmp_path):
    save(tmp_path / "a", "mlx")
    folder = save(tmp_path / "a", "peft")
    assert format_of(folder) == "peft"
    assert weight_files(folder)[0].endswith("adapter_model.safetensors")


def test_an_unknown_format_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(AdapterError, match=r"x: unknown format 'pefd'\. Did you mean peft"):
        save_adapter(adapter_of(), str(tmp_path / "a"), format="pefd")
    assert not (tmp_path / "a").exists()


def test_asking_what_is_there_needs_no_torch(tmp_path):
    folders = [save(tmp_path / format, format) for format in FORMATS]
    code = (
        "import sys; from raymerge.adapters import format_of, read_header, weight_files\n"
        f"for folder in {folders!r}: print(format_of(folder), read_header(folder).name, weight_files(folder))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_adapter_that_was_trained_is_never_replaced(tmp_path):
    one = LoraAdapter("anna", {"q": LoraModule(torch.ones(1, 3), torch.ones(2, 1), 1.0)})
    save_adapter(one, str(tmp_path / "own"))
    save_adapter(one, str(tmp_path / "own"))  # its own may be
    trained = tmp_path / "trained"
    trained.mkdir()
    for name, data in encode_adapter(one).items():
        (trained / name).write_bytes(data)
    with pytest.raises(AdapterError, match=r"trained: holds an adapter that was not written by raymerge"):
        save_adapter(one, str(trained))
