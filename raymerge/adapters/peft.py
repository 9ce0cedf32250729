"""Adapters in PEFT's form: a folder with `adapter_config.json` and `adapter_model.safetensors`.

A read adapter means exactly what PEFT would compute with it, or reading it fails and says why.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raymerge import manifest, storage
from raymerge.adapters.peft_config import LoraSettings, check_config
from raymerge.adapters.tensors import FLOATS, TensorFile, check_finite, encode_tensors, open_tensors
from raymerge.errors import AdapterError, StorageError, UnsupportedAdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from raymerge.adapters.adapter import LoraAdapter, LoraModule

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
_STARTED_FROM, _ERRORS = "raymerge.started_from", "raymerge.errors"
# Tensors that say by their name what they are, and why their adapter is refused.
_FOREIGN = (
    (re.compile(r"lora_embedding_[AB]"), "a LoRA of an embedding"),
    (re.compile(r"lora_magnitude_vector"), "DoRA's magnitude, which depends on the base's weights"),
    (re.compile(r"lora_[AB](\.\w+)?\.bias$"), "a trained bias (lora_bias)"),
    (re.compile(r"lora_[AB]\.\w+\.weight$"), "saved under an adapter's name; save it with save_pretrained"),
    (re.compile(r"^(?!.*lora_)"), "a whole tensor (as of modules_to_save or a resized embedding), not a delta"),
)


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter without its weights.

    tensors: (dtype as safetensors names it, shape) by tensor name. modules: the names of A and B by module path.
    """

    name: str
    location: str
    settings: LoraSettings
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    modules: Mapping[str, tuple[str, str]]
    metadata: Mapping[str, str]
    file: TensorFile


def read_header(location: str, name: str | None = None) -> AdapterHeader:
    """Read and check an adapter's configuration and the header of its weights, but no weight.

    Raises UnsupportedAdapterError, naming the option, for what is not plain LoRA; AdapterError for what is missing,
    truncated or does not fit together.
    """
    name = name or storage.name_of(location)
    settings = _read_settings(location, name)
    weights = storage.join(location, WEIGHTS)
    if not storage.exists(weights):
        if storage.exists(storage.join(location, PICKLE)):
            raise AdapterError(
                f"{name}: has its weights as a pickle ({PICKLE}), which can run code.\n"
                "Save it as safetensors, or pass --allow-pickle if you trust its author."
            )
        raise AdapterError(f"{name}: {WEIGHTS} is missing.\nExpected it in {location}.")
    file = open_tensors(str(storage.open_local(weights)), f"{name}: {WEIGHTS}")
    shapes = {key: (tensor.dtype, tensor.shape) for key, tensor in file.tensors.items()}
    modules = _pair(shapes, settings, name)
    return AdapterHeader(name, location, settings, shapes, modules, file.metadata, file)


def _read_settings(location: str, name: str) -> LoraSettings:
    try:
        config = storage.read_json(storage.join(location, CONFIG))
    except StorageError as error:
        raise AdapterError(f"{name}: {CONFIG} is missing or cannot be read.\n{error}") from error
    return check_config(config, name)


def _pair(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], settings: LoraSettings, name: str
) -> Mapping[str, tuple[str, str]]:
    """Find each module's two factors, and refuse every tensor that is none."""
    factors: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnsupportedAdapterError(f"{name}: {WEIGHTS} holds {key}.\nThat is {_foreign(key)}.")
        factors.setdefault(match["path"], {})[match["factor"]] = key
    if not factors:
        raise AdapterError(f"{name}: {WEIGHTS} holds no LoRA factors.")
    for path, found in factors.items():
        if len(found) < 2:
            missing = "B" if "A" in found else "A"
            raise AdapterError(f"{name}: {path} has no lora_{missing}.\nEach module needs lora_A and lora_B.")
        _check_module(path, shapes[found["A"]], shapes[found["B"]], settings, name)
    return {path: (factors[path]["A"], factors[path]["B"]) for path in sorted(factors)}


def _foreign(key: str) -> str:
    if "lora_" in key and not key.startswith(PREFIX):
        return f"named without {PREFIX!r}, which PEFT would pass over"
    return next((why for expression, why in _FOREIGN if expression.search(key)), "no factor of plain LoRA")


def _check_module(
    path: str, A: tuple[str, tuple[int, ...]], B: tuple[str, tuple[int, ...]], settings: LoraSettings, name: str
) -> None:
    for dtype, _ in (A, B):
        if dtype not in FLOATS:
            raise UnsupportedAdapterError(f"{name}: {path} is of type {dtype}.\nExpected {', '.join(FLOATS)}.")
    if len(A[1]) != 2 or len(B[1]) != 2:
        raise UnsupportedAdapterError(
            f"{name}: {path} is no linear module.\nExpected factors that are matrices, found A {A[1]}, B {B[1]}."
        )
    rank = settings.rank_of(path)
    if A[1][0] != rank or B[1][1] != rank or 0 in (*A[1], *B[1]):
        raise AdapterError(
            f"{name}: {path} does not have the rank that {CONFIG} says.\n"
            f"Expected A ({rank}, in) and B (out, {rank}); found A {A[1]}, B {B[1]}."
        )
    if not settings.targets(path):
        raise AdapterError(
            f"{name}: {WEIGHTS} holds {path}, which {CONFIG} does not target, so that PEFT would leave it out.\n"
            f"Found target_modules {settings.target_modules!r}. Correct it, or remove the tensors."
        )


