"""A base model that for a while is itself with an adapter added to its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.models.layers import frozen_weight, linear_modules
from raymerge.models.multilora import check_fits


@contextmanager
def folded(base: BaseModel, adapter: LoraAdapter) -> Iterator[None]:
    """Add an adapter's deltas to the weights; afterwards these have the bits that they had, also where an error ended
    it. The weights as they were are kept on the CPU.

    Raises ModelError if the adapter does not fit the base, or changes a layer that is quantised, or that shares its
    weight with the embedding; UnsupportedAdapterError if it holds more than deltas of linear modules.
    """
    adapter.require_plain("cannot be added to a base's weights")
    linear = linear_modules(base.model)
    check_fits(adapter.name, adapter.headers, linear)
    embedding = base.model.get_input_embeddings().weight
    kept: dict[str, Tensor] = {}
    try:
        for path, module in adapter.modules.items():
            weight = frozen_weight(linear[path])
            if weight.data_ptr() == embedding.data_ptr():
                raise ModelError(
                    f"{adapter.name}: {path} shares its weight with the embedding, so a delta cannot be added to it.\n"
                    "Expected an adapter that leaves the head as it is."
                )
            kept[path] = weight.to("cpu", copy=True)
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(wide) + module.delta(wide).to(weight.device))
        yield
    finally:
        for path, before in kept.items():
            frozen_weight(linear[path]).copy_(before)
