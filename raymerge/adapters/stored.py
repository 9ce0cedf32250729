"""Modules of an adapter that stay in its file until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraModule, ModuleHeader, StoredModules
from raymerge.adapters.dora import dense_module, dora_delta, dora_header, transposed_weights
from raymerge.adapters.peft_keys import PREFIX
from raymerge.adapters.tensors import FLOATS, ITEM_BYTES, check_finite

if TYPE_CHECKING:
    from raymerge.adapters.base_weights import BaseWeights
    from raymerge.adapters.peft import AdapterHeader

Read = Callable[[Sequence[str]], Sequence[Tensor]]


class StoredPeftModules(StoredModules):
    """Modules of a file in PEFT's form. Each access reads, checks and returns one; none is kept.

    read: tensors by their names in the file. whole: the adapter's whole tensors. base: for DoRA. where: the adapter and
    its file, for errors. Raises AdapterError if a DoRA module and the base do not fit each other.
    """

    def __init__(
        self, header: AdapterHeader, read: Read, whole: Mapping[str, Tensor], base: BaseWeights | None, where: str
    ) -> None:
        self._header, self._read, self._whole, self._base, self._where = header, read, whole, base, where
        self.headers = {path: _module_header(header, path) for path in header.modules}
        self._transposed = self._check_base() if base is not None and header.settings.dora else frozenset()

    def __getitem__(self, path: str) -> LoraModule:
        keys = self._header.modules[path]
        found = dict(zip(keys.names, self._read(keys.names), strict=True))
        for key, tensor in found.items():
            check_finite(tensor, _shown(key), self._where)
        scaling = self._header.settings.scaling_of(path)
        bias = None if keys.bias is None else found[keys.bias]
        lora = LoraModule(found[keys.A], found[keys.B], scaling, bias, keys.embedding)
        return lora if keys.magnitude is None else self._dense(path, lora, found[keys.magnitude])

    def _dense(self, path: str, lora: LoraModule, magnitude: Tensor) -> LoraModule:
        assert self._base is not None, "DoRA is opened with its base alone"
        name = f"{path}.weight"
        weight = self._whole[name] if name in self._whole else self._base.weight(name)
        delta = dora_delta(lora, magnitude, weight.T if path in self._transposed else weight)
        check_finite(delta, f"the DoRA delta of {path}", self._where)
        return dense_module(delta, lora.rank, lora.embedding)

    def _check_base(self) -> frozenset[str]:
        assert self._base is not None
        header = self._header
        stored = {}
        for path in self.headers:
            own = header.whole.get(f"{path}.weight")
            stored[path] = self._base.shape(f"{path}.weight") if own is None else header.tensors[own][1]
        return transposed_weights(
            {path: one.shape for path, one in self.headers.items()},
            stored,
            [path for path, one in self.headers.items() if one.embedding],
            header.settings.fan_in_fan_out,
            self._where,
        )


def _shown(key: str) -> str:
    """The name of a module's tensor without PEFT's prefix and ending: `model.q_proj.lora_A`."""
    return key.removeprefix(PREFIX).removesuffix(".weight")


def _module_header(header: AdapterHeader, path: str) -> ModuleHeader:
    keys = header.modules[path]
    found = [header.tensors[name] for name in keys.names]
    dtype = reduce(torch.promote_types, [getattr(torch, FLOATS[code]) for code, _ in found])
    (rank, in_features), (out_features, _) = found[0][1], found[1][1]
    if keys.magnitude is not None:
        return dora_header(rank, (out_features, in_features), dtype, keys.embedding)
    nbytes = sum(torch.Size(shape).numel() * ITEM_BYTES[code] for code, shape in found)
    scaling = header.settings.scaling_of(path)
    return ModuleHeader(rank, in_features, out_features, scaling, dtype, nbytes, keys.bias is not None, keys.embedding)
