"""Modules of an MLX adapter that stay in its file until they are asked for."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import torch

from raymerge.adapters.adapter import LoraModule, ModuleHeader, StoredModules
from raymerge.adapters.dora import dense_module, dora_delta, dora_header
from raymerge.adapters.tensors import FLOATS, ITEM_BYTES, check_finite, read_tensors
from raymerge.errors import AdapterError

if TYPE_CHECKING:
    from raymerge.adapters.base_weights import BaseWeights
    from raymerge.adapters.mlx import MlxHeader


class StoredMlxModules(StoredModules):
    """Modules of a safetensors file in MLX's form. Each access reads, checks and returns one; none is kept.

    With the base's weights, modules of a DoRA are dense deltas, written as products with an identity. Raises
    AdapterError if they do not fit the base.
    """

    def __init__(self, header: MlxHeader, base: BaseWeights | None) -> None:
        self._header, self._base = header, base
        self.headers = {path: _module_header(header, path) for path in header.modules}
        if base is not None and header.settings.dora:
            self._check_fits(base)

    def __getitem__(self, path: str) -> LoraModule:
        header, base = self._header, self._base
        where = f"{header.name}: {header.weights}"
        keys = header.modules[path]
        lora_a, lora_b, *magnitude = read_tensors(header.file, keys, where)
        for key, tensor in zip(keys, (lora_a, lora_b, *magnitude), strict=True):
            check_finite(tensor, key, where)
        rank = header.rank_of(path)
        lora = LoraModule(lora_a[:, :rank].T.contiguous(), lora_b[:rank].T.contiguous(), header.settings.scale)
        if not magnitude:
            return lora
        assert base is not None, "DoRA is opened with its base alone"
        delta = dora_delta(lora, magnitude[0], base.weight(f"{path}.weight"))
        check_finite(delta, f"the DoRA delta of {path}", where)
        return dense_module(delta, rank)

    def _check_fits(self, base: BaseWeights) -> None:
        for path, module in self.headers.items():
            found = base.shape(f"{path}.weight")
            if found != module.shape:
                raise AdapterError(
                    f"{self._header.name}: {self._header.weights}: {path} does not fit the base model.\nExpected a "
                    f"weight {module.shape}, found {found}. Is it the base that the adapter was trained on?"
                )


def _module_header(header: MlxHeader, path: str) -> ModuleHeader:
    found = [header.tensors[key] for key in header.modules[path]]
    dtypes = [getattr(torch, FLOATS[dtype]) for dtype, _ in found]
    (in_features, _), (_, out_features) = found[0][1], found[1][1]
    rank = header.rank_of(path)
    nbytes = rank * (in_features * ITEM_BYTES[found[0][0]] + out_features * ITEM_BYTES[found[1][0]])
    widest = reduce(torch.promote_types, dtypes)
    if header.settings.dora:
        return dora_header(rank, (out_features, in_features), widest, False)
    return ModuleHeader(rank, in_features, out_features, header.settings.scale, widest, nbytes)
