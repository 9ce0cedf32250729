"""Adapters in MLX's form: a folder with `adapter_config.json` and `adapters.safetensors`, as mlx-lm trains them.

A module has `lora_a` (in_features, rank) and `lora_b` (rank, out_features), and its delta is
scale * (lora_a @ lora_b).T, with one rank and one scale for all. Its path is the same as in PEFT's form.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from raymerge import storage
from raymerge.adapters.metadata import compact, encode_metadata, errors_of, numbers, started_from
from raymerge.adapters.mlx_config import MlxSettings, check_config, is_embedding
from raymerge.adapters.tensors import FLOATS, TensorFile, encode_tensors, open_tensors
from raymerge.errors import AdapterError, StorageError, UnsupportedAdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raymerge.adapters.adapter import LoraAdapter, LoraModule
    from raymerge.adapters.base_weights import BaseWeights

CONFIG = "adapter_config.json"
WEIGHTS = ("adapters.safetensors", "best_adapters.safetensors")  # the first that is there is read
_KEY = re.compile(r"(?P<path>.+)\.(?P<factor>lora_a|lora_b|m)")
_TASK_TYPE, _RANKS = "raymerge.task_type", "raymerge.ranks"


@dataclass(frozen=True)
class MlxHeader:
    """An adapter without its weights.

    weights: which file was read. tensors: (dtype as safetensors names it, shape) by tensor name. modules: the names of
    lora_a, lora_b and, for DoRA, m by module path. ranks: of modules that were written with zeros up to the common one.
    """

    name: str
    location: str
    weights: str
    settings: MlxSettings
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    modules: Mapping[str, tuple[str, ...]]
    ranks: Mapping[str, int]
    metadata: Mapping[str, str]
    file: TensorFile

    def rank_of(self, path: str) -> int:
        """Rank of a module without the zeros it was padded with."""
        return self.ranks.get(path, self.settings.rank)


def folder_of(location: str) -> str:
    """The folder of an adapter: a location, or where it is one of the folder's weight files, its parent."""
    return storage.parent(location) if location.endswith(".safetensors") else location


def find_weights(location: str, name: str) -> str:
    """Name of the file with an adapter's weights in its folder: `adapters.safetensors`, or `best_adapters.safetensors`
    where there is no other, or the one that the location names, as that of a checkpoint. Raises AdapterError."""
    if folder_of(location) != location:
        if storage.exists(location):
            return storage.name_of(location)
        raise AdapterError(f"{name}: {storage.name_of(location)} is missing.\nExpected it in {folder_of(location)}.")
    found = next((file for file in WEIGHTS if storage.exists(storage.join(location, file))), None)
    if found is None:
        raise AdapterError(f"{name}: {WEIGHTS[0]} is missing.\nExpected it, or {WEIGHTS[1]}, in {location}.")
    return found


def read_header(location: str, name: str | None = None) -> MlxHeader:
    """Read and check an adapter's configuration and the header of its weights, but no weight.

    location: a folder, or one of its `.safetensors` files. Raises UnsupportedAdapterError, naming the option, for what
    is neither LoRA nor DoRA of linear modules; AdapterError for what is missing, truncated or does not fit together.
    """
    name, folder = name or storage.name_of(location), folder_of(location)
    try:
        config = storage.read_json(storage.join(folder, CONFIG))
    except StorageError as error:
        raise AdapterError(f"{name}: {CONFIG} is missing or cannot be read.\n{error}") from error
    settings = check_config(config, name)
    weights = find_weights(location, name)
    where = f"{name}: {weights}"
    file = open_tensors(str(storage.open_local(storage.join(folder, weights))), where)
    tensors = {key: (tensor.dtype, tensor.shape) for key, tensor in file.tensors.items()}
    modules = _modules(tensors, settings, where)
    ranks = _ranks(file.metadata, modules, settings, where)
    return MlxHeader(name, location, weights, settings, tensors, modules, ranks, file.metadata, file)


