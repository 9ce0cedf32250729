"""Modules of an adapter that stay in its file until they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raymerge.adapters.adapter import LoraModule, ModuleHeader, StoredModules
from raymerge.adapters.peft import WEIGHTS, make_module
from raymerge.adapters.tensors import FLOATS, ITEM_BYTES, read_tensors

if TYPE_CHECKING:
    from raymerge.adapters.peft import AdapterHeader


class StoredPeftModules(StoredModules):
    """Modules of a safetensors file in PEFT's form. Each access reads, checks and returns one; none is kept."""

    def __init__(self, header: AdapterHeader) -> None:
        self._header = header
        self.headers = {path: _module_header(header, path) for path in header.modules}

    def __getitem__(self, path: str) -> LoraModule:
        header = self._header
        where = f"{header.name}: {WEIGHTS}"
        A, B = read_tensors(header.file, header.modules[path], where)
        return make_module(A, B, self.headers[path].scaling, path, where)


def _module_header(header: AdapterHeader, path: str) -> ModuleHeader:
    (A_dtype, A_shape), (B_dtype, B_shape) = (header.tensors[key] for key in header.modules[path])
    widest = torch.promote_types(getattr(torch, FLOATS[A_dtype]), getattr(torch, FLOATS[B_dtype]))
    nbytes = A_shape[0] * A_shape[1] * ITEM_BYTES[A_dtype] + B_shape[0] * B_shape[1] * ITEM_BYTES[B_dtype]
    return ModuleHeader(A_shape[0], A_shape[1], B_shape[0], header.settings.scaling_of(path), widest, nbytes)
