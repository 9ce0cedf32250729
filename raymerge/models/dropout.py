"""Dropout without a random state: whether a number is left out follows from where it stands.

The mask is a hash of (seed, adapter, step, module, row of the step, position, feature). So an adapter leaves out the
same numbers whatever trains beside it, however its rows are cut or padded, when a block is computed again, and after
an interruption.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from raymerge import storage

# Odd constants of splitmix64 (Steele, Lea and Flood 2014) and of a 32 bit finaliser, as signed numbers.
_GOLDEN, _MIX_1, _MIX_2 = (v - 2**64 for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MIX_3, _MIX_4 = 0x7FEB352D, 0x846CA68B - 2**32
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Dropout:
    """What one batch leaves out of the inputs of A.

    share: of the numbers, left out. rows: int64 (rows,), a key of (seed, adapter, step, row) for each row. factor: what
    the others are multiplied by, so that the mean stays.
    """

    def __init__(self, share: float, rows: Tensor) -> None:
        self.factor = 1 / (1 - share)
        self._least = round(share * 2**31)
        self._rows = rows
        self._tokens: dict[tuple[torch.device, int], Tensor] = {}

    def kept(self, module: str, x: Tensor) -> Tensor:
        """Which numbers of (rows, width, features) stay: an integer of x's width for each, all ones or all zeros."""
        mixed = self._token_numbers(x.device, x.numel() // x.shape[-1]) + _features(module, x.shape[-1], x.device)
        mixed ^= mixed >> 15
        mixed *= _MIX_3
        mixed ^= mixed >> 13
        mixed *= _MIX_4
        # without a comparison, which would be slower than all of the above: the sign of (31 bits - least), spread out
        mixed &= 2**31 - 1
        mixed -= self._least
        return (~(mixed >> 31)).view(x.shape).to(_INTEGERS[x.dtype])

    def _token_numbers(self, device: torch.device, tokens: int) -> Tensor:
        """int32 (tokens, 1), made once for all modules of a batch."""
        if (device, tokens) not in self._tokens:
            positions = torch.arange(tokens // len(self._rows), device=device)
            mixed = _mixed(self._rows.to(device)[:, None] + positions * _GOLDEN)
            self._tokens[device, tokens] = (mixed >> 32).to(torch.int32).view(-1, 1)
        return self._tokens[device, tokens]


def masked(x: Tensor, kept: Tensor) -> Tensor:
    """x where it is kept, else zero."""
    return (x.view(kept.dtype) & kept).view(x.dtype)


@lru_cache(maxsize=4096)
def _features(module: str, features: int, device: torch.device) -> Tensor:
    """int32 (features,)."""
    start = torch.tensor(_number_of(module), device=device)
    return (_mixed(_mixed(start) + torch.arange(features, device=device) * _GOLDEN) >> 32).to(torch.int32)


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
