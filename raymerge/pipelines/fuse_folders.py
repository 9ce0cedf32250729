"""Folders that a fuse may write into: empty ones, unfinished fuses, and with --force finished ones."""

from __future__ import annotations

import os
from collections.abc import Sequence

from raymerge import storage
from raymerge.errors import StorageError
from raymerge.manifest import NAME as MANIFEST
from raymerge.manifest import UNFINISHED, is_unfinished, read_manifest
from raymerge.pipelines.fuse_request import Fusion, Meant, merges_of

ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
    "adapters.safetensors", "best_adapters.safetensors",
)  # fmt: skip


def check_folders(meant: Meant, done: Sequence[bool], digests: Sequence[str]) -> None:
    """Raise StorageError if a folder to be written holds anything but an unfinished fuse, or one that may go. digests:
    of the adapters, in the order given."""
    out = storage.resolve(os.getcwd(), meant.request.out)
    if meant.request.sweep is not None and not _may_hold_sweep(out):
        raise StorageError(f"{out}: is not empty, and holds no sweep.\nChoose another --out.")
    for fusion, is_done in zip(meant.fusions, done, strict=True):
        if any(os.path.realpath(fusion.folder) == os.path.realpath(s.location) for s in meant.sources):
            raise StorageError(f"{fusion.folder}: is one of the adapters to fuse.\nChoose another --out.")
        files = [] if is_done else storage.list_files(fusion.folder)
        if not files or is_unfinished(fusion.folder):
            continue
        if not _is_fused(fusion.folder):
            listed = ", ".join(file.path for file in files[:3]) + (", ..." if len(files) > 3 else "")
            raise StorageError(f"{fusion.folder}: is not empty.\nFound {listed}. Choose another --out.")
        if not meant.request.force:
            raise StorageError(
                f"{fusion.folder}: holds another fuse.\n"
                f"{_difference(meant, fusion, digests)}Choose another --out, or replace it with --force."
            )


def _may_hold_sweep(folder: str) -> bool:
    if not storage.list_files(folder) or is_unfinished(folder):
        return True
    if storage.exists(storage.join(folder, MANIFEST)):
        return "sweep" in (read_manifest(folder) or {})
    places = {storage.join(folder, file.path.split("/")[0]) for file in storage.list_files(folder)}
    return all(_is_fused(place) or is_unfinished(place) for place in places)


def _is_fused(folder: str) -> bool:
    return {"merges", "figures", "command"} <= set(read_manifest(folder) or {})


def _difference(meant: Meant, fusion: Fusion, digests: Sequence[str]) -> str:
    """In what the fuse in a folder differs from the one wanted, a line for each; empty where only the base does."""
    there = read_manifest(fusion.folder) or {}
    before = {expert["name"]: expert for expert in there["experts"]}
    now = dict(zip([source.name for source in meant.sources], zip(fusion.weights, digests, strict=True), strict=True))
    found = []
    if set(before) != set(now):
        found.append(f"adapters: {', '.join(sorted(before))} there, {', '.join(sorted(now))} now")
    for name in sorted(set(before) & set(now)):
        if before[name]["digest"] != now[name][1]:
            found.append(f"{name}: its files have changed")
        if before[name]["weight"] != now[name][0]:
            found.append(f"weight of {name}: {before[name]['weight']!r} there, {now[name][0]!r} now")
    wanted = merges_of(meant, fusion)
    if wanted["dtype"] is None:  # the manifest says which one that was
        del wanted["dtype"]
    changed = [key for key in wanted if there["merges"].get(key) != wanted[key]]
    found += [f"{key}: {there['merges'].get(key)!r} there, {wanted[key]!r} now" for key in changed]
    return "".join(f"{line}\n" for line in found)


def clear(folder: str) -> None:
    """Remove what an earlier fuse, finished or not, wrote into a folder: its files could be taken for the new ones."""
    listed = (read_manifest(folder) or {}).get("files", ADAPTER_FILES)
    if storage.exists(storage.join(folder, MANIFEST)):
        storage.write_json(storage.join(folder, MANIFEST), UNFINISHED)
        for name in listed:
            storage.remove(storage.join(folder, name))
