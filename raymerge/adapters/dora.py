"""DoRA (weight-decomposed low-rank adaptation, arXiv:2402.09353) as a delta, which takes the base's weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraModule, ModuleHeader
from raymerge.adapters.tensors import ITEM_BYTES
from raymerge.errors import AdapterError

_ROWS = 256  # of a tile


def dora_delta(lora: LoraModule, magnitude: Tensor, weight: Tensor) -> Tensor:
    """What DoRA adds to a weight W: magnitude * (W + D) / |W + D| - W, with D the factors' delta and |.| a row's norm.

    magnitude: (out_features,). weight: (out_features, in_features). Computed in float64, a tile of rows at a time,
    since the difference is small beside W; returns (out_features, in_features), in float32 unless a factor is float64.
    A row of W + D that is zero gives NaN or Inf.
    """
    dtype = torch.promote_types(torch.promote_types(lora.dtype, magnitude.dtype), torch.float32)
    delta = torch.empty(lora.shape, dtype=dtype)
    A, B = lora.A.double(), lora.scaling * lora.B.double()
    for start in range(0, lora.out_features, _ROWS):
        rows = slice(start, start + _ROWS)
        own = weight[rows].double()
        total = own + B[rows] @ A
        total *= (magnitude[rows].double() / torch.linalg.vector_norm(total, dim=1))[:, None]
        delta[rows] = total.sub_(own)
    return delta


def dense_module(delta: Tensor, nominal: int, embedding: bool = False) -> LoraModule:
    """A dense delta (out_features, in_features) as a product with the identity of its smaller side."""
    out_features, in_features = delta.shape
    eye = torch.eye(min(delta.shape), dtype=delta.dtype)
    A, B = (eye, delta) if in_features <= out_features else (delta, eye)
    return LoraModule(A, B, 1.0, embedding=embedding, nominal=nominal)


def dora_header(rank: int, shape: tuple[int, int], dtype: torch.dtype, embedding: bool) -> ModuleHeader:
    """The header of a DoRA module read with its base. rank: of its factors; dtype: the widest of its tensors."""
    dtype = torch.promote_types(dtype, torch.float32)
    small, large = sorted(shape)
    nbytes = (small * small + small * large) * ITEM_BYTES["F64" if dtype == torch.float64 else "F32"]
    return ModuleHeader(small, shape[1], shape[0], 1.0, dtype, nbytes, False, embedding, rank)


def transposed_weights(
    shapes: Mapping[str, tuple[int, int]],
    stored: Mapping[str, tuple[int, ...]],
    embeddings: Collection[str],
    fan_in_fan_out: bool,
    where: str,
) -> frozenset[str]:
    """Modules whose weight the base stores as (in_features, out_features), as embeddings and Conv1D are.

    shapes: of the deltas, (out_features, in_features). stored: of the base's weights. A square weight says nothing of
    itself: fan_in_fan_out counts, unless other modules contradict it. Raises AdapterError if a weight has another shape
    or its orientation cannot be known.
    """
    found: dict[str, bool] = {}
    for path, shape in shapes.items():
        options = [True] if path in embeddings else [False, True]
        fits = [turned for turned in options if stored[path] == (shape[::-1] if turned else shape)]
        if not fits:
            raise AdapterError(
                f"{where}: {path} does not fit the base model.\nExpected a weight of {shape[0]} outputs and {shape[1]} "
                f"inputs, found {stored[path]}. Is it the base that the adapter was trained on?"
            )
        if len(fits) == 1:
            found[path] = fits[0]
    others = {turned for path, turned in found.items() if path not in embeddings}
    square = [path for path in shapes if path not in found]
    if square and others not in (set(), {fan_in_fan_out}):
        raise AdapterError(
            f"{where}: whether the base stores {square[0]} as (in, out) cannot be known: it is square.\n"
            f"Found fan_in_fan_out {fan_in_fan_out}, which other modules contradict."
        )
    return frozenset(path for path in shapes if found.get(path, fan_in_fan_out))
