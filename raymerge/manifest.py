"""`manifest.json`, the completion marker of every artefact: an adapter, an evaluation, a set of embeddings.

It is written last and holds the digests of the files beside it and the `key`: the digest of everything that decided
the content. An artefact is complete when its marker is there, its key is the one wanted, and its files have the sizes
recorded; anything else is made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raymerge import storage
from raymerge.errors import StorageError

NAME = "manifest.json"
UNFINISHED: dict[str, Any] = {"unfinished": True}


def write_artefact(
    folder: str, files: Mapping[str, bytes], manifest: Mapping[str, Any], key: str, kind: str | None = None
) -> None:
    """Write an artefact's files and then its marker; until then the marker says that the artefact is unfinished.

    So a folder without any marker was not made by raymerge, and one that was interrupted is never taken for one. kind:
    of what is unfinished, for those who may only replace their own.
    """
    storage.write_json(storage.join(folder, NAME), _unfinished(kind))
    listed = {}
    for name in sorted(files):
        storage.write_bytes(storage.join(folder, name), files[name])
        listed[name] = {"bytes": len(files[name]), "digest": storage.digest_bytes(files[name])}
    storage.write_json(storage.join(folder, NAME), {**manifest, "key": key, "files": listed})


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The marker of an artefact, or None where there is none that can be read."""
    try:
        manifest = storage.read_json(storage.join(folder, NAME))
    except StorageError:
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def is_complete(folder: str, key: str) -> bool:
    """Whether an artefact is there as a whole and was decided by the same inputs."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("key") != key:
        return False
    return all(_has_size(storage.join(folder, name), entry["bytes"]) for name, entry in manifest["files"].items())


def invalidate(folder: str, kind: str | None = None) -> None:
    """Say that an artefact, if it is there, is no longer what is wanted: whoever makes it anew may fail."""
    if storage.exists(storage.join(folder, NAME)):
        storage.write_json(storage.join(folder, NAME), _unfinished(kind))


def is_unfinished(folder: str, kind: str | None = None) -> bool:
    """Whether an artefact, of that kind where one is given, was begun or invalidated and never finished. A folder
    without a marker is not, nor is one whose `manifest.json` is somebody else's."""
    location = storage.join(folder, NAME)
    if not storage.exists(location):
        return False
    try:
        marker = json.loads(storage.read_bytes(location))
    except ValueError:
        return False
    if not isinstance(marker, dict) or {**marker, "kind": None} != {**UNFINISHED, "kind": None}:
        return False
    return kind is None or marker.get("kind") == kind


def _unfinished(kind: str | None) -> dict[str, Any]:
    return UNFINISHED if kind is None else {**UNFINISHED, "kind": kind}


def _has_size(location: str, size: int) -> bool:
    try:
        return storage.file_info(location).size == size
    except StorageError:
        return False


def content_digest(folder: str) -> str | None:
    """One digest for an artefact's files, from its marker; None where it has no marker."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    return storage.digest_value({name: entry["digest"] for name, entry in manifest["files"].items()})
