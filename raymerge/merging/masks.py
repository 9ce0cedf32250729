"""Random numbers for entries of a delta: they depend on what they are for alone, not on the order or size of requests.

The generator is counter-based (Philox; Salmon et al., 2011): its key is a digest of seed, expert and module, its
counter the tile of 64 rows and the place in that tile. So tiles may be drawn in any order, by any number of workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROWS = 64  # of a tile
WHOLE = 2**32  # numbers lie in [0, WHOLE)
_STEP = 8  # numbers of 32 bits by step of the counter
_TILE = 192  # bits of the counter below those that count tiles


@dataclass(frozen=True)
class Draw:
    """The random numbers of one expert at one module. key: 128 bits."""

    key: int

    @staticmethod
    def of(seed: int, expert: str, module: str) -> Draw:
        """The numbers that belong to a seed, the name of an expert and the path of a module."""
        text = "\0".join((str(seed), expert, module)).encode()
        return Draw(int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little"))

    def numbers(self, rows: slice, columns: int) -> npt.NDArray[np.uint32]:
        """Evenly distributed numbers for some rows of a matrix: (rows, columns), from 0 to WHOLE - 1."""
        found = np.empty((rows.stop - rows.start, columns), np.uint32)
        flat = found.reshape(-1)
        start, done = rows.start, 0
        while start < rows.stop:
            tile, within = divmod(start, ROWS)
            stop = min((tile + 1) * ROWS, rows.stop)
            steps, rest = divmod(within * columns, _STEP)
            count = (stop - start) * columns
            words = np.random.Philox(key=self.key, counter=steps + (tile << _TILE)).random_raw((rest + count + 1) // 2)
            flat[done : done + count] = words.view(np.uint32)[rest : rest + count]
            start, done = stop, done + count
        return found