def _modules(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], settings: MlxSettings, where: str
) -> Mapping[str, tuple[str, ...]]:
    """Find each module's tensors, and refuse every one that belongs to none."""
    wanted = ("lora_a", "lora_b", "m") if settings.dora else ("lora_a", "lora_b")
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnsupportedAdapterError(f"{where} holds {key}.\nThat is a whole tensor, not a delta.")
        if match["factor"] not in wanted:
            raise UnsupportedAdapterError(
                f"{where} holds {key}.\nThat is DoRA's magnitude, where {CONFIG} has no fine_tune_type dora."
            )
        found.setdefault(match["path"], {})[match["factor"]] = key
    if not found:
        raise AdapterError(f"{where} holds no LoRA factors.")
    for path, keys in found.items():
        missing = [factor for factor in wanted if factor not in keys]
        if missing:
            raise AdapterError(f"{where}: {path} has no {missing[0]}.\nEach module needs {', '.join(wanted)}.")
        _check_module(path, {factor: tensors[key] for factor, key in keys.items()}, settings, where)
    settings.check_targets(sorted(found), where)
    return {path: tuple(found[path][factor] for factor in wanted) for path in sorted(found)}


def _check_module(
    path: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], settings: MlxSettings, where: str
) -> None:
    for dtype, _ in tensors.values():
        if dtype not in FLOATS:
            raise UnsupportedAdapterError(f"{where}: {path} is of type {dtype}.\nExpected {', '.join(FLOATS)}.")
    if is_embedding(path):
        raise UnsupportedAdapterError(
            f"{where}: {path} is an embedding.\n"
            "MLX adapts a head that is tied to it too, so that its delta means something else than PEFT's."
        )
    a, b = tensors["lora_a"][1], tensors["lora_b"][1]
    if len(a) == 3 and len(b) == 3:
        raise UnsupportedAdapterError(
            f"{where}: {path} adapts all experts of a mixture-of-experts layer at once (LoRASwitchLinear).\n"
            f"Only linear modules can be merged; found lora_a {a}, lora_b {b}."
        )
    rank = settings.rank
    if len(a) != 2 or len(b) != 2 or a[1] != rank or b[0] != rank or 0 in (*a, *b):
        raise AdapterError(
            f"{where}: {path} does not have the rank that {CONFIG} says.\n"
            f"Expected lora_a (in, {rank}) and lora_b ({rank}, out); found lora_a {a}, lora_b {b}."
        )
    if "m" in tensors and tensors["m"][1] != (b[1],):
        raise AdapterError(f"{where}: {path}.m does not fit.\nExpected ({b[1]},), found {tensors['m'][1]}.")


def _ranks(
    metadata: Mapping[str, str], modules: Mapping[str, object], settings: MlxSettings, where: str
) -> dict[str, int]:
    found = numbers(metadata, _RANKS, where)
    if wrong := sorted(p for p, r in found.items() if p not in modules or r not in range(1, settings.rank + 1)):
        raise AdapterError(f"{where} has ranks in its metadata that cannot be.\nFound {found[wrong[0]]} of {wrong[0]}.")
    return {path: int(rank) for path, rank in found.items()}


def open_adapter(location: str, name: str | None = None, *, base: BaseWeights | None = None) -> LoraAdapter:
    """An adapter that reads each module when it is asked for, and keeps none: for merges of many.

    base: the base's weights, on which DoRA's deltas depend. Raises what read_header raises, and UnsupportedAdapterError
    for DoRA without a base; reading a module raises AdapterError if it holds NaN or Inf.
    """
    from raymerge.adapters.adapter import LoraAdapter
    from raymerge.adapters.stored_mlx import StoredMlxModules

    header = read_header(location, name)
    if header.settings.dora and base is None:
        raise UnsupportedAdapterError(
            f"{header.name}: fine_tune_type is dora, and DoRA's delta depends on the base's weights.\n"
            "Pass the base model (--base) to read it."
        )
    where = f"{header.name}: {header.weights}"
    return LoraAdapter(
        name=header.name,
        modules=StoredMlxModules(header, base),
        base_model=header.settings.base_model,
        task_type=header.metadata.get(_TASK_TYPE) or None,
        started_from=started_from(header.metadata),
        errors=errors_of(header.metadata, where),
    )


