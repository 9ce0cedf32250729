"""Examples by persona: who said what to which prompt, and which part of it may be trained on.

A file of personas is JSON lines or parquet with the columns persona, prompt, response and split; other columns are
ignored. Everything is checked at reading, so that a bad line is named before any work starts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet

from raymerge import storage
from raymerge.errors import PersonaError, ProjectError, did_you_mean
from raymerge.personas.sources import PersonaSource, source_of

__all__ = [
    "SPLITS",
    "Example",
    "PersonaSource",
    "Personas",
    "Split",
    "Turn",
    "from_examples",
    "plain_text",
    "read_personas",
    "render_prompt",
    "source_of",
]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
COLUMNS = ("persona", "prompt", "response", "split")
NOWHERE = PersonaSource(path="")  # of examples made in memory
SCHEMA = pa.schema([(column, pa.large_string()) for column in COLUMNS])


@dataclass(frozen=True)
class Turn:
    """One message of a chat. role: system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One prompt with the persona's own answer to it.

    turns: the chat before the answer where it is more than one turn of the user; then `prompt` is its plain text.
    """

    persona: str
    prompt: str
    response: str
    split: Split
    turns: tuple[Turn, ...] = ()

    @property
    def asked(self) -> str | tuple[Turn, ...]:
        """What `render_prompt` takes: the turns where there are several, else the prompt."""
        return self.turns or self.prompt

    @property
    def content(self) -> list[Any]:
        """Prompt and response as a value for digests; the turns too where there are several."""
        return [self.prompt, self.response, *([[t.role, t.content] for t in self.turns],) * bool(self.turns)]


@dataclass(frozen=True, eq=False)
class Personas:
    """All examples, sorted by persona; within a persona they keep the order of the file.

    table: columns persona, prompt, response, split (large_string), without nulls. source: where they were read,
    with an empty path if they were made in memory. Two of them are equal if their examples are.
    """

    table: pa.Table
    source: PersonaSource = NOWHERE

    @property
    def location(self) -> str:
        """Where they were read, or "" if they were made in memory."""
        return self.source.path

    @cached_property
    def _ranges(self) -> dict[str, tuple[int, int]]:
        runs = pc.run_end_encode(self.table["persona"].combine_chunks()) if len(self.table) else None
        if runs is None:
            return {}
        ends = [0, *runs.run_ends.to_pylist()]
        return {n: (ends[i], ends[i + 1]) for i, n in enumerate(runs.values.to_pylist())}

    @property
    def names(self) -> tuple[str, ...]:
        """Personas with at least one example, sorted."""
        return tuple(self._ranges)

    def examples(self, persona: str, split: Split | None = None) -> tuple[Example, ...]:
        """A persona's examples, of one split or of all. Raises PersonaError for an unknown persona."""
        if persona not in self._ranges:
            hint = did_you_mean(persona, self.names)
            raise PersonaError(f"{self.location or 'personas'}: there is no persona {persona!r}.{hint}")
        start, end = self._ranges[persona]
        rows = self.table.slice(start, end - start).to_pylist()
        return tuple(Example(**row) for row in rows if split is None or row["split"] == split)

    def counts(self) -> dict[str, dict[Split, int]]:
        """Number of examples by persona and split; a split without examples counts 0."""
        counted = self.table.group_by(["persona", "split"]).aggregate([([], "count_all")]).to_pylist()
        found = {(row["persona"], row["split"]): row["count_all"] for row in counted}
        return {name: {split: found.get((name, split), 0) for split in SPLITS} for name in self.names}

    def missing(self, split: Split) -> tuple[str, ...]:
        """Personas without an example of a split, sorted."""
        there = set(self.table.filter(pc.equal(self.table["split"], split))["persona"].unique().to_pylist())
        return tuple(name for name in self.names if name not in there)

    @cached_property
    def digest(self) -> str:
        """Content digest of all examples: the same for JSON lines and parquet."""
        parts = [self.digest_of(name) for name in self.names]
        return storage.digest_value([list(self.names), parts])

    def digest_of(self, persona: str, split: Split | None = None) -> str:
        """Content digest of one persona's examples, which no other persona's change."""
        return storage.digest_value([[*e.content, e.split] for e in self.examples(persona, split)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Personas) and bool(self.table.equals(other.table))

    def __hash__(self) -> int:
        return hash(self.digest)


def from_examples(examples: Iterable[Example]) -> Personas:
    """Personas of examples in memory. Raises PersonaError for what a file would be refused for."""
    rows = [{column: getattr(e, column) for column in COLUMNS} for e in examples]
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"example {number}")
    return _sorted(pa.Table.from_pylist(rows, schema=SCHEMA), NOWHERE)


def read_personas(source: PersonaSource | str) -> Personas:
    """Examples of a .jsonl or .parquet file, local or at a URI.

    Raises PersonaError with file and line for a line that is no JSON object, a missing or non-text value, an unknown
    split, a name that cannot be a folder's; and for a file without examples. StorageError if it cannot be read.
    """
    source = PersonaSource(path=source) if isinstance(source, str) else source
    location = source.path
    if not location.endswith((".jsonl", ".parquet")):
        raise PersonaError(f"{location}: is neither .jsonl nor .parquet.")
    if not storage.exists(location):
        raise PersonaError(f"{location}: there is no such file of personas.")
    path = storage.open_local(location)
    table = _read_parquet(path, location) if location.endswith(".parquet") else _read_lines(path, location)
    if not len(table):
        raise PersonaError(f"{location}: holds no examples.\nExpected rows with {', '.join(COLUMNS)}.")
    return _sorted(table, source)


