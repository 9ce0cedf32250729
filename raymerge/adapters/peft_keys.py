"""What the tensor names in a file of PEFT's form mean, and which of them are refused.

Names and shapes only, no weight. A tensor that PEFT would pass over is refused like one it reads otherwise than a plain
LoRA: an adapter means exactly what PEFT computes with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from raymerge.adapters.peft_config import LoraSettings
from raymerge.adapters.tensors import FLOATS
from raymerge.errors import AdapterError, UnsupportedAdapterError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # as one version of PEFT wrote it; all read it
}
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_WHOLE = re.compile(rf"{re.escape(PREFIX)}(?P<name>[^.]+(\.[^.]+)+)")
# Copies of a trained module's tensors that PEFT writes beside them with `bias: all`, and does not read.
_COPY = re.compile(r"(?P<module>.+)\.(original_module|modules_to_save\.[^.]+)\.(?P<rest>.+)")
# Tensors that say by their name what they are, and why their adapter is refused.
_FOREIGN = (
    (re.compile(r"lora_A(\.\w+)?\.bias$"), "a bias of the first factor"),
    (re.compile(r"lora_[AB]\.\w+\.(weight|bias)$"), "saved under an adapter's name; save it with save_pretrained"),
    (re.compile(r"^(?!.*lora_)"), "neither a factor nor a weight, a bias or of a module in modules_to_save"),
)


class ModuleKeys(NamedTuple):
    """Names of one module's tensors. bias: of `lora_bias`. magnitude: DoRA's. embedding: the factors are those of an
    embedding."""

    A: str
    B: str
    bias: str | None
    magnitude: str | None
    embedding: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All that are there: A, B, bias, magnitude."""
        return tuple(name for name in (self.A, self.B, self.bias, self.magnitude) if name is not None)


class AdapterKeys(NamedTuple):
    """Names of an adapter's tensors. modules: by path in the base, sorted. whole: by the parameter's name there."""

    modules: Mapping[str, ModuleKeys]
    whole: Mapping[str, str]


def sort_keys(shapes: Shapes, settings: LoraSettings, name: str) -> AdapterKeys:
    """Find each module's tensors and the whole ones. shapes: (dtype as safetensors names it, shape) by tensor name.

    Raises UnsupportedAdapterError for a tensor of another kind; AdapterError where one is missing, does not fit the
    configuration, or would be passed over by PEFT.
    """
    parts: dict[str, dict[str, str]] = {}
    others = []
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is not None:
            parts.setdefault(match["path"], {})[_PARTS[match["part"]]] = key
        elif "lora_" in key or not _WHOLE.fullmatch(key):
            raise UnsupportedAdapterError(f"{name}: {WEIGHTS} holds {key}.\nThat is {_foreign(key)}.")
        else:
            others.append(key)
    if not parts:
        raise AdapterError(f"{name}: {WEIGHTS} holds no LoRA factors.")
    modules = {path: _module(path, parts[path], settings, name) for path in sorted(parts)}
    for path, keys in modules.items():
        _check_shapes(path, keys, shapes, settings, name)
        _check_target(path, keys, settings, name)
    whole = {}
    for key in others:
        parameter = _parameter(key, modules, settings, shapes, name)
        if parameter is not None:
            whole[parameter] = key
    return AdapterKeys(modules, {parameter: whole[parameter] for parameter in sorted(whole)})


def key_of_whole(parameter: str, modules: Mapping[str, object]) -> str:
    """The name under which PEFT reads a whole tensor; modules: the adapted ones, which keep theirs in `base_layer`."""
    path, _, last = parameter.rpartition(".")
    return f"{PREFIX}{path}.base_layer.{last}" if path in modules else f"{PREFIX}{parameter}"


def _foreign(key: str) -> str:
    if not key.startswith(PREFIX):
        return f"named without {PREFIX!r}, which PEFT would pass over"
    return next((why for expression, why in _FOREIGN if expression.search(key)), "no factor of plain LoRA")


