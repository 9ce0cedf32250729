"""What an adapter adds to another one, as an adapter."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.merging.shapes import check_shapes


def difference(adapter: LoraAdapter, anchor: LoraAdapter) -> LoraAdapter:
    """adapter - anchor with nothing lost: factors side by side, so that ranks add up, in float32 or wider.

    A module that one of them lacks is a zero delta. Raises MergeError if a module's shape differs;
    UnsupportedAdapterError if either holds more than deltas of linear modules.
    """
    signs = ((adapter, 1.0), (anchor, -1.0))
    for one, _ in signs:
        one.require_plain("cannot be measured from another adapter")
    modules: dict[str, LoraModule] = {}
    for path in sorted({*adapter.headers, *anchor.headers}):
        owners = [(one, sign) for one, sign in signs if path in one.headers]
        check_shapes(path, ((one.name, one.headers[path]) for one, _ in owners))
        parts = [(one.modules[path], sign) for one, sign in owners]
        dtype = reduce(torch.promote_types, [part.dtype for part, _ in parts], torch.float32)
        A = torch.cat([_wide(part.A, dtype) for part, _ in parts])
        B = torch.cat([_wide(part.B, dtype) * (sign * part.scaling) for part, sign in parts], dim=1)
        modules[path] = LoraModule(A, B, 1.0)
    return replace(adapter, modules=modules)


def _wide(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.detach().to(dtype)
