"""The random numbers of `merging.masks` for whole tensors: a dialect drops the entries that the method itself drops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raymerge.merging.masks import WHOLE, Draw


def uniform(seed: int, expert: str, tensor: str, shape: Sequence[int]) -> Tensor:
    """Numbers from [0, 1) that belong to a seed, an expert and a tensor's name: float64 (rows, columns)."""
    rows, columns = shape
    return torch.from_numpy(Draw.of(seed, expert, tensor).numbers(slice(0, rows), columns) / WHOLE)
