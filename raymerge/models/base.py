"""The base model: loaded once, frozen, on one device or spread over several GPUs."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from raymerge import storage
from raymerge.errors import ModelError, RaymergeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("none", "8bit", "4bit")


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal LM with its tokenizer.

    model: any transformers causal LM, in evaluation mode, no parameter requires a gradient.
    device: where token ids go and logits come from, that of the embedding. A model that is spread over several GPUs
        has its later layers elsewhere.
    dtype: what it computes in. quantization: none, 8bit or 4bit: how its linear layers are kept.
    location: what it was loaded from, as the user wrote it; adapters trained on it record this.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    location: str
    quantization: str = "none"

    @property
    def max_length(self) -> int | None:
        """Positions the model knows, in tokens; None where it has no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit else None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: the generation configuration may list several, the tokenizer knows one."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        listed = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({int(i) for i in [*listed, self.tokenizer.eos_token_id] if i is not None}))

    @property
    def end_id(self) -> int | None:
        """The token that training puts after an answer; None where the model has none."""
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        return self.end_ids[0] if self.end_ids else None

    @property
    def pad_id(self) -> int:
        """What fills unused places. Never seen by the model, so any id serves where the tokenizer has none."""
        known = [self.tokenizer.pad_token_id, self.end_id, 0]
        return int(next(i for i in known if i is not None))


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype a name stands for; `auto` is bfloat16 where the device computes in it, else float32."""
    if dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known.\nUse one of: auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def load_base(
    location: str, device: str = "cpu", dtype: str = "float32", quantization: str = "none", gpus: int = 1
) -> BaseModel:
    """Load a causal LM and its tokenizer, frozen.

    location: a local folder, a URI, or a name on the hub.
    device: as torch writes it (`cpu`, `cuda`, `cuda:1`); never guessed.
    dtype: float32, bfloat16, float16, or auto (bfloat16 where the device computes in it, else float32).
    quantization: none; 8bit (LLM.int8, Dettmers et al. 2022); or 4bit (NF4 with quantised constants, Dettmers et al.
        2023, QLoRA). Linear layers but the output head are kept so; they compute in `dtype`.
    gpus: over how many of the visible GPUs the layers are spread evenly, with device `cuda`.
    Memory: the weights are read once, straight to where they stay. On a CPU and in the dtype of the file they are that
    file, mapped, so that all workers of a machine share one copy; another dtype is a copy for each worker.
    Raises ModelError if it is not there, is no causal LM, does not fit, or the device or bitsandbytes is missing.
    """
    place = _available(device)
    kind = resolve_dtype(dtype, place)
    source = _source(location)
    placing = _placing(place, gpus)
    transformers.utils.logging.disable_progress_bar()
    try:
        quantizing = _quantizing(source, quantization, kind)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=kind, **placing, **quantizing)
    except ModelError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(_too_large(location, gpus)) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{location}: cannot be loaded as a causal LM.\n{error}\n"
            "Expected a folder with config.json, weights and a tokenizer, or a name on the hub."
        ) from error
    if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()) and place.type != "cpu":
        raise ModelError(_too_large(location, gpus))
    _settle_quantised(model)
    model.eval().requires_grad_(False)
    return BaseModel(model, tokenizer, model.get_input_embeddings().weight.device, kind, location, quantization)


def _available(device: str) -> torch.device:
    try:
        place = torch.device(device)
        return torch.empty(0, device=place).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r}: not available here.\n{str(error).splitlines()[0]}") from error


def _placing(place: torch.device, gpus: int) -> dict[str, Any]:
    """What says to transformers where the layers go: all to one device, or spread evenly over the first `gpus`."""
    if gpus == 1:
        return {"device_map": {"": place}}
    visible = torch.cuda.device_count() if place.type == "cuda" else 0
    if not 1 <= gpus <= visible:
        raise ModelError(
            f"the base model is to be spread over {gpus} GPUs, of device {place.type} this process sees {visible}.\n"
            "Set hardware.gpus_per_model to what one machine has."
        )
    return {"device_map": "balanced", "max_memory": {i: torch.cuda.mem_get_info(i)[0] for i in range(gpus)}}


def _quantizing(source: str, quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """What says to transformers how the linear layers are kept."""
    if quantization == "none":
        return {}
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization {quantization!r} is not known.\nUse one of: {', '.join(QUANTIZATIONS)}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization {quantization} needs bitsandbytes, which is not installed.\n"
            "pip install 'raymerge[quantised]'"
        )
    stored = transformers.PretrainedConfig.get_config_dict(source)[0].get("quantization_config")
    if stored is not None:
        raise ModelError(
            f"{source}: is quantised already ({stored.get('quant_method', 'in an unknown way')}), and quantization is "
            f"{quantization}.\nLeave out hardware.quantization, or name the base as it was before."
        )
    if quantization == "8bit":
        return {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    }


def _settle_quantised(model: Any) -> None:
    """Make layers of bitsandbytes, asked for or found in the file, behave; there need be none."""
    # 8-bit products say at each call that they round what they are given: that is what they are for.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        # Where a CPU has this, the weights would be packed anew at the first answer: training could no longer read
        # them, and a layer narrower than a block of 64 cannot be packed at all.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _too_large(location: str, gpus: int) -> str:
    room = "the GPU" if gpus == 1 else f"{gpus} GPUs"
    return (
        f"{location}: the base model does not fit on {room} of a worker.\n"
        "Raise hardware.gpus_per_model, or set hardware.dtype to bfloat16 or hardware.quantization to 8bit or 4bit."
    )


def _source(location: str) -> str:
    try:
        local = str(storage.open_local(location))
    except RaymergeError as error:
        raise ModelError(f"{location}: the base model cannot be read.\n{error}") from error
    if os.path.isdir(local):
        return local
    looks_like_path = os.path.isabs(location) or location.startswith((".", "~")) or location.count("/") > 1
    if looks_like_path or storage.is_uri(location):
        raise ModelError(f"{location}: there is no such folder.\nExpected config.json, weights and a tokenizer in it.")
    return location
