"""What a PEFT `adapter_config.json` says, or why it is refused.

An option that changes what the adapter computes is either understood exactly or refused by its name, and so is every
option not known here whose value is not null, false or empty: a variant that looks like plain LoRA is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.errors import AdapterError, UnsupportedAdapterError

# Options that say nothing about the delta of stored factors.
SILENT = frozenset({
    "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "megatron_core", "runtime_config",
    "qalora_group_size", "eva_config",
})  # fmt: skip
READ = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "bias", "init_lora_weights", "lora_bias", "modules_to_save", "use_dora",
})  # fmt: skip
# The start of a training that leaves the base as it is.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
BIASES = ("none", "all", "lora_only")
WHY = {
    "trainable_token_indices": "rows of the embedding are stored, not deltas",
    "ensure_weight_tying": "embedding and head share what is trained",
    "layer_replication": "the adapter changes the base's layers",
    "target_parameters": "parameters are adapted, not modules",
    "kasa_config": "KaSA truncates the base and puts a diagonal between the factors",
    "use_bdlora": "the factors are block-diagonal and stored packed",
    "use_qalora": "inputs are pooled before the first factor",
    "loftq_config": "LoftQ moves the base",
    "corda_config": "CorDA moves the base",
    "lora_ga_config": "LoRA-GA moves the base",
}


@dataclass(frozen=True)
class LoraSettings:
    """What a LoRA configuration says. Patterns are (regular expression, value) in their order: the first match counts.

    bias: `none`, `all` or `lora_only`: which biases of the base were trained, and are stored whole. lora_bias: whether
    each module has a bias of its own beside its factors. dora: whether it has a magnitude (DoRA, arXiv:2402.09353).
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] | None
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    fan_in_fan_out: bool
    base_model: str | None
    task_type: str | None
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    dora: bool = False

    def rank_of(self, path: str) -> int:
        """Rank of a module by its path in the base."""
        return int(_first_match(self.rank_pattern, path, self.rank))

    def scaling_of(self, path: str) -> float:
        """Factor on B @ A: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv:2312.03732)."""
        rank, alpha = self.rank_of(path), _first_match(self.alpha_pattern, path, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, path: str) -> bool:
        """Whether PEFT would adapt this module; True where only the base could tell (null, `all-linear`)."""
        if _named(self.exclude_modules, path):
            return False
        if self.target_modules is None or self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, str) or not _named(self.target_modules, path):
            return _named(self.target_modules, path)
        return self.layers_to_transform is None or self._layer_of(path) in self.layers_to_transform

    def saves(self, path: str) -> bool:
        """Whether PEFT would train and save this module whole, or one that it is part of."""
        return saves(self.modules_to_save, path)

    def _layer_of(self, path: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for match in (re.match(p, path) for p in patterns) if match), None)
        return int(found.group(1)) if found else None


def _first_match(pattern: tuple[tuple[str, float], ...], path: str, default: float) -> float:
    return next((value for key, value in pattern if re.match(rf"(.*\.)?({key})$", path)), default)


def _named(modules: str | tuple[str, ...] | None, path: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == module or path.endswith(f".{module}") for module in modules or ())


def saves(modules_to_save: Sequence[str], path: str) -> bool:
    """Whether a module is, or is part of, one whose name ends as modules_to_save says: what PEFT saves whole."""
    parts = path.split(".")
    above = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(module.endswith(name) for module in above for name in modules_to_save)


def check_config(config: Any, where: str) -> LoraSettings:
    """Give an `adapter_config.json` its meaning. `where` names it in errors.

    Raises UnsupportedAdapterError, naming the option, for what is not plain LoRA; AdapterError for what is broken.
    """
    if not isinstance(config, Mapping):
        raise AdapterError(f"{where}: adapter_config.json is not a mapping.")
    _check_type(config, where)
    _check_options(config, where)
    rank = _integer(config.get("r", 8), "r", where)
    layers = config.get("layers_to_transform")
    try:
        return LoraSettings(
            rank=rank,
            alpha=_number(config.get("lora_alpha", 8), "lora_alpha", where),
            use_rslora=bool(config.get("use_rslora")),
            rank_pattern=_pattern(config, "rank_pattern", where, _integer),
            alpha_pattern=_pattern(config, "alpha_pattern", where, _number),
            target_modules=_modules(config.get("target_modules")),
            exclude_modules=_modules(config.get("exclude_modules")) or None,
            layers_to_transform=None if layers in (None, []) else _integers(layers),
            layers_pattern=_strings(config.get("layers_pattern") or ()),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            base_model=config.get("base_model_name_or_path") or None,
            task_type=config.get("task_type") or None,
            bias=config.get("bias") or "none",
            lora_bias=bool(config.get("lora_bias")),
            modules_to_save=_strings(config.get("modules_to_save") or ()),
            dora=bool(config.get("use_dora")),
        )
    except (TypeError, re.error) as error:
        raise AdapterError(f"{where}: adapter_config.json cannot be understood.\n{error}.") from error


def _check_type(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind is None and "lora_parameters" in config:
        raise UnsupportedAdapterError(
            f"{where}: adapter_config.json has no peft_type; it looks like an MLX adapter.\n"
            "Only PEFT's LoRA form is read."
        )
    if kind != "LORA":
        raise UnsupportedAdapterError(f"{where}: peft_type {kind!r} cannot be merged.\nOnly LORA is supported.")


def _check_options(config: Mapping[str, Any], where: str) -> None:
    if config.get("bias", "none") not in (None, *BIASES):
        raise UnsupportedAdapterError(
            f"{where}: bias {config['bias']!r} is not known.\nExpected one of {', '.join(BIASES)}."
        )
    if config.get("use_dora") and config.get("lora_bias"):
        raise UnsupportedAdapterError(f"{where}: use_dora and lora_bias are both set, which PEFT does not support.")
    start = config.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in HARMLESS_STARTS:
        raise UnsupportedAdapterError(
            f"{where}: init_lora_weights {start!r} moves the base's weights, so the factors alone are not its delta.\n"
            "Convert it to plain LoRA when saving (PEFT: path_initial_model_for_weight_conversion)."
        )
    for option in sorted(set(config) - SILENT - READ):
        value = config[option]
        if value is None or value is False or (hasattr(value, "__len__") and len(value) == 0):
            continue
        why = WHY.get(option, "this option is not known to leave the delta as scaling * B @ A")
        raise UnsupportedAdapterError(f"{where}: {option} is set, and {why}.\nFound {option}: {value!r}.")


def _pattern(config: Mapping[str, Any], key: str, where: str, read: Any) -> tuple[tuple[str, Any], ...]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise AdapterError(f"{where}: {key} is not a mapping.\nFound {pattern!r}.")
    for expression in pattern:
        re.compile(expression)
    return tuple((str(name), read(value, f"{key}[{name}]", where)) for name, value in pattern.items())


def _integer(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{where}: {key} is not a rank.\nExpected a whole number above 0, found {value!r}.")
    return value


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{where}: {key} is not a number.\nFound {value!r}.")
    return float(value)


def _integers(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(int(item) for item in value)


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(item) for item in value)


def _modules(value: Any) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value != "all-linear":
            re.compile(value)
        return value
    return _strings(value)
