"""Coordinates of adapters whose inner products are those of their deltas, nearly: for similarity among thousands.

A delta is projected from both sides by Gaussian matrices and folded into a fixed number of buckets by a count sketch
(Charikar, Chen and Farach-Colton 2002). Both are keyed by the module's name, so adapters can be sketched one by one,
anywhere, whatever modules they have. No table is adapters x adapters.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from raymerge.adapters.adapter import LoraAdapter

SIDE = 64


def sketch(adapter: LoraAdapter, dimensions: int, seed: int = 0) -> NDArray[np.float32]:
    """Coordinates of an adapter: float32 (dimensions,).

    The inner product of two sketches is that of the deltas, over all modules, in expectation; for adapters of rank 8
    with 28 modules the cosine is off by about 0.02 (standard deviation).
    """
    total = np.zeros(dimensions)
    for name in sorted(adapter.modules):
        module = adapter.modules[name]
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        random = np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "little")))
        left = torch.from_numpy(random.standard_normal((SIDE, module.out_features), dtype=np.float32))
        right = torch.from_numpy(random.standard_normal((module.in_features, SIDE), dtype=np.float32))
        projected = (left @ module.B.float()) @ (module.A.float() @ right) * (module.scaling / SIDE)
        buckets = random.integers(0, dimensions, SIDE * SIDE)
        signs = random.integers(0, 2, SIDE * SIDE) * 2.0 - 1.0
        np.add.at(total, buckets, signs * projected.double().numpy().ravel())
    return total.astype(np.float32)
