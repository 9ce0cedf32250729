"""The columns of a file under our names and in our types: by Arrow for a whole file, by Python for a row at fault.

Names of personas may be numbers. Times may be numbers, ISO texts or timestamps; a time without a zone is UTC.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raymerge.config import PersonaSource, SplitNames
from raymerge.errors import PersonaError
from raymerge.personas.chats import parse_chat, split_chats
from raymerge.personas.examples import CHAT, TEXT, name_fault

MOMENT = pa.timestamp("us", "UTC")
CHATS = ("messages", "conversations", "conversation", "chat")  # what a column of chats is usually called
MADE_OF_CHATS = ("prompt", "response", "turns")


def wanted_columns(source: PersonaSource) -> dict[str, str]:
    """Columns to read: our name (persona, prompt, response or messages, split or time) and that of the file."""
    if source.messages is not None:
        columns = {"persona": source.persona, "messages": source.messages}
    else:
        columns = {"persona": source.persona, "prompt": source.prompt, "response": source.response}
    if isinstance(source.split, SplitNames):
        columns["split"] = source.split.column
    elif source.split.column is not None:
        columns["time"] = source.split.column
    return columns


def clean_table(raw: pa.Table, columns: Mapping[str, str], meanings: Mapping[str, str]) -> pa.Table | None:
    """A file's table with columns persona, prompt, response, turns, and split or time; None where a row is at fault, or
    needs a look of its own.

    meanings: what each value of the split column means.
    """
    found: dict[str, Any] = {}
    for ours, theirs in columns.items():
        column = raw[theirs]
        if ours == "messages":
            chats = split_chats(column)
            if chats is None:
                return None
            found |= chats
            continue
        made = _CLEAN[ours](column)
        if made is None or made.null_count:
            return None
        found[ours] = made
    if "turns" not in found:
        offsets = pa.array([0] * (len(raw) + 1), pa.int32())
        found["turns"] = pa.ListArray.from_arrays(offsets, pa.array([], CHAT.value_type))
    if "split" in found:
        found["split"] = _meant(found["split"], meanings)
    if found.get("split", 0) is None or any(name_fault(name) for name in found["persona"].unique().to_pylist()):
        return None
    return pa.table(found)


def table_of(rows: Iterable[Mapping[str, Any]], time: bool) -> pa.Table:
    """The table of rows that `checked_row` made. Raises PersonaError where dates and numbers are mixed."""
    found = list(rows)
    kinds = {isinstance(row["time"], datetime): row["where"] for row in found} if time else {}
    if len(kinds) > 1:
        raise PersonaError(f"{kinds[False]}: its time is a number, that of {kinds[True]} is a date.\nGive one form.")
    names = [name for name in (found[0] if found else ()) if name != "where"]
    types = {"turns": CHAT, "time": MOMENT if True in kinds else None}
    return pa.table({n: pa.array([row[n] for row in found], types.get(n, TEXT)) for n in names})


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    column = _plain(column)
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return column.cast(TEXT) if is_text else None


def _names(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    column = _plain(column)
    if pa.types.is_floating(column.type):  # whole numbers beside a missing one are read as floats
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid:
            return None
    return column.cast(TEXT) if pa.types.is_integer(column.type) else _texts(column)


def _times(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    column = _plain(column)
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return column.cast(pa.timestamp("us", kind.tz if pa.types.is_timestamp(kind) else None), safe=False).cast(
            MOMENT
        )
    if pa.types.is_integer(kind):
        return column
    if pa.types.is_floating(kind):
        return column if not pc.any(pc.invert(pc.is_finite(column))).as_py() else None
    texts = _texts(column)
    if texts is None or texts.null_count:
        return None
    try:
        times = [_time(text) for text in texts.to_pylist()]
        return pa.chunked_array([pa.array(times, MOMENT if times and isinstance(times[0], datetime) else None)])
    except (ValueError, TypeError, OverflowError, pa.ArrowInvalid):  # a row is at fault, or dates and numbers are mixed
        return None


_CLEAN = {"persona": _names, "prompt": _texts, "response": _texts, "split": _texts, "time": _times}


def _meant(column: pa.ChunkedArray, meanings: Mapping[str, str]) -> pa.ChunkedArray | None:
    values = column.unique().to_pylist()
    if not set(values) <= set(meanings):
        return None
    if all(meanings[value] == value for value in values):
        return column
    encoded = column.combine_chunks().dictionary_encode()
    meant = pa.array([meanings[value] for value in encoded.dictionary.to_pylist()], TEXT)
    return pa.chunked_array([meant.take(encoded.indices)])


def _time(value: Any) -> datetime | float | int:
    """A moment or a number. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().isdecimal() else float(value)
        except ValueError:
            value = datetime.fromisoformat(value.strip())
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value if abs(value) < 2**63 else float(value)
    raise ValueError(f"{value!r} is no time")


