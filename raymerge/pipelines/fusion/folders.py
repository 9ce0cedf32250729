"""Folders that a fuse may write into: empty ones, unfinished fuses, and with --force finished ones."""

from __future__ import annotations

import os
from collections.abc import Sequence

from raymerge import storage
from raymerge.errors import StorageError
from raymerge.manifest import NAME as MANIFEST
from raymerge.manifest import invalidate, is_complete, is_unfinished, read_manifest
from raymerge.pipelines.fusion import report as fusion_report
from raymerge.pipelines.fusion.figures import SCHEMA, Fused
from raymerge.pipelines.fusion.inputs import Loaded
from raymerge.pipelines.fusion.request import Fusion, Meant, merges_of

FUSE, SWEEP = "fuse", "sweep"  # what an unfinished folder's marker says it is to become
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors")


def finished(folder: str, key: str) -> Fused | None:
    """The fuse in a folder, if it is complete and of this key."""
    return _read(folder) if is_complete(folder, key) else None


def _read(folder: str) -> Fused | None:
    """What a manifest tells; None if it is not as this version writes it."""
    manifest = read_manifest(folder) or {}
    try:
        return Fused.from_json(manifest) if manifest.get("schema") == SCHEMA else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def check_folders(meant: Meant, there: Sequence[Fused | None], loaded: Loaded) -> None:
    """Raise StorageError if a folder to be written holds anything but an unfinished fuse, or one that may go. there:
    the fusions that are finished."""
    out = storage.resolve(os.getcwd(), meant.request.out)
    sweeping = meant.request.sweep is not None
    for folder in [*([out] if sweeping else []), *(fusion.folder for fusion in meant.fusions)]:
        _check_not_read(folder, loaded, below=folder != out or not sweeping)
    if sweeping and not _may_hold_sweep(out):
        raise StorageError(f"{out}: is not empty, and holds no sweep.\nChoose another --out.")
    for fusion, is_there in zip(meant.fusions, there, strict=True):
        files = [] if is_there else storage.list_files(fusion.folder)
        if not files or is_unfinished(fusion.folder, FUSE):
            continue
        if not _is_fused(fusion.folder):
            listed = ", ".join(file.path for file in files[:3]) + (", ..." if len(files) > 3 else "")
            raise StorageError(f"{fusion.folder}: is not empty.\nFound {listed}. Choose another --out.")
        if not meant.request.force:
            raise StorageError(
                f"{fusion.folder}: holds another fuse.\n"
                f"{_difference(meant, fusion, loaded)}Choose another --out, or replace it with --force."
            )


def _check_not_read(folder: str, loaded: Loaded, *, below: bool) -> None:
    """Raise StorageError if a file that is read lies in a folder to be written. below: or anywhere below it."""
    target = _place(folder)
    for file, what in loaded.files:
        for home in (_place(storage.parent(file)), storage.parent(_place(file))):
            if home == target:
                raise StorageError(f"{folder}: is {what}.\nChoose another --out.")
            if below and home.startswith(storage.join(target, "")):
                raise StorageError(f"{folder}: holds {what}.\nChoose another --out.")


def _place(location: str) -> str:
    """A location by the one name that it has, with links followed."""
    path = location.removeprefix("file://")
    return path if storage.is_uri(path) else os.path.realpath(path)


def _may_hold_sweep(folder: str) -> bool:
    if not storage.list_files(folder) or is_unfinished(folder, FUSE) or is_unfinished(folder, SWEEP):
        return True
    if storage.exists(storage.join(folder, MANIFEST)):
        return "sweep" in (read_manifest(folder) or {})
    places = {storage.join(folder, file.path.split("/")[0]) for file in storage.list_files(folder)}
    return all(_is_fused(place) or is_unfinished(place, FUSE) for place in places)


def _is_fused(folder: str) -> bool:
    return {"merges", "figures", "command"} <= set(read_manifest(folder) or {})


def _difference(meant: Meant, fusion: Fusion, loaded: Loaded) -> str:
    """In what the fuse in a folder differs from the one wanted, a line for each."""
    there = _read(fusion.folder)
    if there is None:
        return "It was written by another version of raymerge.\n"
    before = {expert.name: expert for expert in there.experts}
    names = [source.name for source in meant.sources]
    now = dict(zip(names, zip(fusion.weights, loaded.digests, strict=True), strict=True))
    found = [] if there.name == fusion.name else [f"name: {there.name!r} there, {fusion.name!r} now"]
    if set(before) != set(now):
        found.append(f"adapters: {', '.join(sorted(before))} there, {', '.join(sorted(now))} now")
    for name in sorted(set(before) & set(now)):
        if before[name].digest != now[name][1]:
            found.append(f"{name}: its files have changed")
        if before[name].weight != now[name][0]:
            found.append(f"weight of {name}: {before[name].weight!r} there, {now[name][0]!r} now")
    wanted = {**merges_of(meant, fusion), "dtype": loaded.dtype}
    if there.anchor == loaded.anchor_digest:
        del wanted["anchor"]  # only its location may differ
    elif there.merges.get("anchor") == wanted["anchor"]:
        found.append("anchor: its files have changed")
    if there.base != loaded.base_digest:
        found.append("base: it is another model, or its files were written anew")
    changed = [key for key in wanted if there.merges.get(key) != wanted[key]]
    found += [f"{key}: {there.merges.get(key)!r} there, {wanted[key]!r} now" for key in changed]
    return "".join(f"{line}\n" for line in found)


def clear(folder: str) -> None:
    """Remove what an earlier fuse, finished or not, wrote into a folder: its files could be taken for the new ones."""
    if storage.exists(storage.join(folder, MANIFEST)):
        invalidate(folder, FUSE)
        for name in (*ADAPTER_FILES, fusion_report.NAME):
            storage.remove(storage.join(folder, name))


def begin_sweep(folder: str) -> None:
    """Make a sweep's folder ready: a table of results that are about to change is no longer complete."""
    if is_unfinished(folder, FUSE):
        clear(folder)
    invalidate(folder, SWEEP)


def replace_report(folder: str, report: bytes) -> None:
    """Another report of a finished fuse, whose adapter stays. Nothing is written if it is the same."""
    manifest = read_manifest(folder)
    entry = {"bytes": len(report), "digest": storage.digest_bytes(report)}
    if manifest is None or manifest["files"].get(fusion_report.NAME) == entry:
        return
    invalidate(folder, FUSE)
    storage.write_bytes(storage.join(folder, fusion_report.NAME), report)
    files = {**manifest["files"], fusion_report.NAME: entry}
    storage.write_json(storage.join(folder, MANIFEST), {**manifest, "files": files})
