"""Examples by persona: who said what to which prompt, and which part of it may be trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raymerge import storage
from raymerge.config import PersonaSource
from raymerge.errors import PersonaError, did_you_mean
from raymerge.personas.prompts import Turn

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
NOWHERE = PersonaSource(path="")  # of examples made in memory
TEXT = pa.large_string()
CHAT = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))
SCHEMA = pa.schema([("persona", TEXT), ("prompt", TEXT), ("response", TEXT), ("split", TEXT), ("turns", CHAT)])


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
        pair: list[Any] = [self.prompt, self.response]
        return [*pair, [[turn.role, turn.content] for turn in self.turns]] if self.turns else pair


@dataclass(frozen=True, eq=False)
class Personas:
    """All examples, sorted by persona; within a persona they keep the order of the file.

    table: columns persona, prompt, response, split (large_string) and turns (lists of role and content, mostly empty),
    without nulls. source: where they were read, with an empty path if they were made in memory. skipped: examples
    without text that were left out. Two of them are equal if their examples are.
    """

    table: pa.Table
    source: PersonaSource = NOWHERE
    skipped: int = 0

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
        columns = [self.table[name].slice(start, end - start).to_pylist() for name in SCHEMA.names]
        return tuple(
            Example(name, prompt, response, part, tuple(Turn(**turn) for turn in turns))
            for name, prompt, response, part, turns in zip(*columns, strict=True)
            if split is None or part == split
        )

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
        """Content digest of all examples: the same whatever the file's form and whatever its columns are called."""
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
    rows = []
    for number, example in enumerate(examples, start=1):
        _check(example, f"example {number}")
        turns = [{"role": turn.role, "content": turn.content} for turn in example.turns]
        rows.append({**{name: getattr(example, name) for name in SCHEMA.names}, "turns": turns})
    return sorted_personas(pa.Table.from_pylist(rows, schema=SCHEMA))


def _check(example: Example, where: str) -> None:
    fault = name_fault(example.persona)
    if fault:
        raise PersonaError(f"{where}: persona {example.persona!r} {fault}.")
    if example.split not in SPLITS:
        raise PersonaError(f"{where}: unknown split {example.split!r}.\nAllowed: {', '.join(SPLITS)}.")
    for column in ("prompt", "response"):
        if not getattr(example, column).strip():
            raise PersonaError(f"{where}: its {column} is empty.")


def sorted_personas(table: pa.Table, source: PersonaSource = NOWHERE, skipped: int = 0) -> Personas:
    """Personas of checked rows in the order of their file. table: as SCHEMA."""
    order = np.lexsort((np.arange(len(table)), ranks(table["persona"])))
    return Personas(table.take(pa.array(order)).combine_chunks(), source, skipped)


def ranks(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """The place of each value among the sorted different ones."""
    if not len(column):
        return np.zeros(0, np.int64)
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    place = {value: rank for rank, value in enumerate(sorted(values))}
    order = np.array([place[value] for value in values], dtype=np.int64)
    indices: NDArray[np.int32] = encoded.indices.to_numpy(zero_copy_only=False)
    return order[indices]


def name_fault(name: str) -> str | None:
    """Why a persona's name cannot be the name of its adapter's folder; None if it can."""
    if not name or name != name.strip():
        return "is empty or begins or ends with a space"
    if any(c in name for c in "/\\\0\n"):
        return "holds a slash or a line break, and adapters live in folders of that name"
    if name.startswith("."):
        return "begins with a dot, and adapters live in folders of that name"
    if name in ("all", "base", "unified") or name.startswith("cluster_"):
        return "is taken by the adapters of everyone or of a cluster"
    return None
