"""LoRA adapters as data: read exactly as PEFT means them, or refused by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Catalogue",
    "LoraAdapter",
    "LoraModule",
    "ModuleHeader",
    "encode_adapter",
    "load_adapter",
    "open_adapter",
    "read_adapter",
    "save_adapter",
]

if TYPE_CHECKING:
    from raymerge.adapters.adapter import LoraAdapter, LoraModule, ModuleHeader
    from raymerge.adapters.catalogue import Catalogue
    from raymerge.adapters.peft import encode_adapter, load_adapter, open_adapter, read_adapter, save_adapter

_HOME = {
    "Catalogue": "catalogue",
    "LoraAdapter": "adapter",
    "LoraModule": "adapter",
    "ModuleHeader": "adapter",
    "encode_adapter": "peft",
    "load_adapter": "peft",
    "open_adapter": "peft",
    "read_adapter": "peft",
    "save_adapter": "peft",
}


def __getattr__(name: str) -> Any:  # the driver lists adapters without importing torch
    if name not in _HOME:
        raise AttributeError(f"module 'raymerge.adapters' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"raymerge.adapters.{_HOME[name]}"), name)
