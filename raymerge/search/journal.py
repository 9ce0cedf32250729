"""The journal of a search: what it is a search for, and then everything that happened, in order.

A line of JSON for each. The file is replaced whole by every event, so that it never ends in the middle of a line, on
object stores too.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from raymerge import storage
from raymerge.errors import ProjectError, StorageError

NAME = "journal.jsonl"
_MEANINGS = {
    "centred": "whether embeddings are centred",
    "inputs": "what scores depend on beside the recipe (base model, adapters, examples, generation)",
    "penalties": "search.space (penalties of offsets)",
    "rungs": "the numbers of personas that trials are scored on",
    "version": "the form of the journal",
}


class Journal:
    """Opens the journal in a folder, or begins one with what identifies the search.

    identity: by part, what must not change while a search goes on. restart: forget what is there; replaces: only
    where it is another search's. events: those of earlier runs. Raises ProjectError if the journal is another search's,
    StorageError if it cannot be read or written.
    """

    def __init__(
        self, folder: str, identity: Mapping[str, Any], *, restart: bool = False, replaces: bool = False
    ) -> None:
        self._location = storage.join(folder, NAME)
        self.events: list[dict[str, Any]] = []
        begun = _line(identity)
        goes_on = storage.exists(self._location) and not restart
        if goes_on:
            self._data = bytearray(storage.read_bytes(self._location))
            noted, *self.events = self._parsed()
            goes_on = not (replaces and _differing(noted, json.loads(begun)))
        if goes_on:
            self._compare(noted, json.loads(begun))
        else:
            self._data, self.events = bytearray(begun), []
            storage.write_bytes(self._location, bytes(self._data))

    def note(self, **event: Any) -> None:
        """Add an event; it is stored when this returns. Raises StorageError if it cannot be."""
        self._data += _line(event)
        storage.write_bytes(self._location, bytes(self._data))

    def _parsed(self) -> list[dict[str, Any]]:
        try:
            lines = [json.loads(line) for line in self._data.splitlines()]
            if not lines or not all(isinstance(line, dict) for line in lines):
                raise ValueError("Expected a JSON object on each line.")
        except ValueError as error:
            raise StorageError(
                f"{self._location}: is not the journal of a search.\n{error}\nBegin anew with `--restart`."
            ) from error
        return lines

    def _compare(self, noted: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        parts = _differing(noted, now)
        if parts:
            names = ", ".join(_MEANINGS.get(part, f"search.{part}") for part in parts)
            changes = [f"{part}: {_shown(noted.get(part))} -> {_shown(now.get(part))}" for part in parts]
            raise ProjectError(
                f"{self._location}: a search that differs from this one was begun here. It differs in {names}.\n"
                + "\n".join(changes)
                + "\nTake the change back to go on, or begin anew with `--restart`."
            )


def _differing(noted: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [part for part in (*now, *(noted.keys() - now.keys())) if noted.get(part) != now.get(part)]


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, default=str) + "\n").encode()


def _shown(value: Any) -> str:
    return "nothing" if value is None else textwrap.shorten(json.dumps(value, ensure_ascii=False), 160)
