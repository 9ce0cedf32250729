"""Adapters in PEFT's form: a folder with `adapter_config.json` and `adapter_model.safetensors`.

A read adapter means exactly what PEFT would compute with it, or reading it fails and says why.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raymerge import storage
from raymerge.adapters.metadata import encode_metadata, errors_of, started_from
from raymerge.adapters.peft_config import LoraSettings, check_config, saves
from raymerge.adapters.peft_keys import CONFIG, PICKLE, PREFIX, WEIGHTS, ModuleKeys, key_of_whole, sort_keys
from raymerge.adapters.tensors import (
    FLOATS,
    StoredTensors,
    TensorFile,
    check_finite,
    encode_tensors,
    open_tensors,
    read_tensors,
)
from raymerge.errors import AdapterError, StorageError, UnsupportedAdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from raymerge.adapters.adapter import LoraAdapter
    from raymerge.adapters.base_weights import BaseWeights
    from raymerge.adapters.stored import Read

__all__ = [
    "CONFIG",
    "PICKLE",
    "WEIGHTS",
    "AdapterHeader",
    "encode_adapter",
    "open_adapter",
    "read_adapter",
    "read_header",
]


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter without its weights.

    tensors: (dtype as safetensors names it, shape) by tensor name. modules: the names of a module's tensors by its
    path. whole: the name of each tensor that replaces one of the base's, by the parameter's name there. file: None for
    weights that were read from a pickle.
    """

    name: str
    location: str
    settings: LoraSettings
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    modules: Mapping[str, ModuleKeys]
    whole: Mapping[str, str]
    metadata: Mapping[str, str]
    file: TensorFile | None


