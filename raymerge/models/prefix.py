"""Prefixes on one resident base model: keys and values that stand before the first token in every layer.

Prefix tuning (Li and Liang 2021, arXiv:2101.00190) trains them and nothing else. Every row of a batch has a prefix of
its own, or none. Form, files and the positions of the tokens that follow are PEFT's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import DynamicCache

from raymerge import storage
from raymerge.adapters.formats import CONFIG, check_finished
from raymerge.adapters.peft import WEIGHTS
from raymerge.errors import AdapterError, ModelError, StorageError, UnsupportedAdapterError
from raymerge.models.layers import replace_forward

TENSOR = "prompt_embeddings"  # its name in PEFT's file

# PEFT brings the cache of these into forms of their own.
_SPECIAL = ("bloom", "gpt_bigcode", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text")


@dataclass(frozen=True, eq=False)
class Prefix:
    """A trained prefix. embeddings: float32 (tokens, layers * 2 * heads * head size), keys before values in a layer."""

    name: str
    embeddings: Tensor

    @property
    def tokens(self) -> int:
        """Places of the context that it takes."""
        return len(self.embeddings)


@dataclass(frozen=True)
class CacheShape:
    """A model's keys and values: layers, heads that have keys, numbers of each."""

    layers: int
    heads: int
    size: int

    @property
    def width(self) -> int:
        """Numbers that a token takes in the cache."""
        return self.layers * 2 * self.heads * self.size


def cache_shape(model: Any) -> CacheShape:
    """The shape of a transformers model's cache. Raises ModelError for a model that PEFT treats in a way of its own."""
    config = model.config.get_text_config()
    if config.model_type in _SPECIAL or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"prefix: models of type {config.model_type} cannot have one here.\nUse LoRA for it.")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CacheShape(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size)


def check_prefix(prefix: Prefix, model: Any, room: int) -> None:
    """Raise ModelError if a prefix does not fit the model's cache, or leaves less than `room` of its context."""
    shape = cache_shape(model)
    if prefix.embeddings.shape[1] != shape.width:
        raise ModelError(
            f"{prefix.name}: its prefix has {prefix.embeddings.shape[1]} numbers per token, the model's cache "
            f"{shape.width}.\nIt was trained on another base model."
        )
    check_room(prefix.name, prefix.tokens, model, room)


def check_room(name: str, tokens: int, model: Any, room: int) -> None:
    """Raise ModelError if a prefix of so many tokens leaves fewer than `room` places of the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and limit - tokens < room:
        raise ModelError(
            f"{name}: a prefix of {tokens} tokens leaves {max(0, limit - tokens)} of the model's {limit} places.\n"
            f"Prompt and answer need at least {room}. Make the prefix shorter, or max_new_tokens smaller."
        )


def read_prefix(location: str, name: str) -> Prefix:
    """A prefix in PEFT's form. Raises AdapterError that names it for one that is not there, was not finished, holds
    NaN or Inf, or is cut off; UnsupportedAdapterError for an adapter of another type."""
    check_finished(location, name)
    try:
        config = storage.read_json(storage.join(location, CONFIG))
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != "PREFIX_TUNING":
            raise UnsupportedAdapterError(f"{name}: {location} is no prefix.\nIts peft_type is {kind}.")
        embeddings = load(storage.read_bytes(storage.join(location, WEIGHTS)))[TENSOR].float()
    except StorageError as error:
        raise AdapterError(f"{name}: there is no prefix in {location}.\n{error}") from error
    except (SafetensorError, KeyError) as error:
        raise AdapterError(f"{name}: {WEIGHTS} holds no prefix that can be read.\n{error}") from error
    if embeddings.ndim != 2 or not bool(torch.isfinite(embeddings).all()):
        fault = "holds NaN or Inf" if embeddings.ndim == 2 else f"has {embeddings.ndim} dimensions, not 2"
        raise AdapterError(f"{name}: {WEIGHTS} {fault} in {TENSOR}.")
    return Prefix(name, embeddings)


def encode_prefix(prefix: Prefix, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a prefix as `PeftModel.from_pretrained` reads them. config: of PEFT's PrefixTuningConfig."""
    weights = {TENSOR: prefix.embeddings.detach().to("cpu", torch.float32).contiguous()}
    return {CONFIG: storage.encode_json(dict(sorted(config.items()))), WEIGHTS: save(weights, {"format": "pt"})}


