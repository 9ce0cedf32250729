"""Which part of a persona's examples is trained on, chosen on and tested on, where no column says so."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge.config import SplitShares
from raymerge.personas.examples import SPLITS

TRAIN, VALIDATION, TEST = range(len(SPLITS))


def last_shares(
    personas: NDArray[np.int64],
    times: NDArray[Any] | None,
    validation: float,
    test: float,
    pairs: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Splits (rows,), as places in SPLITS: of each persona the last share is test, the one before it validation.

    personas: (rows,), a number for each persona. times: (rows,), None for the order of the rows; equal times keep that
    order. pairs: (rows,), a number for each prompt with its response; None if all differ. A persona's equal pairs are
    one, at the place of the first of them, since a row that is trained on cannot test. Shares are rounded to whole
    pairs, but a split with a share has at least one where a persona has enough: the first is train, the second test,
    the third validation.
    """
    rows = np.arange(len(personas))
    order = np.lexsort((rows, personas) if times is None else (rows, times, personas))
    if pairs is None:
        return _last_shares_of(personas, order, validation, test)
    numbers = np.unique(pairs, return_inverse=True)[1].reshape(-1)
    keys = personas[order] * len(rows) + numbers[order]
    _, first, same = np.unique(keys, return_index=True, return_inverse=True)
    once = order[np.sort(first)]  # the first row of each pair, by persona and time
    splits = np.empty(len(personas), np.int64)
    splits[once] = _last_shares_of(personas[once], np.arange(len(once)), validation, test)
    splits[order] = splits[order[first[same.reshape(-1)]]]
    return splits


def _last_shares_of(
    personas: NDArray[np.int64], order: NDArray[np.int64], validation: float, test: float
) -> NDArray[np.int64]:
    """Splits (rows,) where every row counts. order: the rows by persona and time."""
    count = len(personas)
    _, first, sizes = np.unique(personas[order], return_index=True, return_counts=True)
    left = np.maximum(sizes - (2 if validation > 0 else 1), np.minimum(sizes - 1, 1))  # for test, at most
    tested = np.minimum(_rounded(sizes, test), left)
    validated = np.minimum(_rounded(sizes, validation), sizes - 1 - tested)
    from_end = np.repeat(first + sizes, sizes) - np.arange(count)  # 1 is a persona's last row
    last, before = np.repeat(tested, sizes), np.repeat(tested + validated, sizes)
    splits = np.empty(count, np.int64)
    splits[order] = np.where(from_end <= last, TEST, np.where(from_end <= before, VALIDATION, TRAIN))
    return splits


def _rounded(sizes: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    whole: NDArray[np.int64] = np.floor(sizes * share + 0.5).astype(np.int64)
    return np.maximum(whole, 1) if share > 0 else whole


def hashed_shares(personas: Sequence[str], prompts: Sequence[str], shares: SplitShares) -> NDArray[np.int64]:
    """Splits (rows,), as places in SPLITS, by a hash of seed, persona and prompt: no other row has a say in it, and the
    same prompt of a persona is never on two sides."""
    begun: dict[str, Any] = {}
    for name in dict.fromkeys(personas):
        begun[name] = hashlib.blake2b(f"{shares.seed}\0{name}\0".encode(), digest_size=8)
    values = np.empty(len(personas), np.uint64)
    for row, (name, prompt) in enumerate(zip(personas, prompts, strict=True)):
        hashed = begun[name].copy()
        hashed.update(prompt.encode())
        values[row] = int.from_bytes(hashed.digest(), "little")
    place = values / 2.0**64
    return np.where(place < shares.test, TEST, np.where(place < shares.test + shares.validation, VALIDATION, TRAIN))
