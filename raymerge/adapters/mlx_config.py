"""What the `adapter_config.json` of an MLX adapter says, or why it is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.errors import AdapterError, UnsupportedAdapterError

# `alpha` stood in mlx-lm's defaults until 2025 and was never multiplied in: `scale` is the whole factor.
_KNOWN = frozenset({"rank", "scale", "dropout", "keys", "alpha"})
_TYPES = ("lora", "dora")
# As the models of mlx-lm name their embeddings. A LoRA of one has the same two matrices as that of a linear layer.
_EMBEDDING = re.compile(r"(wte|wpe|embed|embed_in|(\w+_)?(embed_tokens|embedding|embeddings)\w*)")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class MlxSettings:
    """An MLX configuration. keys: the modules that are adapted, by their path in a layer or in the model; None: all.

    num_layers: how many of the last layers are adapted; None or below 1: all.
    """

    rank: int
    scale: float
    dora: bool
    keys: tuple[str, ...] | None
    num_layers: int | None
    base_model: str | None

    def check_targets(self, paths: Iterable[str], where: str) -> None:
        """Refuse modules that mlx-lm would find no place for. Raises AdapterError."""
        layers, named = set(), frozenset(self.keys or ())
        for path in paths:
            if path in named:
                continue
            if self.keys is not None and not any(path.endswith(f".{key}") for key in self.keys):
                raise AdapterError(
                    f"{where} holds {path}, which adapter_config.json does not adapt, so that mlx-lm refuses it.\n"
                    f"Found keys {list(self.keys)!r}. Correct them, or remove the tensors."
                )
            if layer := _LAYER.search(path):
                layers.add(int(layer[1]))
        if self.num_layers and self.num_layers > 0 and layers and max(layers) - min(layers) >= self.num_layers:
            raise AdapterError(
                f"{where} holds layers {min(layers)} to {max(layers)}, where adapter_config.json adapts the last "
                f"{self.num_layers}, so that mlx-lm refuses it.\nCorrect num_layers, or remove the tensors."
            )


def is_embedding(path: str) -> bool:
    """Whether the models of mlx-lm give this name to an embedding."""
    return _EMBEDDING.fullmatch(path.rpartition(".")[2]) is not None


def check_config(config: Any, where: str) -> MlxSettings:
    """Give an `adapter_config.json` its meaning. `where` names it in errors. Keys about the training say nothing.

    Raises UnsupportedAdapterError, naming the option, for what is neither LoRA nor DoRA; AdapterError for what is
    broken.
    """
    if not isinstance(config, Mapping):
        raise AdapterError(f"{where}: adapter_config.json is not a mapping.")
    kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") else "lora")
    if kind == "full":
        raise UnsupportedAdapterError(
            f"{where}: fine_tune_type 'full' stores whole weights, not deltas.\nOnly lora and dora are adapters."
        )
    if kind not in _TYPES:
        raise UnsupportedAdapterError(f"{where}: fine_tune_type {kind!r} cannot be merged.\nExpected lora or dora.")
    lora = config.get("lora_parameters")
    if not isinstance(lora, Mapping):
        raise AdapterError(f"{where}: adapter_config.json has no lora_parameters.\nFound {lora!r}.")
    for option in sorted(set(lora) - _KNOWN):
        if lora[option] not in (None, False, 0, "", [], {}):
            raise UnsupportedAdapterError(
                f"{where}: lora_parameters has {option}, which is not known to leave the delta as it is.\n"
                f"Found {option}: {lora[option]!r}."
            )
    model, layers = config.get("model"), config.get("num_layers", config.get("lora_layers"))
    return MlxSettings(
        rank=_rank(lora.get("rank"), where),
        scale=_scale(lora, where),
        dora=kind == "dora",
        keys=_keys(lora.get("keys"), where),
        num_layers=layers if isinstance(layers, int) else None,
        base_model=model if isinstance(model, str) and model else None,
    )


def _rank(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{where}: rank is not a rank.\nExpected a whole number above 0, found {value!r}.")
    return value


def _scale(lora: Mapping[str, Any], where: str) -> float:
    if "scale" not in lora:
        hint = " alpha is not used by mlx-lm." if "alpha" in lora else ""
        raise AdapterError(f"{where}: lora_parameters has no scale.\nIt is the factor on lora_a @ lora_b.{hint}")
    value = lora["scale"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{where}: scale is not a number.\nFound {value!r}.")
    return float(value)


def _keys(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(key, str) for key in value):
        raise AdapterError(f"{where}: keys is no list of modules.\nFound {value!r}.")
    return tuple(value)
