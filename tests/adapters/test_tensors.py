"""safetensors files, against the library that defines them."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from raymerge.adapters.tensors import encode_tensors, open_tensors, read_tensors
from raymerge.errors import AdapterError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {f"{i}.{d}": torch.randn(3, 2 + i, generator=generator).to(d) for i in range(3) for d in DTYPES}


def test_reads_what_the_library_writes(tmp_path):
    path = str(tmp_path / "x.safetensors")
    tensors = some_tensors()
    save_file(tensors, path, metadata={"format": "pt"})
    file = open_tensors(path, "x")
    assert file.metadata == {"format": "pt"}
    assert set(file.tensors) == set(tensors)
    for name, read in zip(tensors, read_tensors(file, list(tensors), "x"), strict=True):
        assert read.dtype == tensors[name].dtype
        assert torch.equal(read, tensors[name])


def test_the_library_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = some_tensors()
    path.write_bytes(encode_tensors(tensors, {"z": "1", "format": "pt"}))
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"z": "1", "format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_equal_content_is_equal_bytes():
    tensors = some_tensors()
    turned = dict(reversed(tensors.items()))
    assert encode_tensors(tensors, {"a": "1", "b": "2"}) == encode_tensors(turned, {"b": "2", "a": "1"})


def test_a_view_is_written_as_what_it_shows(tmp_path):
    path = tmp_path / "x.safetensors"
    wide = torch.arange(12.0).reshape(3, 4)
    path.write_bytes(encode_tensors({"t": wide.T}, {}))
    assert torch.equal(read_tensors(open_tensors(str(path), "x"), ["t"], "x")[0], wide.T)


@given(st.integers(0, 10_000))
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path_factory, cut):
    whole = encode_tensors(some_tensors(), {"format": "pt"})
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(AdapterError, match=r"^persona_1: x"):
        open_tensors(str(path), "persona_1: x")


def with_header(header, data=b"\0" * 8):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        with_header([1]),
        with_header({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        with_header({"t": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        with_header({"t": {"dtype": "F32", "shape": [2]}}),
        with_header({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
        with_header({t: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for t in "ab"}),
        with_header({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        with_header({"t": 1}),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["list", "shape", "negative", "offsets", "hole", "overlap", "rest", "entry", "pointer"],
)
def test_a_broken_header_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"^x"):
        open_tensors(str(path), "x")


def test_tensors_that_are_no_floats_are_refused_when_read(tmp_path):
    path = str(tmp_path / "x.safetensors")
    save_file({"t": torch.arange(3)}, path)
    with pytest.raises(AdapterError, match="of type I64"):
        read_tensors(open_tensors(path, "x"), ["t"], "x")


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_tensors({"t": torch.ones(100)}, {}))
    file = open_tensors(str(path), "x")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AdapterError, match="truncated"):
        read_tensors(file, ["t"], "x")
