"""Rows of a routing table as lines of a file, and back: one line per persona and expert, columns of SCHEMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymerge.errors import RoutingError, did_you_mean

EVERYWHERE = "*"  # the module group of a weight that is the same in all layers
NAME = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("persona", NAME),
        ("expert", NAME),  # null: the persona has no contributor and gets the base, or shares another's row
        ("module_group", NAME),
        ("weight", pa.float64()),
        ("similarity", pa.float32()),  # what the weight came from; null where it came from nothing of the kind
        ("adapter", NAME),  # the name that the strategy gives the merged adapter; null: the first persona's
        ("same_as", NAME),  # the persona whose row this one repeats; null where the row is written out
    ]
)


@dataclass(frozen=True)
class Row:
    """The contributors of one row.

    experts: int32 (n,), indices into a list of names, ascending. weights: float64 (n,). similarities: float32 (n,), NaN
    where unknown, or None. adapter: the name that the strategy gives it, or None.
    """

    experts: NDArray[np.int32]
    weights: NDArray[np.float64]
    similarities: NDArray[np.float32] | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Rows:
    """Distinct rows and who has them. experts: what indices mean, sorted. row_of: int32 (personas,)."""

    experts: tuple[str, ...]
    rows: tuple[Row, ...]
    row_of: NDArray[np.int32]


def to_lines(personas: Sequence[str], rows: Rows, most_lines: int) -> pa.Table:
    """Columns of SCHEMA, sorted by persona and expert; a persona without contributors has one line, expert null.

    If there would be more than `most_lines`, a row that several personas share is written once, and the others refer to
    it by `same_as`.
    """
    row_of = rows.row_of
    sizes = np.array([len(row.experts) for row in rows.rows], dtype=np.int64)
    first = np.full(len(rows.rows), -1, dtype=np.int32)
    first[row_of[::-1]] = np.arange(len(personas), dtype=np.int32)[::-1]
    many = int(sizes[row_of].sum()) > most_lines
    refers = many & (first[row_of] != np.arange(len(personas)))
    counts = np.where(refers, 0, sizes[row_of])
    lines = np.maximum(counts, 1)
    persona = np.repeat(np.arange(len(personas), dtype=np.int32), lines)
    blank = np.repeat(counts == 0, lines)
    written = [rows.rows[i] for i, refer in zip(row_of, refers, strict=True) if not refer]
    near = [np.full(len(r.experts), np.nan) if r.similarities is None else r.similarities for r in written]
    similarity = _fill(blank, near, np.float32)
    names = sorted({row.adapter for row in rows.rows if row.adapter})
    codes = {name: i for i, name in enumerate(names)}
    adapter = np.repeat(np.array([codes.get(r.adapter or "", -1) for r in rows.rows], np.int32)[row_of], lines)
    columns = [
        _named(persona, np.zeros_like(blank), personas),
        _named(_fill(blank, [r.experts for r in written], np.int32), blank, rows.experts),
        _named(np.zeros_like(persona), blank, (EVERYWHERE,)),
        pa.array(_fill(blank, [r.weights for r in written], np.float64), mask=blank),
        pa.array(similarity, mask=blank | np.isnan(similarity)),
        _named(adapter, adapter < 0, names),
        _named(np.repeat(first[row_of], lines), ~np.repeat(refers, lines), personas),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _fill(blank: NDArray[np.bool_], parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    values: NDArray[Any] = np.zeros(len(blank), dtype=dtype)
    values[~blank] = np.concatenate([np.zeros(0, dtype), *parts])
    return values


def _named(codes: NDArray[np.int32], null: NDArray[np.bool_], names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=null), pa.array(names, pa.string()))


def from_lines(personas: Sequence[str], lines: pa.Table, adapters: Mapping[str, str], where: str) -> Rows:
    """Rows of lines (persona, expert, weight and perhaps similarity) in any order; weights of 0 are left out.

    personas: all, sorted. adapters: persona -> name of its adapter; rows that have one and agree are kept once.
    Raises RoutingError for a persona not in `personas` and for a pair given twice.
    """
    there = pc.and_(pc.is_valid(lines["expert"]), pc.fill_null(pc.not_equal(lines["weight"], 0.0), True))
    lines = lines.filter(there)
    experts = tuple(sorted(lines["expert"].unique().to_pylist()))
    row = _codes(lines["persona"], personas)
    if (row < 0).any():
        stranger = lines["persona"][int(np.flatnonzero(row < 0)[0])].as_py()
        hint = did_you_mean(stranger, personas)
        raise RoutingError(f"{where}: a row is for {stranger!r}, who is no persona of it.{hint}")
    column = _codes(lines["expert"], experts)
    order = np.lexsort((column, row))
    row, column = row[order], column[order]
    again = np.flatnonzero((row[1:] == row[:-1]) & (column[1:] == column[:-1]))
    if len(again):
        who, expert = personas[row[again[0]]], experts[column[again[0]]]
        raise RoutingError(f"{where}: {who} has two weights for the expert {expert}.\nExpected one.")
    weight = lines["weight"].cast(pa.float64()).to_numpy()[order]
    near = lines["similarity"].cast(pa.float32()).to_numpy()[order] if "similarity" in lines.column_names else None
    ends = np.searchsorted(row, np.arange(len(personas) + 1))
    rows: list[Row] = []
    row_of: list[int] = []
    owner: dict[tuple[str, bytes, bytes], int] = {}
    for name, start, end in zip(personas, ends[:-1], ends[1:], strict=True):
        known = None if near is None or np.isnan(near[start:end]).all() else near[start:end]
        made = Row(column[start:end], weight[start:end], known, adapters.get(name))
        key = (made.adapter or f"/{name}", made.experts.tobytes(), made.weights.tobytes())
        row_of.append(owner.setdefault(key, len(rows)))
        if row_of[-1] == len(rows):
            rows.append(made)
    return Rows(experts, tuple(rows), np.array(row_of, dtype=np.int32))


def _codes(column: pa.ChunkedArray, names: Sequence[str]) -> NDArray[np.int32]:
    found = pc.index_in(column.cast(pa.string()), value_set=pa.array(names, pa.string()))
    return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int32)


def read_lines(table: pa.Table, where: str) -> tuple[tuple[str, ...], Rows]:
    """Personas and rows of a file's columns, of which persona, expert and weight are enough.

    Raises RoutingError naming `where` for a missing column, weights by module group, a reference to nobody, and what
    `from_lines` refuses.
    """
    missing = [c for c in ("persona", "expert", "weight") if c not in table.column_names]
    if missing:
        raise RoutingError(f"{where}: has no column {missing[0]}.\nFound: {', '.join(table.column_names)}.")
    if "module_group" in table.column_names:
        groups = set(table["module_group"].unique().to_pylist()) - {None, EVERYWHERE}
        if groups:
            raise RoutingError(f"{where}: has weights for the module group {min(groups)!r}.\nExpected `*` alone.")
    personas = tuple(sorted(table["persona"].unique().to_pylist()))
    same_as = _pairs(table, "same_as")
    rows = from_lines(personas, table, _pairs(table, "adapter"), where)
    row_of = rows.row_of.copy()
    position = {name: i for i, name in enumerate(personas)}
    for name, first in same_as.items():
        if first not in position or first in same_as:
            raise RoutingError(f"{where}: {name} refers to the row of {first!r}, which is not written out.")
        row_of[position[name]] = row_of[position[first]]
    used, numbers = np.unique(row_of, return_inverse=True)
    return personas, Rows(rows.experts, tuple(rows.rows[i] for i in used), numbers.astype(np.int32))


def _pairs(table: pa.Table, column: str) -> dict[str, str]:
    if column not in table.column_names:
        return {}
    there = table.filter(pc.is_valid(table[column])).select(["persona", column])
    return dict(zip(*(c.to_pylist() for c in there.group_by(["persona", column]).aggregate([]).columns), strict=True))
