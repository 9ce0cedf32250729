"""The linear layers of a model: which there are, their shapes, and answering in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raymerge.errors import ModelError

Forward = Callable[[Tensor], Tensor]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear or the Conv1D of GPT-2."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as (in_features, out_features)."""
    return isinstance(module, Conv1D)


def is_filed_transposed(module: Any) -> bool:
    """Whether the base's file keeps a linear layer's weight as (in_features, out_features); a quantised layer of GPT-2
    has turned it."""
    return is_transposed(module) or getattr(module, "source_cls", None) is Conv1D


def is_quantised(module: Any) -> bool:
    """Whether a linear layer keeps its weight in fewer bits than it computes in: 4 or 8 bits of bitsandbytes.

    Such a layer is an nn.Linear to look at. Its forward pass gives out the dtype it is given, and knows its gradient
    with respect to the input; its weight cannot be read as (out_features, in_features).
    """
    weight = module.weight
    return hasattr(weight, "quant_state") or not weight.is_floating_point()


def compute_dtype(model: Any, module: Any) -> torch.dtype:
    """The dtype that a linear layer is given and gives out: its weight's, or the embedding's where it is quantised."""
    weight = model.get_input_embeddings().weight if is_quantised(module) else module.weight
    dtype: torch.dtype = weight.dtype
    return dtype


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its dotted path."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def shape_of(module: Any) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    inner, outer = module.weight.shape
    return int(outer), int(inner)


def frozen_weight(module: Any) -> Tensor:
    """A linear layer's weight as (out_features, in_features), a view. Raises ModelError if it is quantised."""
    weight: Tensor = module.weight.detach()
    if is_quantised(module):
        raise ModelError(f"the base model's weights are {weight.dtype}.\nExpected float32, bfloat16 or float16.")
    return weight.T if is_transposed(module) else weight


def wrap(module: Any, adapt: Callable[[Forward, Tensor], Tensor]) -> Callable[[], None]:
    """Let `adapt(original_forward, x)` answer for a linear layer; returns what puts the layer back.

    x comes where the weight lies: a head that shares its GPU with the embedding is given what another GPU computed.
    """
    place = module.weight.device
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        return adapt(original, x.to(place))

    return replace_forward(module, forward)


def replace_forward(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let `forward` answer for a module; returns what puts the module back."""
    attributes = module.__dict__
    previous = attributes.get("forward")

    def restore() -> None:
        if previous is None:
            del attributes["forward"]
        else:
            attributes["forward"] = previous

    attributes["forward"] = forward
    return restore
