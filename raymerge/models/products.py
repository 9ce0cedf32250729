"""Products with frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from raymerge.models.layers import Forward


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in_features) W^T + bias, with W (out_features, in_features), without a gradient.

    On a CPU, float32 goes through oneDNN where torch has it: torch's own product asks MKL, which uses half of the
    vector width on processors that are not Intel's. The machine alone decides, so that it gives the same bytes.
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _has_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, bias)


def frozen_layer(weight: Tensor, bias: Tensor | None) -> Callable[[Forward, Tensor], Tensor]:
    """What answers for a linear layer, in `layers.wrap`, when nothing but the gradient of its input is wanted."""

    def answer(_original: Forward, x: Tensor) -> Tensor:
        out: Tensor = _FrozenLinear.apply(x.to(weight.device), weight, bias)  # type: ignore[no-untyped-call]
        return out

    return answer


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias with the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return frozen_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return frozen_product(gradients[0], ctx.weight.T), None, None


@cache
def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")