class Prefixes:
    """Prefixes attached to a model; without an active `rows` the model is the base."""

    module_names: tuple[str, ...] = ()  # no layer of the model is changed

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shape = cache_shape(model)
        self._embeddings: list[Tensor] = []
        self._active: _Active | None = None
        self._restore: Callable[[], None] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the longest prefix: what prompts and answers have less of the context."""
        return max((len(own) for own in self._embeddings), default=0)

    def load(self, embeddings: Sequence[Tensor]) -> None:
        """Attach prefixes, in this order, in place of all that were loaded.

        embeddings: as of a Prefix, on any device; a gradient reaches those that ask for one.
        """
        self.detach()
        self._embeddings = [own.to(self.model.get_input_embeddings().weight.device) for own in embeddings]
        self._restore = _wrap_decoder(self.model.base_model, lambda: self._active)

    def detach(self) -> None:
        """Put the model back as it was and forget the prefixes."""
        if self._restore is not None:
            self._restore()
        self._restore, self._embeddings = None, []

    @contextmanager
    def rows(self, index: Tensor | Sequence[int]) -> Iterator[None]:
        """Begin row i of every batch with prefix `index[i]`; -1 begins with nothing.

        index: int64 (batch,). Raises ModelError if an index names no prefix.
        """
        chosen = [int(i) for i in index]
        if chosen and not -1 <= min(chosen) <= max(chosen) < len(self._embeddings):
            found = f"{min(chosen)} to {max(chosen)}"
            raise ModelError(f"rows name prefixes {found}.\nExpected -1 to {len(self._embeddings) - 1}.")
        if self._active is not None:
            raise ModelError("rows are active already.\nLeave one `with` block before the next.")
        if any(number >= 0 for number in chosen):
            self._active = self._begun(chosen)
        try:
            yield
        finally:
            self._active = None

    def _begun(self, chosen: Sequence[int]) -> _Active:
        """Keys and values (layers * 2, rows, heads, tokens, size), shorter prefixes padded on the left."""
        lengths = torch.tensor([len(self._embeddings[i]) if i >= 0 else 0 for i in chosen])
        most = int(lengths.max())
        weight = self.model.get_input_embeddings().weight
        parts = []
        for number, run in groupby(chosen):  # cut and expand alone: their gradients are summed in one order anywhere
            own = self._embeddings[number] if number >= 0 else weight.new_zeros(0, self.shape.width)
            full = torch.nn.functional.pad(own, (0, 0, most - len(own), 0))
            split = full.view(most, 2 * self.shape.layers, self.shape.heads, self.shape.size).permute(1, 2, 0, 3)
            parts.append(split[:, None].to(weight.dtype).expand(-1, len(list(run)), -1, -1, -1))
        return _Active(self.model, torch.cat(parts, 1), lengths.to(weight.device))


class _Active:
    """What a batch begins with, and how the model is told."""

    def __init__(self, model: Any, states: Tensor, lengths: Tensor) -> None:
        self.model = model
        self.states = states
        self.lengths = lengths
        self.most = states.shape[3]
        self.uniform = bool((lengths == self.most).all())

    def extended(self, arguments: dict[str, Any], width: int, takes_positions: bool) -> dict[str, Any]:
        """The arguments of a forward pass over (rows, width) tokens, with the prefixes before them."""
        past = arguments.get("past_key_values")
        if past is None or not past.get_seq_length():
            arguments = {**arguments, "past_key_values": self._cache(), "use_cache": True}
            seen = 0
        else:
            seen = past.get_seq_length() - self.most
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if mask is None and positions is None and self.uniform:
            return arguments  # the model counts the cache itself
        device = self.lengths.device
        if mask is None:
            mask = torch.ones(len(self.lengths), seen + width, dtype=torch.int64, device=device)
        if positions is None:
            positions = torch.arange(seen, seen + width, device=device)[None]
        before = torch.arange(self.most, device=device)[None] >= self.most - self.lengths[:, None]
        told = {"attention_mask": torch.cat([before.to(mask.dtype), mask], 1)}
        if takes_positions:
            told["position_ids"] = positions + self.lengths[:, None]
        return {**arguments, **told}

    def _cache(self) -> DynamicCache:
        cache = DynamicCache(list(zip(self.states[0::2], self.states[1::2], strict=True)))
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            from peft.utils.integrations import map_cache_to_layer_device_map

            map_cache_to_layer_device_map(self.model, cache)
        return cache


def _wrap_decoder(decoder: Any, active: Callable[[], _Active | None]) -> Callable[[], None]:
    """Let what is active extend a decoder's forward pass; returns what puts the decoder back."""
    original = decoder.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        now = active()
        if now is None:
            return original(*args, **kwargs)
        given = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        return original(**now.extended(given, tokens.shape[1], "position_ids" in signature.parameters))

    return replace_forward(decoder, forward)