def read_header(location: str, name: str | None = None) -> AdapterHeader:
    """Read and check an adapter's configuration and the header of its weights, but no weight. DoRA is described too.

    Raises UnsupportedAdapterError, naming the option, for what is not LoRA; AdapterError for what is missing,
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
    modules, whole = sort_keys(shapes, settings, name)
    return AdapterHeader(name, location, settings, shapes, modules, whole, file.metadata, file)


def _read_settings(location: str, name: str) -> LoraSettings:
    try:
        config = storage.read_json(storage.join(location, CONFIG))
    except StorageError as error:
        raise AdapterError(f"{name}: {CONFIG} is missing or cannot be read.\n{error}") from error
    return check_config(config, name)


def open_adapter(location: str, name: str | None = None, *, base: BaseWeights | None = None) -> LoraAdapter:
    """An adapter that reads each module when it is asked for, and keeps none: for merges of many.

    base: the base model's weights, on which DoRA's deltas depend; with them its modules are dense. Raises what
    read_header raises, and UnsupportedAdapterError for DoRA without base; reading a module or a whole tensor raises
    AdapterError if it holds NaN or Inf.
    """
    header = read_header(location, name)
    file, where = header.file, f"{header.name}: {WEIGHTS}"
    assert file is not None
    whole = StoredTensors(file, header.whole, where)
    return _adapter(header, lambda names: read_tensors(file, names, where), whole, base, where)


def read_adapter(
    location: str, name: str | None = None, *, allow_pickle: bool = False, base: BaseWeights | None = None
) -> LoraAdapter:
    """Read an adapter whole. name: the folder's, unless given. base: as in open_adapter.

    allow_pickle: read `adapter_model.bin` where there is no safetensors file, with torch's loader for weights only.
    Raises UnsupportedAdapterError, naming the option, for what is not LoRA; AdapterError for what is missing,
    truncated, does not fit together, or holds NaN or Inf.
    """
    if allow_pickle and not storage.exists(storage.join(location, WEIGHTS)):
        opened = _open_pickle(location, name or storage.name_of(location), base)
    else:
        opened = open_adapter(location, name, base=base)
    return replace(opened, modules=dict(opened.modules), whole=dict(opened.whole))


def _open_pickle(location: str, name: str, base: BaseWeights | None) -> LoraAdapter:
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
    modules, whole = sort_keys(shapes, settings, name)
    where = f"{name}: {PICKLE}"
    for parameter, key in whole.items():
        check_finite(tensors[key], parameter, where)
    header = AdapterHeader(name, location, settings, shapes, modules, whole, {}, None)
    saved = {parameter: tensors[key] for parameter, key in whole.items()}
    return _adapter(header, lambda names: [tensors[key] for key in names], saved, base, where)


def _adapter(
    header: AdapterHeader, read: Read, whole: Mapping[str, Tensor], base: BaseWeights | None, where: str
) -> LoraAdapter:
    from raymerge.adapters.adapter import LoraAdapter
    from raymerge.adapters.stored import StoredPeftModules

    name, settings, metadata = header.name, header.settings, header.metadata
    if settings.dora and base is None:
        raise UnsupportedAdapterError(
            f"{name}: use_dora is set, and DoRA's delta depends on the base's weights.\n"
            "Pass --base with the folder of the base model (base=BaseWeights(...) in Python)."
        )
    return LoraAdapter(
        name=name,
        modules=StoredPeftModules(header, read, whole, base, where),
        base_model=settings.base_model,
        fan_in_fan_out=settings.fan_in_fan_out,
        task_type=settings.task_type,
        started_from=started_from(metadata),
        errors=errors_of(metadata, where),
        whole=whole,
        modules_to_save=settings.modules_to_save,
        bias_mode=settings.bias,
    )


def encode_adapter(adapter: LoraAdapter) -> dict[str, bytes]:
    """The two files of an adapter, by name. Equal adapters give equal bytes.

    PEFT loads them and computes the same: scalings are written as alpha, and modules whose rank or alpha is not the
    commonest one are named in the patterns, each by an expression that matches it alone. PEFT has a trained bias
    (`lora_bias`) in all modules or in none, so where some have one the others get zeros. Raises AdapterError if the
    adapter has no modules, or has both biases and embeddings, which PEFT cannot load.
    """
    headers = adapter.headers
    if not headers:
        raise AdapterError(f"{adapter.name}: has no modules, so there is nothing to write.")
    biased = any(header.biased for header in headers.values())
    embedding = next((path for path, header in headers.items() if header.embedding), None)
    if biased and embedding is not None:
        raise AdapterError(
            f"{adapter.name}: has trained biases (lora_bias) and an adapted embedding ({embedding}).\n"
            "PEFT has no form for both. Merge the adapters with biases and those with embeddings apart."
        )
    alphas = {path: _alpha(header.scaling * header.rank) for path, header in headers.items()}
    rank, alpha = _commonest([(header.rank, alphas[path]) for path, header in headers.items()])
    config = {
        "peft_type": "LORA", "task_type": adapter.task_type, "base_model_name_or_path": adapter.base_model,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": adapter.bias_mode, "lora_bias": biased,
        "use_rslora": False, "use_dora": False, "target_modules": list(headers),
        "modules_to_save": _modules_to_save(adapter), "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True, "inference_mode": True,
        "rank_pattern": _patterns(headers, lambda path: headers[path].rank, rank),
        "alpha_pattern": _patterns(headers, lambda path: alphas[path], alpha),
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for path, module in adapter.modules.items():
        first, second = ("embedding_A", "embedding_B") if module.embedding else ("A.weight", "B.weight")
        tensors[f"{PREFIX}{path}.lora_{first}"] = module.A
        tensors[f"{PREFIX}{path}.lora_{second}"] = module.B
        if biased:
            zeros = module.B.new_zeros(module.out_features)
            tensors[f"{PREFIX}{path}.lora_B.bias"] = zeros if module.bias is None else module.bias
    for parameter, tensor in adapter.whole.items():
        tensors[key_of_whole(parameter, headers)] = tensor
    metadata = {"format": "pt", **encode_metadata(adapter)}
    return {CONFIG: storage.encode_json(config), WEIGHTS: encode_tensors(tensors, metadata)}


def _modules_to_save(adapter: LoraAdapter) -> list[str] | None:
    """Those that hold no adapted module: PEFT would not adapt it, and reads the tensors without being told."""
    kept = [name for name in adapter.modules_to_save if not any(saves([name], path) for path in adapter.headers)]
    return kept or None


def _alpha(value: float) -> float | int:
    return round(value) if abs(value - round(value)) <= 1e-12 * abs(value) else value


def _commonest(found: list[tuple[int, float | int]]) -> tuple[int, float | int]:
    counted = Counter(found)
    return max(counted, key=lambda pair: (counted[pair], pair))


def _patterns(paths: Mapping[str, object], value: Callable[[str], float], default: float) -> dict[str, float]:
    return {f"^{re.escape(path)}": value(path) for path in paths if value(path) != default}
