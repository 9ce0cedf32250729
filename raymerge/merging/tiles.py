"""The deltas of all experts at one module, formed tile by tile, for sums over experts that no factors can express.

A tile is some rows of one expert's delta, small enough to stay in the processor's cache while it is worked on. Tiles
depend on the shape alone, so that neither the memory at hand nor the number of experts changes a bit of a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raymerge.merging.factors import Factor, is_identity
from raymerge.merging.masks import ROWS
from raymerge.merging.site import Site

TILE = 2**16  # entries of a tile on a CPU, where a row is not longer
FEWEST = 16  # rows of a tile at least: products of fewer rows are slow
DEVICE_TILE = 2**25  # entries of a tile elsewhere
HELD = 64 * 2**20  # bytes of experts' factors in memory at a time
SUMS = 256 * 2**20  # bytes of sums over experts in memory at a time
_SAMPLE = 2**15  # entries of a sample
_GATHERED = 2**22  # numbers that are multiplied for it, where ranks are high


@dataclass(frozen=True)
class Expert:
    """One expert's delta as a sum of products of its own dtype; an empty one is zero.

    index, name, weight: in the site. products: B (out, r), A (r, in), or None in place of an identity.
    """

    index: int
    name: str
    weight: float
    products: Sequence[tuple[Tensor | None, Tensor | None]]

    def form(self, rows: slice, tile: Tensor, spare: Tensor) -> None:
        """Write some rows of the delta into a tile. spare: as large, overwritten where there are several products."""
        if not self.products:
            tile.zero_()
        for number, (B, A) in enumerate(self.products):
            target = spare if number else tile
            if A is None and B is not None:
                target.copy_(B[rows])
            elif B is None and A is not None:
                target.copy_(A[rows])
            elif A is not None and B is not None:
                torch.mm(B[rows], A, out=target)
            if number:
                tile.add_(spare)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Entries of the delta."""
        found = torch.zeros((), device=rows.device)
        for B, A in self.products:
            if A is None and B is not None:
                found = found + B[rows, columns]
            elif B is None and A is not None:
                found = found + A[rows, columns]
            elif A is not None and B is not None:
                found = found + (B[rows] * A.T[columns]).sum(1)
        return found


Add = Callable[[Tensor, Expert, slice, Tensor, Tensor], None]
"""Adds one expert to the sums (planes, rows, in) of a tile. Beside them and the expert: the rows of the tile in the
delta, and two tensors of its size to work in."""


