"""Files of examples: one, a folder of shards or a pattern, each read to a table of the same columns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from raymerge import storage
from raymerge.errors import PersonaError
from raymerge.personas.columns import absent, checked_row, clean_table, table_of
from raymerge.personas.examples import TEXT
from raymerge.storage import FileInfo

FORMS = (".jsonl", ".parquet")
_WILD = "*?["


def find_files(path: str) -> tuple[FileInfo, ...]:
    """The files of a path, with absolute locations, sorted: a file, all of a folder, or those of a pattern in which
    `*`, `?` and `[..]` stand for parts of one name. Raises PersonaError if there are none."""
    if any(c in path for c in _WILD) and not storage.exists(path):
        return _matching(path)
    if not storage.exists(path):
        raise PersonaError(f"{path}: there is no such file of personas.")
    if path.endswith(FORMS) and not os.path.isdir(path):
        return (_located(path, storage.file_info(path)),)
    if not storage.is_uri(path) and os.path.isfile(path):
        raise PersonaError(f"{path}: is neither .jsonl nor .parquet.")
    found = [file for file in storage.list_files(path) if file.path.endswith(FORMS)]
    if not found:
        raise PersonaError(f"{path}: holds no file of personas.\nExpected .jsonl or .parquet files.")
    return tuple(_located(storage.join(path, file.path), file) for file in found)


def _located(location: str, file: FileInfo) -> FileInfo:
    return FileInfo(location, file.size, file.mtime)


def _matching(pattern: str) -> tuple[FileInfo, ...]:
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in _WILD))
    root, names = "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else "."), parts[fixed:]
    found = [
        _located(storage.join(root, file.path), file)
        for file in storage.list_files(root)
        if file.path.endswith(FORMS) and _matches(file.path.split("/"), names)
    ]
    if not found:
        raise PersonaError(f"{pattern}: matches no file of personas.\nExpected .jsonl or .parquet files.")
    return tuple(found)


def _matches(parts: Sequence[str], names: Sequence[str]) -> bool:
    return len(parts) == len(names) and all(fnmatchcase(p, n) for p, n in zip(parts, names, strict=True))


@dataclass(frozen=True)
class Shard:
    """A file's rows. location: as the user knows it; path: the file on this machine."""

    location: str
    path: Path
    table: pa.Table

    def where(self, row: int) -> str:
        """The place of a row, counted from 0, for a message."""
        if self.location.endswith(".parquet"):
            return f"{self.location}: row {row + 1}"
        with open(self.path, "rb") as file:
            numbers = (number for number, line in enumerate(file, start=1) if line.strip())
            line = next((n for i, n in enumerate(numbers) if i == row), None)
        return f"{self.location}:{line}" if line else f"{self.location}: row {row + 1}"  # Arrow reads two on one line


def read_shard(location: str, columns: Mapping[str, str], meanings: Mapping[str, str]) -> Shard:
    """One file as `columns.clean_table` has it.

    Arrow reads the whole file; where it or a check fails, row by row to name the row. Raises PersonaError.
    """
    path = storage.open_local(location)
    parquet = location.endswith(".parquet")
    raw = _read_parquet(path, location, columns) if parquet else _read_lines(path, columns)
    table = clean_table(raw, columns, meanings) if raw is not None else None
    if table is None:
        rows = _parquet_rows(raw, location) if parquet else _json_rows(path, location, columns)
        table = table_of((checked_row(row, columns, meanings, where) for where, row in rows), "time" in columns)
    return Shard(location, path, table)


def _read_lines(path: Path, columns: Mapping[str, str]) -> pa.Table | None:
    """Arrow's reader with names as texts or else whole numbers, and times as texts or numbers: what is not asked for is
    not looked at."""
    message = pa.struct([(key, TEXT) for key in ("role", "content", "from", "value")])
    kinds = {"messages": [pa.list_(message)], "persona": [TEXT, pa.int64()], "time": [TEXT, pa.int64(), pa.float64()]}
    for chosen in product(*(kinds.get(ours, [TEXT]) for ours in columns)):
        schema = pa.schema(dict(zip(columns.values(), chosen, strict=True)))
        options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            return pyarrow.json.read_json(path, parse_options=options).select(list(schema.names))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError):
            continue  # the last resort reads line by line, and says why it cannot
    return None


def _json_rows(path: Path, location: str, columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        yield from json_rows(file, location, f"Expected {', '.join(columns.values())}.")


def json_rows(lines: Iterable[str | bytes], location: str, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of JSON lines, each with its place for a message; blank lines count only there. expected: what an object
    holds, as a sentence. Raises PersonaError with location and line for anything else."""
    for number, line in enumerate(lines, start=1):
        where = f"{location}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PersonaError(f"{where}: is not a line of JSON.\n{error}") from error
        if not isinstance(row, dict):
            raise PersonaError(f"{where}: is not a JSON object.\n{expected}")
        yield where, row


def _read_parquet(path: Path, location: str, columns: Mapping[str, str]) -> pa.Table:
    try:
        there = pyarrow.parquet.read_schema(path).names
        for column in columns.values():
            if column not in there:
                raise PersonaError(absent(location, column, there, columns, f"column {column}"))
        table = pyarrow.parquet.read_table(path, columns=list(dict.fromkeys(columns.values())))
    except (pa.ArrowInvalid, OSError) as error:
        raise PersonaError(f"{location}: is not a parquet file.\n{error}") from error
    time = columns.get("time")
    if time is not None and pa.types.is_timestamp(table.schema.field(time).type):  # Python knows no nanoseconds
        micro = pa.timestamp("us", table.schema.field(time).type.tz)
        table = table.set_column(table.column_names.index(time), time, table[time].cast(micro, safe=False))
    return table


def _parquet_rows(table: pa.Table, location: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{location}: row {number}", row