def open_adapter(location: str, name: str | None = None) -> LoraAdapter:
    """An adapter that reads each module when it is asked for, and keeps none: for merges of many.

    Raises what read_header raises; reading a module raises AdapterError if it holds NaN or Inf.
    """
    from raymerge.adapters.stored import StoredPeftModules

    header = read_header(location, name)
    return _adapter(header.name, header.settings, StoredPeftModules(header), header.metadata)


def read_adapter(location: str, name: str | None = None, *, allow_pickle: bool = False) -> LoraAdapter:
    """Read an adapter whole. name: the folder's, unless given.

    allow_pickle: read `adapter_model.bin` where there is no safetensors file, with torch's loader for weights only.
    Raises UnsupportedAdapterError, naming the option, for what is not plain LoRA; AdapterError for what is missing,
    truncated, does not fit together, or holds NaN or Inf.
    """
    if allow_pickle and not storage.exists(storage.join(location, WEIGHTS)):
        return _read_pickle(location, name or storage.name_of(location))
    stored = open_adapter(location, name)
    return replace(stored, modules={path: stored.modules[path] for path in stored.modules})


def _read_pickle(location: str, name: str) -> LoraAdapter:
    import pickle

    import torch

    settings = _read_settings(location, name)
    try:
        path = storage.open_local(storage.join(location, PICKLE))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise AdapterError(f"{name}: {PICKLE} cannot be read.\n{str(error).splitlines()[0]}") from error
    codes = {getattr(torch, dtype): code for code, dtype in FLOATS.items()}
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise AdapterError(f"{name}: {PICKLE} holds something other than tensors.")
    shapes = {k: (codes.get(t.dtype, str(t.dtype)), tuple(t.shape)) for k, t in tensors.items()}
    pairs = _pair(shapes, settings, name)
    modules = {
        module: make_module(tensors[A], tensors[B], settings.scaling_of(module), module, f"{name}: {PICKLE}")
        for module, (A, B) in pairs.items()
    }
    return _adapter(name, settings, modules, {})


def make_module(A: Tensor, B: Tensor, scaling: float, path: str, where: str) -> LoraModule:
    """A module from its factors. Raises AdapterError, naming the tensor, if one holds NaN or Inf."""
    from raymerge.adapters.adapter import LoraModule

    for letter, tensor in (("A", A), ("B", B)):
        check_finite(tensor, f"{path}.lora_{letter}", where)
    return LoraModule(A, B, scaling)


def _adapter(
    name: str, settings: LoraSettings, modules: Mapping[str, LoraModule], metadata: Mapping[str, str]
) -> LoraAdapter:
    from raymerge.adapters.adapter import LoraAdapter

    try:
        errors = {str(key): float(value) for key, value in json.loads(metadata.get(_ERRORS, "{}")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise AdapterError(f"{name}: {WEIGHTS} has errors in its metadata that cannot be read.\n{error}.") from error
    return LoraAdapter(
        name=name,
        modules=modules,
        base_model=settings.base_model,
        fan_in_fan_out=settings.fan_in_fan_out,
        task_type=settings.task_type,
        started_from=metadata.get(_STARTED_FROM) or None,
        errors=errors,
    )


def encode_adapter(adapter: LoraAdapter) -> dict[str, bytes]:
    """The two files of an adapter, by name. Equal adapters give equal bytes.

    PEFT loads them and computes the same: scalings are written as alpha, and modules whose rank or alpha is not the
    commonest one are named in the patterns, each by an expression that matches it alone. Raises AdapterError if it
    has no modules.
    """
    headers = adapter.headers
    if not headers:
        raise AdapterError(f"{adapter.name}: has no modules, so there is nothing to write.")
    alphas = {path: _alpha(header.scaling * header.rank) for path, header in headers.items()}
    rank, alpha = _commonest([(header.rank, alphas[path]) for path, header in headers.items()])
    config = {
        "peft_type": "LORA", "task_type": adapter.task_type, "base_model_name_or_path": adapter.base_model,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "target_modules": list(headers), "modules_to_save": None, "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True, "inference_mode": True,
        "rank_pattern": _patterns(headers, lambda path: headers[path].rank, rank),
        "alpha_pattern": _patterns(headers, lambda path: alphas[path], alpha),
    }  # fmt: skip
    tensors = {}
    for path, module in adapter.modules.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = module.A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = module.B
    metadata = {"format": "pt"}
    if adapter.started_from:
        metadata[_STARTED_FROM] = adapter.started_from
    if adapter.errors:
        metadata[_ERRORS] = json.dumps(dict(adapter.errors), sort_keys=True, separators=(",", ":"))
    return {CONFIG: storage.encode_json(config), WEIGHTS: encode_tensors(tensors, metadata)}


def _alpha(value: float) -> float | int:
    return round(value) if abs(value - round(value)) <= 1e-12 * abs(value) else value


def _commonest(found: list[tuple[int, float | int]]) -> tuple[int, float | int]:
    counted = Counter(found)
    return max(counted, key=lambda pair: (counted[pair], pair))


def _patterns(paths: Mapping[str, object], value: Callable[[str], float], default: float) -> dict[str, float]:
    return {f"^{re.escape(path)}": value(path) for path in paths if value(path) != default}


def save_adapter(adapter: LoraAdapter, folder: str) -> None:
    """Write an adapter in PEFT's form, with a manifest that states the error of each module."""
    files = encode_adapter(adapter)
    described = {"name": adapter.name, "errors": dict(sorted(adapter.errors.items()))}
    key = storage.digest_value({name: storage.digest_bytes(data) for name, data in files.items()})
    manifest.write_artefact(str(folder), files, described, key)


def load_adapter(folder: str) -> LoraAdapter:
    """Read an adapter from a folder or URI; the counterpart of save_adapter. Raises what read_adapter raises."""
    return read_adapter(str(folder))