@dataclass(frozen=True)
class Experts:
    """The experts of a site that have a weight, and how their deltas are cut into tiles.

    weighted: whether deltas are multiplied by their weights. dtype: float64 if any factor is, else float32. held: all
    experts, if their factors fit into memory together.
    """

    site: Site
    weighted: bool
    dtype: torch.dtype
    device: torch.device
    held: Sequence[Expert] | None

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        into = self.site.shape[1]
        entries = TILE if self.device.type == "cpu" else DEVICE_TILE
        if into * ROWS <= entries:
            return entries // into // ROWS * ROWS
        rows = ROWS
        while rows > FEWEST and rows * into > entries:
            rows //= 2
        return rows

    def tensor(self, *shape: int) -> Tensor:
        """An empty tensor of their dtype, where they are."""
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def sums(self, planes: int, add: Add) -> Iterator[tuple[slice, Tensor]]:
        """Sums over all experts: the rows of each tile and its sums (planes, rows, in), which may be overwritten.

        Experts are read anew for each group of rows, as many as fit into memory; held ones for each tile.
        """
        out, into = self.site.shape
        step = rows = self.rows
        if self.held is None:
            step *= max(SUMS // (planes * rows * into * self.dtype.itemsize), 1)
        whole = self.tensor(planes, min(step, out), into)
        tile, spare = self.tensor(2, min(rows, out), into)
        for group in _slices(0, out, step):
            sums = whole[:, : group.stop - group.start].zero_()
            parts = list(zip(_slices(group.start, group.stop, rows), torch.split(sums, rows, 1), strict=True))
            for lot in self.lots():
                for place, part in parts:
                    count = place.stop - place.start
                    for expert in lot:
                        add(part, expert, place, tile[:count], spare[:count])
            yield from parts

    def lots(self) -> Iterator[Sequence[Expert]]:
        """The experts in the order of their names, as many at a time as fit into memory; read anew unless held."""
        if self.held is not None:
            yield self.held
            return
        lot: list[Expert] = []
        used = 0
        for index, factors in enumerate(self.site.deltas()):
            if self.site.weights[index] == 0:
                continue
            lot.append(self._expert(index, factors))
            used += _nbytes(factors, self.dtype)
            if used >= HELD:
                yield lot
                lot, used = [], 0
        if lot:
            yield lot

    def formed(self, expert: Expert) -> Iterator[tuple[slice, Tensor]]:
        """A delta tile by tile: its rows, and the tile, which is overwritten by the next."""
        out, into = self.site.shape
        tile, spare = self.tensor(2, min(self.rows, out), into)
        for rows in _slices(0, out, self.rows):
            count = rows.stop - rows.start
            expert.form(rows, tile[:count], spare[:count])
            yield rows, tile[:count]

    def magnitudes(self, expert: Expert) -> Callable[[], Iterator[Tensor]]:
        """All |entries| of a delta, tile by tile; a tile is overwritten by the next."""

        def tiles() -> Iterator[Tensor]:
            for _, tile in self.formed(expert):
                yield tile.abs_()

        return tiles

    def sampled(self, expert: Expert) -> Tensor:
        """|entries| of a delta at random places that depend on the shape alone."""
        ranks = sum(1 if B is None or A is None else int(A.shape[0]) for B, A in expert.products)
        rows, columns = places(self.site.shape, self.device, max(_GATHERED // max(ranks, 1), _SAMPLE // 8))
        return expert.at(rows, columns).abs()

    def _expert(self, index: int, factors: Sequence[Factor]) -> Expert:
        weight = self.site.weights[index]
        by = weight if self.weighted else 1.0
        products = tuple(_product(factor, factor.weight * by, self.dtype) for factor in factors)
        return Expert(index, self.site.names[index], weight, products)


def places(shape: tuple[int, int], device: torch.device, most: int = _SAMPLE) -> tuple[Tensor, Tensor]:
    """Rows and columns of random entries, the same for each delta of a shape."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(end, (min(_SAMPLE, most),), generator=generator) for end in shape)
    return rows.to(device), columns.to(device)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which entries are worked on: float64 if a tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def gather(site: Site, *, weighted: bool) -> Experts:
    """Look at all experts of a site once; keep them if their factors fit into memory."""
    dtype, device, used = working_dtype(), torch.device("cpu"), 0
    kept: list[tuple[int, Sequence[Factor]]] = []
    for index, factors in enumerate(site.deltas()):
        for factor in factors:
            device = factor.A.device
            dtype = torch.promote_types(dtype, working_dtype(factor.A, factor.B))
        if site.weights[index] == 0:
            continue
        used += _nbytes(factors, torch.float32)
        kept.append((index, factors))
        if used > HELD:
            kept.clear()
    if site.anchor is not None:  # in one dtype, so that it is not copied for each expert
        A, B = site.anchor.A.detach().to(dtype), site.anchor.B.detach().to(dtype)
        site = replace(site, anchor=replace(site.anchor, A=A, B=B))
    streamed = Experts(site, weighted, dtype, device, None)
    if used > HELD:
        return streamed
    return replace(streamed, held=[streamed._expert(index, factors) for index, factors in kept])


def _product(factor: Factor, weight: float, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    A, B = factor.A.detach().to(dtype), factor.B.detach().to(dtype)
    if is_identity(A):
        return B * weight, None
    if is_identity(B):
        return None, A * weight
    return B * weight, A.contiguous()


def _nbytes(factors: Sequence[Factor], dtype: torch.dtype) -> int:
    return sum(factor.A.numel() + factor.B.numel() for factor in factors) * dtype.itemsize


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
