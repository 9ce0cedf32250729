"""Random numbers that depend on what they are for alone: a seed, an expert, a tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int, expert: str, tensor: str, shape: Sequence[int]) -> Tensor:
    """Numbers from [0, 1) of a counter-based generator: float32, of the shape given."""
    digest = hashlib.sha256("\0".join((str(seed), expert, tensor)).encode()).digest()
    generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.random(tuple(shape), dtype=np.float32))
