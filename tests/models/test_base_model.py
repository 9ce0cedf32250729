"""A base loads frozen, on the device and in the dtype that were named, or is refused by name."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raymerge.errors import ModelError
from raymerge.models.base import BaseModel, load_base


def test_loads_frozen(tiny_llama: Path) -> None:
    base = load_base(str(tiny_llama), device="cpu", dtype="bfloat16")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert (base.location, base.max_length, base.end_ids) == (str(tiny_llama), 128, (2,))


def test_auto_is_float32_where_the_device_has_no_bfloat16(tiny_llama: Path) -> None:
    assert load_base(str(tiny_llama), dtype="auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"location": "/nowhere/base"}, "/nowhere/base: there is no such folder"),
        ({"device": "cuda:77"}, "device 'cuda:77': not available"),
        ({"device": "abacus"}, "device 'abacus': not available"),
        ({"dtype": "int8"}, "dtype 'int8' is not known"),
    ],
)
def test_what_is_not_there_is_refused(tiny_llama: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_base(**{"location": str(tiny_llama), **change})


def test_a_folder_without_weights_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="broken: cannot be loaded as a causal LM"):
        load_base(str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match="broken: cannot be loaded as a causal LM"):
        load_base(str(broken))


def test_pad_and_end_ids_without_special_tokens(base: BaseModel) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.pad_token = None
    assert replace(base, tokenizer=tokenizer).pad_id == 2
    tokenizer.eos_token = None
    bare = replace(base, tokenizer=tokenizer)
    bare.model.generation_config.eos_token_id = None
    assert (bare.pad_id, bare.end_id, bare.end_ids) == (0, None, ())
