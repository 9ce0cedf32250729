"""What a file of examples probably is: columns and splits under the names that are usual elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow.parquet

from raymerge import storage
from raymerge.errors import PersonaError
from raymerge.personas.columns import CHATS
from raymerge.personas.examples import SPLITS
from raymerge.personas.files import find_files

PERSONAS = ("persona", "persona_id", "user_id", "user", "username", "author", "author_id", "character", "speaker")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
RESPONSES = ("response", "output", "answer", "completion", "target", "reply")
TIMES = ("timestamp", "time", "created_at", "created_utc", "created", "date", "datetime")
SYNONYMS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev", "development", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
LOOKED_AT = 20  # lines of a file, whose keys are its columns


@dataclass(frozen=True)
class Recognised:
    """keys: of `personas` in a project file, without `path`; none where every column has our name. notes: what one
    would not expect."""

    keys: dict[str, Any]
    notes: tuple[str, ...] = ()


def recognise(location: str) -> Recognised | None:
    """How to read a file of examples; None where its columns are not known. Raises PersonaError, StorageError."""
    file = find_files(location)[0].path
    there = _columns(file)
    persona = _first(PERSONAS, there)
    prompt, response, chat = (_first(names, there) for names in (PROMPTS, RESPONSES, CHATS))
    if persona is None or not (chat or (prompt and response)):
        return None
    named = {"persona": persona}
    notes = []
    if prompt and response and (chat is None or (prompt, response) == ("prompt", "response")):
        named |= {"prompt": prompt, "response": response}
        if prompt == "instruction" and "input" in there:
            notes.append("column input, beside instruction, is not read: join them into one column if it matters")
    keys: dict[str, Any] = {ours: theirs for ours, theirs in named.items() if ours != theirs}
    if "prompt" not in named and chat:
        keys["messages"] = chat
    if "split" in there:
        meant, strange = _split_names(file)
        keys |= {"split": meant} if meant else {}
        notes += [f"split {strange[0]!r} is none that is known ({len(strange)} such)"] if strange else []
    else:
        keys["split"] = _shares(_first(TIMES, there))
        notes.append(f"no column split: made by {keys['split']['by']}")
    return Recognised(keys, tuple(notes))


def _first(names: Sequence[str], there: Sequence[str]) -> str | None:
    return next((name for name in names if name in there), None)


def _columns(file: str) -> list[str]:
    if file.endswith(".parquet"):
        return _parquet(file).schema_arrow.names  # type: ignore[no-any-return]
    return list(dict.fromkeys(key for row in islice(_rows(file), LOOKED_AT) for key in row))


def _parquet(file: str) -> Any:
    try:
        return pyarrow.parquet.ParquetFile(storage.open_local(file))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise PersonaError(f"{file}: is not a parquet file.\n{error}") from error


def _rows(file: str) -> Iterator[dict[str, Any]]:
    """The rows up to the first that is none."""
    with open(storage.open_local(file), "rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not isinstance(row, dict):
                return
            yield row


def _split_names(file: str) -> tuple[dict[str, list[str]], list[str]]:
    """Names of splits that are not ours but known, by what they mean; and those that are not known."""
    if file.endswith(".parquet"):
        values = _parquet(file).read(columns=["split"])["split"].unique().to_pylist()
    else:
        values = list(dict.fromkeys(str(row.get("split")) for row in _rows(file)))
    meant: dict[str, list[str]] = {}
    for value in sorted(str(value) for value in values):
        split = SYNONYMS.get(value.strip().lower())
        if split is not None and value != split:
            meant.setdefault(split, []).append(value)
    strange = sorted(str(value) for value in values if str(value).strip().lower() not in SYNONYMS)
    return {split: meant[split] for split in SPLITS if split in meant}, strange


def _shares(time: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {"by": "time", "column": time} if time else {"by": "random", "seed": 0}
    return {**made, "validation": 0.2, "test": 0.2}
