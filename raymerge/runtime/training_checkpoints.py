"""Checkpoints of a training item: two folders written in turn, so that one is whole whatever happens to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymerge import storage
from raymerge.errors import StorageError
from raymerge.manifest import is_complete, read_manifest, write_artefact

FOLDERS = ("checkpoint-0", "checkpoint-1")
STATE = "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A training as it was. number: counts the checkpoints of an item. note: what was recorded beside the state."""

    number: int
    state: bytes
    note: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one item. key: of everything that decides what is trained; those of another do not count."""

    def __init__(self, folder: str, key: str) -> None:
        self._folder = folder
        self._key = key
        self._number = 0

    def newest(self) -> Checkpoint | None:
        """The last one that is there as a whole and fits, None where there is none."""
        found = []
        for name in FOLDERS:
            place = storage.join(self._folder, name)
            if is_complete(place, self._key) and (manifest := read_manifest(place)) is not None:
                found.append((int(manifest["number"]), place, manifest))
        for number, place, manifest in sorted(found, key=lambda one: one[0], reverse=True):
            try:
                state = storage.read_bytes(storage.join(place, STATE))
            except StorageError:
                continue
            if storage.digest_bytes(state) == manifest["files"][STATE]["digest"]:
                self._number = number + 1
                return Checkpoint(number, state, manifest["note"])
        return None

    def write(self, state: bytes, note: Mapping[str, Any]) -> None:
        """Write one in the place of the last but one."""
        place = storage.join(self._folder, FOLDERS[self._number % len(FOLDERS)])
        write_artefact(place, {STATE: state}, {"number": self._number, "note": dict(note)}, self._key)
        self._number += 1

    def clear(self) -> None:
        """Remove all there are, whatever their key."""
        for name in FOLDERS:
            storage.remove(storage.join(self._folder, name))
