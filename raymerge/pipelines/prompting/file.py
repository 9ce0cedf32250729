"""A file of prompts: text with one on each line, or JSON lines or parquet that may say more of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from raymerge import storage
from raymerge.errors import PersonaError, StorageError, unknown
from raymerge.personas import Split
from raymerge.personas.files import json_rows

COLUMNS = ("prompt", "response", "capability", "persona", "split")
ENDINGS = (".jsonl", ".parquet", ".txt")
_EXPECTED = "Expected prompt, and if known response (the reference) and capability or persona."


@dataclass(frozen=True)
class Prompt:
    """A prompt, the reference for its answer where there is one, and whose it is: an expert's or a task's name."""

    text: str
    reference: str | None = None
    capability: str | None = None


def read_prompts(location: str, wanted: Split = "test") -> tuple[tuple[Prompt, ...], int]:
    """The prompts of a .jsonl, .parquet or .txt file, in its order, and how many examples were left out.

    Where rows have a split, those of the one that is wanted alone are taken. Blank lines of text count for nothing.
    Raises PersonaError with file and line for an unknown column, a missing prompt, an empty response and a value that
    is no text, and for a file without prompts; StorageError if it cannot be read.
    """
    if not location.endswith(ENDINGS):
        raise PersonaError(f"{location}: is no file of prompts.\nExpected one that ends in {', '.join(ENDINGS)}.")
    if not storage.exists(location):
        raise PersonaError(f"{location}: there is no such file of prompts.")
    rows = list(_rows(location))
    taken = tuple(prompt for prompt, split in rows if split in (None, wanted))
    if not rows:
        raise PersonaError(f"{location}: holds no prompts.\n{_EXPECTED}")
    if not taken:
        raise PersonaError(
            f"{location}: holds no {wanted} examples among {len(rows)}.\nAdapters are compared on split {wanted}."
        )
    return taken, len(rows) - len(taken)


def _rows(location: str) -> Iterator[tuple[Prompt, str | None]]:
    """Prompts, each with its split."""
    if location.endswith(".parquet"):
        table = storage.read_parquet(location)
        _check_columns(dict.fromkeys(table.column_names), location)
        for number, row in enumerate(table.to_pylist(), 1):
            yield _prompt(row, f"{location}: row {number}")
        return
    if location.endswith(".txt"):
        yield from ((Prompt(line.strip()), None) for line in _lines(location) if line.strip())
        return
    for where, row in json_rows(_lines(location), location, _EXPECTED):
        _check_columns(row, where)
        yield _prompt(row, where)


def _lines(location: str) -> list[str]:
    try:
        return storage.read_bytes(location).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise StorageError(f"{location}: is not text in UTF-8.\n{error}") from error


def _check_columns(row: Mapping[str, Any], where: str) -> None:
    wrong = next((name for name in row if name not in COLUMNS), None)
    if wrong is not None:
        raise PersonaError(f"{where}: {unknown('column', wrong, COLUMNS)}")
    if "capability" in row and "persona" in row:
        raise PersonaError(f"{where}: has capability and persona, which say the same.\nKeep one of them.")


def _prompt(row: Mapping[str, Any], where: str) -> tuple[Prompt, str | None]:
    for column in COLUMNS:
        value = row.get(column)
        if value is None:
            continue
        if not isinstance(value, str):
            raise PersonaError(f"{where}: {column} is not text; found {value!r}.")
        if not value.strip() and column != "prompt":
            raise PersonaError(f"{where}: {column} is empty.\nLeave it out, or write null, where there is none.")
    if row.get("prompt") is None:
        raise PersonaError(f"{where}: has no prompt.\n{_EXPECTED}")
    split = row.get("split")
    if split is not None and split not in get_args(Split):
        raise PersonaError(f"{where}: {unknown('split', split, get_args(Split))}")
    return Prompt(row["prompt"], row.get("response"), row.get("capability") or row.get("persona")), split
