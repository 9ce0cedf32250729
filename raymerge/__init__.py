"""raymerge: merge hundreds of LoRA adapters into better ones, on Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BaseWeights", "LoraAdapter", "LoraModule", "load_adapter", "merge", "save_adapter"]

if TYPE_CHECKING:
    from raymerge.adapters import BaseWeights, LoraAdapter, LoraModule, load_adapter, save_adapter
    from raymerge.merging.merge import merge

_HOME = {
    "BaseWeights": "raymerge.adapters",
    "LoraAdapter": "raymerge.adapters",
    "LoraModule": "raymerge.adapters",
    "load_adapter": "raymerge.adapters",
    "save_adapter": "raymerge.adapters",
    "merge": "raymerge.merging.merge",
}


def __getattr__(name: str) -> Any:  # torch is imported at first use, so that `import raymerge` is quick
    if name not in _HOME:
        raise AttributeError(f"module 'raymerge' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
