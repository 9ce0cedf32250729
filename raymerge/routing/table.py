"""The routing table: who contributes how much to whom. A sparse matrix, persona x expert.

Rows are kept once for all personas that share them, so that the average of 20,000 adapters for 20,000 personas is
20,000 numbers. The file holds one line per persona and expert, as a reader expects, up to `MOST_LINES`; beyond that
a repeated row is written as a reference to the first persona that has it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymerge import storage
from raymerge.errors import RoutingError, did_you_mean
from raymerge.routing.lines import Row, Rows, from_lines, read_lines, to_lines

MOST_LINES = 2_000_000


@dataclass(frozen=True)
class MergeGroup:
    """Personas with one and the same row, which needs merging once.

    experts: (name, weight), sorted by name; none for the base, whose adapter is called `base`.
    """

    adapter: str
    personas: tuple[str, ...]
    experts: tuple[tuple[str, float], ...]

    @property
    def single(self) -> str | None:
        """The expert that is this row as it stands: the only contributor, at weight 1. Nothing is to be merged."""
        return self.experts[0][0] if len(self.experts) == 1 and self.experts[0][1] == 1.0 else None


@dataclass(frozen=True, eq=False)
class RoutingTable:
    """A validated routing table.

    personas: all, sorted, also those with an empty row. experts: names that row indices mean, sorted. rows: the
    distinct rows. row_of: int32 (personas,), the row of each persona. clusters: persona -> label, where there are any;
    it is no part of the file.
    """

    personas: tuple[str, ...]
    experts: tuple[str, ...]
    rows: tuple[Row, ...]
    row_of: NDArray[np.int32]
    clusters: Mapping[str, str] | None = None

    @classmethod
    def from_rows(
        cls,
        personas: Iterable[str],
        rows: Iterable[tuple[str, str, float]],
        *,
        adapters: Mapping[str, str] | None = None,
    ) -> RoutingTable:
        """A table from (persona, expert, weight) in any order; personas without any get the base.

        adapters: persona -> name of its merged adapter, where that is not the first persona with its row. Weights of 0
        are left out. Raises RoutingError for a persona not in `personas`, a persona or pair given twice, a weight that
        is not finite, a row whose weights sum to 0 or less.
        """
        who, experts, weights = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
        lines = pa.table(
            {
                "persona": pa.array(who, pa.string()),
                "expert": pa.array(experts, pa.string()),
                "weight": pa.array(np.array(weights, dtype=np.float64)),
            }
        )
        names = unique_names(personas, "persona")
        return cls.build(names, from_lines(names, lines, adapters or {}, "routing table"))

    @classmethod
    def build(cls, personas: Sequence[str], rows: Rows, where: str = "routing table") -> RoutingTable:
        """A table from its parts; personas sorted. Raises RoutingError for weights that cannot be."""
        for number, row in enumerate(rows.rows):
            bad = ~np.isfinite(row.weights)
            if not len(row.weights) or (not bad.any() and row.weights.sum() > 0):
                continue
            who = personas[int(np.flatnonzero(rows.row_of == number)[0])]
            if bad.any():
                expert, value = rows.experts[row.experts[bad][0]], row.weights[bad][0]
                raise RoutingError(f"{where}: the weight of {expert} for {who} is {value}.\nExpected a finite number.")
            raise RoutingError(
                f"{where}: the weights for {who} sum to {row.weights.sum():.6g}.\nExpected a sum above 0: single "
                "weights may be negative, but a row that takes away more than it gives turns its experts around."
            )
        named = Counter(row.adapter for row in rows.rows if row.adapter and len(row.experts))
        for name, count in named.items():
            if count > 1:
                raise RoutingError(f"{where}: two different rows are called {name!r}.\nExpected one row for a name.")
        return cls(tuple(personas), *_used(rows))

    def with_base(self, personas: Iterable[str]) -> RoutingTable:
        """The same with more personas, who get the base. Raises RoutingError for one who is there already."""
        names = unique_names([*self.personas, *personas], "persona")
        nothing = Row(np.zeros(0, dtype=np.int32), np.zeros(0))
        row_of = [self.row_of[self._position[name]] if name in self._position else len(self.rows) for name in names]
        return RoutingTable(names, self.experts, (*self.rows, nothing), np.array(row_of, dtype=np.int32), self.clusters)

    def apart(self, labels: Mapping[str, str]) -> RoutingTable:
        """The same with a row for each label by itself where personas of several share one.

        labels: persona -> label, for some; those without share a row as before. A row that the strategy named is then
        called `all_LABEL`, any other as its first persona.
        """
        rows, row_of = list(self.rows), self.row_of.copy()
        for group in self._groups:
            members: dict[str, list[int]] = {}
            for name in group.personas:
                members.setdefault(labels.get(name, ""), []).append(self._position[name])
            if not group.experts or len(members) < 2:
                continue
            for label, numbers in sorted(members.items()):
                row = self.rows[int(row_of[numbers[0]])]
                own = self.personas[numbers[0]] if row.adapter is None else f"{row.adapter}_{label}"
                rows.append(replace(row, adapter=own if label else row.adapter))
                row_of[numbers] = len(rows) - 1
        used, numbers_of = np.unique(row_of, return_inverse=True)
        kept = Rows(self.experts, tuple(rows[i] for i in used), numbers_of.astype(np.int32))
        return replace(RoutingTable.build(self.personas, kept), clusters=self.clusters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutingTable) and bool(self.to_arrow().equals(other.to_arrow()))

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.personas)}

    def row(self, persona: str) -> dict[str, float]:
        """A persona's contributors: expert -> weight, sorted by name; empty for the base.

        Raises RoutingError for an unknown persona.
        """
        if persona not in self._position:
            hint = did_you_mean(persona, self.personas)
            raise RoutingError(f"routing table: there is no persona {persona!r}.{hint}")
        row = self.rows[int(self.row_of[self._position[persona]])]
        return {self.experts[i]: float(w) for i, w in zip(row.experts, row.weights, strict=True)}

    @cached_property
    def num_rows(self) -> int:
        """Number of (persona, expert) pairs with a weight."""
        sizes = np.array([len(row.experts) for row in self.rows], dtype=np.int64)
        return int(sizes[self.row_of].sum()) if len(self.personas) else 0

    @cached_property
    def _groups(self) -> tuple[MergeGroup, ...]:
        owner: dict[tuple[str | None, bytes, bytes], int] = {}
        same = []
        for i, row in enumerate(self.rows):  # weights that agree to 12 digits are the same row, if called the same
            name = row.adapter if len(row.experts) else None
            same.append(owner.setdefault((name, row.experts.tobytes(), np.round(row.weights, 12).tobytes()), i))
        members: dict[int, list[str]] = {}
        for name, index in zip(self.personas, self.row_of, strict=True):
            members.setdefault(same[index], []).append(name)
        groups = []
        for first, names in members.items():
            row = self.rows[first]
            experts = tuple((self.experts[i], float(w)) for i, w in zip(row.experts, row.weights, strict=True))
            groups.append(MergeGroup((row.adapter or names[0]) if experts else "base", tuple(names), experts))
        return tuple(sorted(groups, key=lambda group: group.adapter))

    def groups(self) -> list[MergeGroup]:
        """Equal rows, merged once: sorted by adapter name. Personas that get the base form the group `base`."""
        return list(self._groups)

    def assignments(self) -> pa.Table:
        """Columns persona, adapter (string), sorted by persona; a null adapter is the base."""
        adapter = {name: group.adapter for group in self._groups if group.experts for name in group.personas}
        values = [adapter.get(name) for name in self.personas]
        return pa.table({"persona": pa.array(self.personas, pa.string()), "adapter": pa.array(values, pa.string())})

    def to_arrow(self, most_lines: int = MOST_LINES) -> pa.Table:
        """The table as it is written: columns of `lines.SCHEMA`."""
        return to_lines(self.personas, Rows(self.experts, self.rows, self.row_of), most_lines)

    def to_bytes(self, most_lines: int = MOST_LINES) -> bytes:
        """The table as a parquet file; equal tables give equal bytes."""
        return storage.encode_parquet(self.to_arrow(most_lines))

    def write(self, location: str) -> None:
        """Write the parquet file, atomically. Raises StorageError."""
        storage.write_bytes(location, self.to_bytes())

    @classmethod
    def read(cls, location: str) -> RoutingTable:
        """Read a parquet file with at least persona, expert and weight. Raises RoutingError, StorageError."""
        personas, rows = read_lines(storage.read_parquet(location), location)
        return cls.build(personas, rows, location)

    def info(
        self,
        *,
        strategy: str,
        parameters: Mapping[str, Any],
        notes: Sequence[str] = (),
        clusters: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The same for people: JSON-able, figures to six digits, each persona's contributors from the heaviest down.

        clusters: persona -> label, shown beside each persona. Rows that a strategy makes for a whole group are listed
        once under `shared`, by their adapter's name.
        """
        adapter = dict(zip(*(column.to_pylist() for column in self.assignments().columns), strict=True))
        shared = {row.adapter: self._explain(row) for row in self.rows if row.adapter}
        people: dict[str, Any] = {}
        for name, index in zip(self.personas, self.row_of, strict=True):
            people[name] = {"adapter": adapter[name]}
            if clusters is not None and name in clusters:
                people[name]["cluster"] = clusters[name]
            if not self.rows[index].adapter:
                people[name]["experts"] = self._explain(self.rows[index])
        value = {"strategy": strategy, "parameters": dict(parameters), "notes": list(notes), "personas": people}
        return value | ({"shared": shared} if shared else {})

    def _explain(self, row: Row) -> list[dict[str, Any]]:
        lines = []
        for i in np.lexsort((row.experts, -row.weights)):
            line: dict[str, Any] = {"expert": self.experts[row.experts[i]], "weight": round(float(row.weights[i]), 6)}
            if row.similarities is not None and not np.isnan(row.similarities[i]):
                line["similarity"] = round(float(row.similarities[i]), 6)
            lines.append(line)
        return lines


def _used(rows: Rows) -> tuple[tuple[str, ...], tuple[Row, ...], NDArray[np.int32]]:
    """The rows with no other experts than those that contribute somewhere."""
    there = np.zeros(len(rows.experts), dtype=np.bool_)
    for row in rows.rows:
        there[row.experts] = True
    number = (np.cumsum(there) - 1).astype(np.int32)
    kept = tuple(replace(row, experts=number[row.experts]) for row in rows.rows)
    return tuple(np.array(rows.experts, dtype=object)[there]), kept, rows.row_of


def unique_names(names: Iterable[str], what: str) -> tuple[str, ...]:
    """Names sorted. Raises RoutingError if one is given twice."""
    ordered = sorted(names)
    for before, after in itertools.pairwise(ordered):
        if before == after:
            raise RoutingError(f"routing: the {what} {after!r} is given twice.\nExpected each name once.")
    return tuple(ordered)
