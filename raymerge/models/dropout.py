"""Dropout without a random state: whether a number is left out follows from where it stands.

The mask is a hash of (seed, adapter, step, module, row of the step, position, feature). So an adapter leaves out the
same numbers whatever trains beside it, however its rows are cut or padded, when a block is computed again, and after
an interruption.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymerge import storage

# Odd constants of splitmix64 (Steele, Lea and Flood 2014) and of a 32 bit finaliser, as signed numbers.
_GOLDEN, _MIX_1, _MIX_2 = (v - 2**64 for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MIX_3, _MIX_4 = 0x7FEB352D, 0x846CA68B - 2**32


class Dropout:
    """What one batch leaves out of the inputs of A.

    share: of the numbers, left out. rows: int64 (rows,), a key of (seed, adapter, step, row) for each row.
    """

    def __init__(self, share: float, rows: Tensor) -> None:
        self.factor = 1 / (1 - share)
        self._least = round(share * 2**32) - 2**31
        self._rows = rows

    def kept(self, module: str, x: Tensor) -> Tensor:
        """Which numbers of (rows, width, features) stay: bool, of its shape."""
        rows = (self._rows ^ _number_of(module)).to(x.device)
        positions = torch.arange(x.numel() // x.shape[-1] // len(rows), device=x.device)
        token = _mixed(_mixed(rows)[:, None] + positions * _GOLDEN) >> 32
        feature = _mixed(torch.arange(x.shape[-1], device=x.device) * _GOLDEN) >> 32
        mixed = (token.to(torch.int32).view(-1, 1) + feature.to(torch.int32)).view(x.shape)
        mixed ^= mixed >> 15
        mixed *= _MIX_3
        mixed ^= mixed >> 13
        mixed *= _MIX_4
        return mixed >= self._least


def row_keys(seed: int, adapter: str, step: int, rows: Tensor) -> Tensor:
    """Keys of rows, int64 (n,), given by their numbers in an adapter's step."""
    start = torch.tensor([_number_of(storage.digest_value([seed, adapter])), step])
    return _mixed(_mixed(start[0] + start[1] * _GOLDEN) + rows * _GOLDEN)


def _number_of(text: str) -> int:
    return int(storage.digest_bytes(text.encode()).removeprefix("sha256:")[:15], 16)


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of splitmix64."""
    z = (z ^ _logical(z, 30)) * _MIX_1
    z = (z ^ _logical(z, 27)) * _MIX_2
    return z ^ _logical(z, 31)


def _logical(z: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