def read_adapter(location: str, name: str | None = None, *, base: BaseWeights | None = None) -> LoraAdapter:
    """Read an adapter whole. name: the folder's, unless given. Raises what open_adapter raises, and AdapterError if it
    holds NaN or Inf."""
    stored = open_adapter(location, name, base=base)
    return replace(stored, modules={path: stored.modules[path] for path in stored.modules})


def encode_adapter(adapter: LoraAdapter) -> dict[str, bytes]:
    """The two files of an adapter, by name. Equal adapters give equal bytes.

    mlx-lm's load_adapters makes all modules with one rank and one scale. So factors are padded with zeros to the
    largest rank, and the scalings that differ from the commonest one are multiplied into lora_b, in float32 where its
    own dtype cannot hold the product exactly. Modules are named in full, which adapts these and no others.
    Raises UnsupportedAdapterError for what mlx-lm has no form for, and AdapterError if there are no modules.
    """
    if not adapter.headers:
        raise AdapterError(f"{adapter.name}: has no modules, so there is nothing to write.")
    check_expressible(adapter)
    ranks = {path: header.rank for path, header in adapter.headers.items()}
    rank = max(ranks.values())
    scale = _commonest([header.scaling for header in adapter.headers.values()])
    tensors = {}
    for path, module in adapter.modules.items():
        tensors[f"{path}.lora_a"] = _padded(module.A, rank).T
        tensors[f"{path}.lora_b"] = _padded(_scaled_b(module, scale, f"{adapter.name}: {path}"), rank)
    config = {
        "fine_tune_type": "lora", "model": adapter.base_model, "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(ranks)},
    }  # fmt: skip
    metadata = {"format": "mlx", **encode_metadata(adapter)}
    if adapter.task_type:
        metadata[_TASK_TYPE] = adapter.task_type
    if padded := {path: own for path, own in ranks.items() if own < rank}:
        metadata[_RANKS] = compact(padded)
    return {CONFIG: storage.encode_json(config), WEIGHTS[0]: encode_tensors(tensors, metadata)}


def check_expressible(adapter: LoraAdapter) -> None:
    """Raise UnsupportedAdapterError, by name, for what mlx-lm would compute otherwise or not load."""
    headers = adapter.headers
    reasons = {
        "a trained bias (lora_bias)": [path for path, header in headers.items() if header.biased],
        "a LoRA of an embedding, which MLX applies to a tied head too": [
            path for path, header in headers.items() if header.embedding or is_embedding(path)
        ],
        "float64 factors (write them with dtype float32)": [
            path for path, header in headers.items() if str(header.dtype) == "torch.float64"
        ],
        "a whole tensor beside its deltas": sorted(adapter.whole),
        "a base that stores its weights as (in_features, out_features) (fan_in_fan_out), and MLX names its modules "
        "otherwise": list(headers) if adapter.fan_in_fan_out else [],
    }
    for what, found in reasons.items():
        if found:
            raise UnsupportedAdapterError(
                f"{adapter.name}: cannot be written in MLX's form: {found[0]} has {what}.\n"
                f"Write it in PEFT's form, which has all of these."
            )


def _commonest(scalings: list[float]) -> float:
    counted = Counter(scaling for scaling in scalings if scaling != 0.0)
    return max(counted, key=lambda scaling: (counted[scaling], scaling), default=0.0)


def _scaled_b(module: LoraModule, scale: float, where: str) -> Tensor:
    """lora_b (rank, out_features) for a common scale, in the module's own dtype where that loses nothing."""
    import torch

    if module.scaling == scale:
        return module.B.T
    wanted = module.B.detach().double() * (module.scaling / scale)
    kept = wanted.to(module.B.dtype)
    result = kept if torch.equal(kept.double(), wanted) else wanted.float()
    if not float((result.double() - wanted).norm()) <= 1e-6 * float(wanted.norm()):  # Inf, or lost near zero
        raise UnsupportedAdapterError(
            f"{where}: cannot be written in MLX's form, which has one scale for all modules.\n"
            f"Its scaling {module.scaling:g} is too far from the others' {scale:g}."
        )
    return result.T


def _padded(factor: Tensor, rank: int) -> torch.Tensor:
    """A factor (r, n) with rows of zeros up to a rank."""
    import torch

    return torch.nn.functional.pad(factor.detach(), (0, 0, 0, rank - factor.shape[0]))
