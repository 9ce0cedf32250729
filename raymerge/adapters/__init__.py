"""LoRA adapters as data: read exactly as PEFT or mlx-lm means them, or refused by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "FORMATS",
    "BaseWeights",
    "Catalogue",
    "LoraAdapter",
    "LoraModule",
    "ModuleHeader",
    "encode_adapter",
    "format_of",
    "load_adapter",
    "open_adapter",
    "read_adapter",
    "read_header",
    "save_adapter",
    "weight_files",
]

if TYPE_CHECKING:
    from raymerge.adapters.adapter import LoraAdapter, LoraModule, ModuleHeader
    from raymerge.adapters.base_weights import BaseWeights
    from raymerge.adapters.catalogue import Catalogue
    from raymerge.adapters.formats import (
        FORMATS,
        encode_adapter,
        format_of,
        load_adapter,
        open_adapter,
        read_adapter,
        read_header,
        save_adapter,
        weight_files,
    )

_HOME = {
    "BaseWeights": "base_weights",
    "FORMATS": "formats",
    "Catalogue": "catalogue",
    "LoraAdapter": "adapter",
    "LoraModule": "adapter",
    "ModuleHeader": "adapter",
    "encode_adapter": "formats",
    "format_of": "formats",
    "load_adapter": "formats",
    "open_adapter": "formats",
    "read_adapter": "formats",
    "read_header": "formats",
    "save_adapter": "formats",
    "weight_files": "formats",
}


def __getattr__(name: str) -> Any:  # the driver lists adapters without importing torch
    if name not in _HOME:
        raise AttributeError(f"module 'raymerge.adapters' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"raymerge.adapters.{_HOME[name]}"), name)
