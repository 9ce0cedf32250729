"""All examples of a source: its files read, empty ones found, splits made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymerge.config import PersonaSource, Project, SplitNames, SplitShares
from raymerge.errors import PersonaError
from raymerge.personas.chats import blanks
from raymerge.personas.columns import wanted_columns
from raymerge.personas.examples import SCHEMA, SPLITS, TEXT, Personas, ranks, sorted_personas
from raymerge.personas.files import Shard, find_files, read_shard
from raymerge.personas.splits import hashed_shares, last_shares
from raymerge.storage import FileInfo


def source_of(project: Project) -> PersonaSource | None:
    """The examples that a project names, with an absolute path; None where it has none."""
    source = project.personas
    return None if source is None else source.model_copy(update={"path": project.path(source.path)})


def read_personas(source: PersonaSource | str) -> Personas:
    """Examples of .jsonl or .parquet files, local or at a URI; a str is a path with columns of our own names.

    They are kept in memory while the files stay as they are: every item of a worker reads the same ones.
    Raises PersonaError with file and line for a line that is no JSON object, a missing or non-text value, an unknown
    split, a chat without an answer, a time that is none, an empty prompt or answer, a name that cannot be a folder's;
    and for files without examples. StorageError if they cannot be read.
    """
    source = PersonaSource(path=source) if isinstance(source, str) else source
    return _read(source, find_files(source.path))


@lru_cache(maxsize=2)
def _read(source: PersonaSource, files: tuple[FileInfo, ...]) -> Personas:
    columns = wanted_columns(source)
    meanings = source.split.meanings() if isinstance(source.split, SplitNames) else {}
    shards = [read_shard(file.path, columns, meanings) for file in files]
    filled = [shard.table for shard in shards if len(shard.table)]
    if not filled:
        raise PersonaError(f"{source.path}: holds no examples.\nExpected rows with {', '.join(columns.values())}.")
    try:
        table = pa.concat_tables(filled, promote_options="permissive").combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise PersonaError(
            f"{source.path}: {columns['time']} is a date in one file and a number in another."
        ) from error
    empty = blanks(table["prompt"]) | blanks(table["response"])
    skipped = int(empty.sum())
    if skipped and not source.skip_empty:
        raise PersonaError(_refuse_empty(table, shards, int(np.argmax(empty)), skipped, source))
    if skipped:
        table = table.filter(pa.array(~empty))
    if not len(table):
        raise PersonaError(f"{source.path}: holds no examples: all {skipped:,} are empty.")
    if isinstance(source.split, SplitShares):
        table = _with_splits(table, source.split, source.path)
    return sorted_personas(table.select(SCHEMA.names).cast(SCHEMA), source, skipped)


def _with_splits(table: pa.Table, shares: SplitShares, path: str) -> pa.Table:
    if shares.by == "random":
        places = hashed_shares(table["persona"].to_pylist(), table["prompt"].to_pylist(), shares)
    else:
        times = table["time"].to_numpy() if shares.by == "time" else None
        pairs = _codes(table["prompt"]) * len(table) + _codes(table["response"])
        places = last_shares(ranks(table["persona"]), times, shares.validation, shares.test, pairs)
    if not (places == 0).any():
        raise PersonaError(
            f"{path}: the shares of its splits leave nobody with training rows: {len(table)} rows, validation "
            f"{shares.validation:g}, test {shares.test:g}.\nLower them, or give another seed or `by: order`."
        )
    return table.append_column("split", pa.array(SPLITS, TEXT).take(pa.array(places)))


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """A number below the number of rows for each different text."""
    encoded = column.combine_chunks().dictionary_encode()
    codes: NDArray[np.int64] = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes


def _refuse_empty(table: pa.Table, shards: Sequence[Shard], row: int, count: int, source: PersonaSource) -> str:
    what = "prompt" if blanks(table["prompt"].slice(row, 1))[0] else "response"
    left = row
    for shard in shards:
        if left < len(shard.table):
            where = shard.where(left)
            break
        left -= len(shard.table)
    answers = pc.sum(pa.array(blanks(table["response"]))).as_py()
    return (
        f"{where}: its {what} is empty.\n{count:,} of {len(table):,} examples have an empty prompt or response "
        f"({answers:,} an empty response).\n"
        f"Remove them, or leave them out by personas: {{path: {source.path}, skip_empty: true}} in the project file."
    )
