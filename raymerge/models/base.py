"""The base model: loaded once, frozen, on one device that is always named."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from raymerge import storage
from raymerge.errors import ModelError, RaymergeError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal LM with its tokenizer, on one device.

    model: any transformers causal LM, in evaluation mode, no parameter requires a gradient.
    location: what it was loaded from, as the user wrote it; adapters trained on it record this.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    location: str

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


def load_base(location: str, device: str = "cpu", dtype: str = "float32") -> BaseModel:
    """Load a causal LM and its tokenizer, frozen.

    location: a local folder, a URI, or a name on the hub.
    device: as torch writes it (`cpu`, `cuda`, `cuda:1`); never guessed.
    dtype: float32, bfloat16, float16, or auto (bfloat16 where the device computes in it, else float32).
    Raises ModelError if it is not there, is no causal LM, or the device does not exist.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r}: not available here.\n{str(error).splitlines()[0]}") from error
    kind = resolve_dtype(dtype, place)
    source = _source(location)
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=kind)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{location}: cannot be loaded as a causal LM.\n{error}\n"
            "Expected a folder with config.json, weights and a tokenizer, or a name on the hub."
        ) from error
    model.to(place).eval().requires_grad_(False)
    return BaseModel(model, tokenizer, place, kind, location)


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
