"""Which entries are kept when only some may be: exactly as many as asked for, and of equal ones the same that a
library's own selection picks (factors in bfloat16 have many that are equal)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Pick = Callable[[Tensor, int], Tensor]

_shrink = torch.ops.aten.hardshrink.out


def keep_largest(x: Tensor, count: int, pick: Pick) -> Tensor:
    """x with all entries but the `count` largest in magnitude set to 0; any shape, float32 or float64.

    pick: from magnitudes (n,) and the count to the indices that are kept; asked only where equal entries leave a
    choice.
    """
    if count >= x.numel():
        return x
    if count <= 0:
        return torch.zeros_like(x)
    magnitudes = x.abs().reshape(-1)
    if x.device.type != "cpu" or _coarse(magnitudes):
        return _only(x, pick(magnitudes, count))
    # Of a matrix that is whole, partitioning is as fast as the brackets of `thresholds`, and shows equal entries.
    below = x.numel() - count
    ordered = magnitudes.numpy()
    ordered.partition(below)
    least = ordered[below]
    if least > 0 and ordered[:below].max() == least:
        return _only(x, pick(x.abs().reshape(-1), count))
    # It drops what is at most its bound in magnitude. The memory is there already, which saves a fifth of the time.
    kept: Tensor = _shrink(x, float(np.nextafter(least, least.dtype.type(-1))), out=magnitudes.view(x.shape))
    return kept


def keep_between(x: Tensor, start: int, stop: int, order: Callable[[Tensor], Tensor]) -> Tensor:
    """x with only those entries left whose place among the magnitudes, smallest first, is in [start, stop).

    order: from magnitudes (n,) to the indices that sort them; asked only where equal entries leave a choice.
    """
    if stop <= start:
        return torch.zeros_like(x)
    magnitudes = x.abs().reshape(-1)
    if x.device.type != "cpu":
        return _only(x, order(magnitudes)[start:stop])
    ordered = np.partition(magnitudes.numpy(), [start, stop - 1])
    least, most = ordered[start], ordered[stop - 1]
    doubtful = (start > 0 and least > 0 and ordered[:start].max() == least) or (
        stop < x.numel() and most > 0 and ordered[stop:].min() == most
    )
    if doubtful:
        return _only(x, order(magnitudes)[start:stop])
    lengths = magnitudes.view_as(x)
    return x * ((lengths >= float(least)) & (lengths <= float(most)))


def topk(magnitudes: Tensor, count: int) -> Tensor:
    """What torch.topk picks. The bits of a magnitude are ordered as it is, and integers are compared faster."""
    bits = magnitudes.view(torch.int64 if magnitudes.dtype == torch.float64 else torch.int32)
    return torch.topk(bits, count, sorted=False).indices


def _coarse(magnitudes: Tensor) -> bool:
    """Whether numbers came from 16 bits, so that among many there are equal ones: told by their first few."""
    first = magnitudes[:64].numpy()
    return first.dtype == np.float32 and not (first.view(np.int32) & 0x1FFF).any()


def _only(x: Tensor, indices: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return torch.zeros_like(flat).scatter_(0, indices, flat.index_select(0, indices)).view_as(x)