def _sorted(table: pa.Table, source: PersonaSource) -> Personas:
    order = np.lexsort((np.arange(len(table)), _codes(table["persona"])))
    return Personas(table.take(pa.array(order)).combine_chunks(), source)


def _codes(column: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    values = column.unique().to_pylist()
    ranks = {value: rank for rank, value in enumerate(sorted(values))}
    encoded = column.combine_chunks().dictionary_encode()
    order = np.array([ranks[v] for v in encoded.dictionary.to_pylist()], dtype=np.int64)
    return order[encoded.indices.to_numpy(zero_copy_only=False)] if len(column) else np.zeros(0, np.int64)


def _read_lines(path: Path, location: str) -> pa.Table:
    """Arrow's reader for the whole file; where it or a check fails, line by line to name the line."""
    options = pyarrow.json.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore")
    try:
        table = pyarrow.json.read_json(path, parse_options=options).select(COLUMNS)
        if _is_clean(table):
            return table
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError):
        pass  # the reader below says why, or reads what Arrow does not
    return pa.Table.from_pylist(list(_checked_lines(path, location)), schema=SCHEMA)


def _checked_lines(path: Path, location: str) -> Iterator[dict[str, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{location}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise PersonaError(f"{where}: is not a line of JSON.\n{error}") from error
            if not isinstance(row, dict):
                raise PersonaError(f"{where}: is not a JSON object.\nExpected {', '.join(COLUMNS)}.")
            _check_row(row, where)
            yield {column: row[column] for column in COLUMNS}


def _read_parquet(path: Path, location: str) -> pa.Table:
    try:
        there = pyarrow.parquet.read_schema(path).names
        missing = [column for column in COLUMNS if column not in there]
        if missing:
            raise PersonaError(f"{location}: has no column {missing[0]}.\nFound: {', '.join(there)}.")
        table = pyarrow.parquet.read_table(path, columns=list(COLUMNS))
    except (pa.ArrowInvalid, OSError) as error:
        raise PersonaError(f"{location}: is not a parquet file.\n{error}") from error
    try:
        cast = table.cast(SCHEMA)
        clean = all(_is_text(table.schema.field(column).type) for column in COLUMNS) and _is_clean(cast)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        clean = False
    if not clean:
        for number, row in enumerate(table.to_pylist(), start=1):
            _check_row(row, f"{location}: row {number}")
    return cast


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_clean(table: pa.Table) -> bool:
    if any(table[column].null_count for column in COLUMNS):
        return False
    if not set(table["split"].unique().to_pylist()) <= set(SPLITS):
        return False
    return all(_name_fault(name) is None for name in table["persona"].unique().to_pylist())


def _check_row(row: Mapping[str, Any], where: str) -> None:
    for column in COLUMNS:
        if row.get(column) is None:
            close = difflib.get_close_matches(column, [str(k) for k in row if k not in COLUMNS], n=1)
            hint = f" It has {close[0]!r}: is that meant?" if close else ""
            raise PersonaError(f"{where}: has no {column}.{hint}\nExpected {', '.join(COLUMNS)}.")
        if not isinstance(row[column], str):
            raise PersonaError(f"{where}: {column} is not text; found {row[column]!r}.")
    if row["split"] not in SPLITS:
        raise PersonaError(f"{where}: unknown split {row['split']!r}.\nAllowed: {', '.join(SPLITS)}.")
    fault = _name_fault(row["persona"])
    if fault:
        raise PersonaError(f"{where}: persona {row['persona']!r} {fault}, and adapters live in folders of that name.")


def _name_fault(name: str) -> str | None:
    """Why a persona's name cannot be the name of its adapter's folder; None if it can."""
    if not name or name != name.strip():
        return "is empty or begins or ends with a space"
    if any(c in name for c in "/\\\0\n"):
        return "holds a slash or a line break"
    if name.startswith("."):
        return "begins with a dot"
    if name in ("all", "base", "unified") or name.startswith("cluster_"):
        return "is taken by the adapters of everyone or of a cluster"
    return None


def plain_text(turns: Sequence[Turn]) -> str:
    """Turns as text, for a base without a chat template: `role: content`, one below the other."""
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that renders a chat."""

    chat_template: Any

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """Render messages."""


def render_prompt(prompt: str | Sequence[Turn], prompt_format: str, tokenizer: ChatTokenizer | None = None) -> str:
    """The text that the model reads before it answers.

    prompt: a text, or the turns of a chat. prompt_format: a text with {prompt} in it, or `chat` for the tokenizer's own
    template with the opening of the answer. Raises ProjectError if the format has no {prompt}, or for `chat` where the
    tokenizer has no template.
    """
    if prompt_format == "chat":
        if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
            raise ProjectError(
                "prompt_format chat: the base model's tokenizer has no chat template.\n"
                'Give prompt_format as a text with {prompt} in it, such as "{prompt}\\n".'
            )
        turns = [Turn("user", prompt)] if isinstance(prompt, str) else prompt
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if "{prompt}" not in prompt_format:
        raise ProjectError(f"prompt_format {prompt_format!r}: has no {{prompt}}.\nExpected it there, or `chat`.")
    return prompt_format.replace(
        "{prompt}", prompt if isinstance(prompt, str) else plain_text(prompt)
    )  # not str.format: prompts and formats may hold braces