def _module(path: str, found: Mapping[str, str], settings: LoraSettings, name: str) -> ModuleKeys:
    embedding = "embedding_A" in found or "embedding_B" in found
    first, second = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    for part in (first, second):
        if part not in found:
            raise AdapterError(f"{name}: {path} has no lora_{part}.\nEach module needs lora_{first} and lora_{second}.")
    if embedding and ("A" in found or "bias" in found):
        raise AdapterError(f"{name}: {path} has tensors of an embedding and of a linear module.")
    _check_option("bias", "lora_bias", settings.lora_bias, path, found, name)
    _check_option("magnitude", "use_dora", settings.dora, path, found, name)
    return ModuleKeys(found[first], found[second], found.get("bias"), found.get("magnitude"), embedding)


def _check_option(part: str, option: str, is_set: bool, path: str, found: Mapping[str, str], name: str) -> None:
    if is_set and part not in found:
        raise AdapterError(f"{name}: {path} has no {part}, although {CONFIG} sets {option}.")
    if part in found and not is_set:
        raise UnsupportedAdapterError(
            f"{name}: {WEIGHTS} holds {found[part]}, but {CONFIG} does not set {option}, and PEFT would pass over it."
        )


def _check_shapes(path: str, keys: ModuleKeys, shapes: Shapes, settings: LoraSettings, name: str) -> None:
    for key in keys.names:
        _check_dtype(shapes[key][0], path, name)
    A, B = shapes[keys.A][1], shapes[keys.B][1]
    if len(A) != 2 or len(B) != 2:
        raise UnsupportedAdapterError(
            f"{name}: {path} is no linear module.\nExpected factors that are matrices, found A {A}, B {B}."
        )
    rank = settings.rank_of(path)
    if A[0] != rank or B[1] != rank or 0 in (*A, *B):
        raise AdapterError(
            f"{name}: {path} does not have the rank that {CONFIG} says.\n"
            f"Expected A ({rank}, in) and B (out, {rank}); found A {A}, B {B}."
        )
    for key in keys.names[2:]:
        if shapes[key][1] != (B[0],):
            raise AdapterError(f"{name}: {key} is {shapes[key][1]}.\nExpected ({B[0]},), as B is {B}.")


def _check_dtype(dtype: str, what: str, name: str) -> None:
    if dtype not in FLOATS:
        raise UnsupportedAdapterError(f"{name}: {what} is of type {dtype}.\nExpected {', '.join(FLOATS)}.")


def _check_target(path: str, keys: ModuleKeys, settings: LoraSettings, name: str) -> None:
    if settings.saves(path):
        raise AdapterError(
            f"{name}: {WEIGHTS} holds factors of {path}, which modules_to_save names too: PEFT would leave them out.\n"
            f"Found modules_to_save {list(settings.modules_to_save)}. Correct it, or remove the tensors."
        )
    if not settings.targets(path) or (keys.embedding and settings.target_modules == "all-linear"):
        raise AdapterError(
            f"{name}: {WEIGHTS} holds {path}, which {CONFIG} does not target, so that PEFT would leave it out.\n"
            f"Found target_modules {settings.target_modules!r}. Correct it, or remove the tensors."
        )


def _parameter(
    key: str, modules: Mapping[str, ModuleKeys], settings: LoraSettings, shapes: Shapes, name: str
) -> str | None:
    """The parameter of the base that a whole tensor replaces; None for a copy that PEFT does not read."""
    parameter = key.removeprefix(PREFIX)
    path, _, last = parameter.rpartition(".")
    copy = _COPY.fullmatch(parameter)
    if copy is not None and f"{PREFIX}{copy['module']}.{copy['rest']}" in shapes and settings.saves(copy["module"]):
        return None
    _check_dtype(shapes[key][0], key, name)
    above, _, layer = path.rpartition(".")
    if layer == "base_layer" and above in modules:
        return f"{above}.{last}"
    if layer == "base_layer" or any(path == module or path.startswith(f"{module}.") for module in modules):
        raise AdapterError(
            f"{name}: {WEIGHTS} holds {key}, a whole tensor where PEFT expects a base_layer of an adapted module, so "
            "that it would pass over it.\nLoad the adapter with the PEFT that saved it and save it with a newer one."
        )
    if last not in ("weight", "bias") and not settings.saves(path):
        raise UnsupportedAdapterError(f"{name}: {WEIGHTS} holds {key}.\nThat is {_foreign(key)}.")
    return parameter