def _name(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else repr(value)


def checked_row(
    row: Mapping[str, Any], columns: Mapping[str, str], meanings: Mapping[str, str], where: str
) -> dict[str, Any]:
    """One row as `clean_table` has it, and `where`. Raises PersonaError with what is wrong with it."""
    found: dict[str, Any] = {}
    for ours, theirs in columns.items():
        value = row.get(theirs)
        if value is None:
            raise PersonaError(absent(where, theirs, [str(key) for key in row if row[key] is not None], columns))
        if ours == "messages":
            try:
                prompt, response, turns = parse_chat(value)
            except ValueError as error:
                raise PersonaError(f"{where}: {theirs} {error}.") from error
            chat = [{"role": turn.role, "content": turn.content} for turn in turns]
            found |= dict(zip(MADE_OF_CHATS, (prompt, response, chat), strict=True))
        elif ours == "time":
            found[ours] = _checked_time(value, theirs, where)
        else:
            found[ours] = _checked_text(ours, value, theirs, where)
    if "split" in found and found["split"] not in meanings:
        raise PersonaError(_unknown_split(found["split"], meanings, where))
    fault = name_fault(found["persona"])
    if fault:
        raise PersonaError(f"{where}: persona {found['persona']!r} {fault}.")
    split = {"split": meanings[found["split"]]} if "split" in found else {}
    return {"turns": [], **found, **split, "where": where}


def _checked_text(ours: str, value: Any, theirs: str, where: str) -> str:
    text = _name(value) if ours == "persona" else value
    if not isinstance(text, str):
        raise PersonaError(f"{where}: {theirs} is not text; found {value!r}.")
    return text


def _checked_time(value: Any, theirs: str, where: str) -> datetime | float | int:
    try:
        return _time(value)
    except (ValueError, OverflowError) as error:
        raise PersonaError(
            f"{where}: {theirs} cannot be read as a time; found {value!r}.\n"
            "Expected a number, or a date such as 2024-05-31T18:00:00Z."
        ) from error


def _unknown_split(value: str, meanings: Mapping[str, str], where: str) -> str:
    return (
        f"{where}: unknown split {value!r}.\nAllowed: {', '.join(meanings)}.\n"
        f"Other names are mapped in the project file, such as personas: {{path: .., split: {{validation: [{value}]}}}}."
    )


def absent(where: str, column: str, there: Sequence[str], columns: Mapping[str, str], shown: str | None = None) -> str:
    """The text that says a column is not there, which ones are, and how others are named."""
    others = [name for name in there if name not in columns.values()]
    chats = [name for name in others if name in CHATS and column in (columns.get("prompt"), columns.get("response"))]
    close = chats or difflib.get_close_matches(column, others, n=1)
    hint = f" It has {close[0]!r}: is that meant?" if close else ""
    mapping = f"messages: {chats[0]}" if chats else "prompt: question, split: {by: random}"
    return (
        f"{where}: has no {shown or column}.{hint}\n"
        f"Expected {', '.join(columns.values())}; found {', '.join(there) or 'none'}.\n"
        f"Other columns are named in the project file, such as personas: {{path: .., {mapping}}}."
    )
