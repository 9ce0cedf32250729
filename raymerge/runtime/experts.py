"""Experts on a worker: read once, kept within a bound in bytes, merged as a task says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raymerge import storage
from raymerge.adapters import LoraAdapter, encode_adapter, open_adapter, read_adapter, weight_files
from raymerge.adapters.mlx import folder_of
from raymerge.errors import AdapterError, MergeError, RaymergeError
from raymerge.manifest import invalidate, is_complete, is_unfinished, write_artefact
from raymerge.merging.merge import WHOLE, merge
from raymerge.runtime.tasks import MergeTask


def adapter_digest(location: str) -> str:
    """Content digest of an adapter's files. Raises AdapterError if one is missing, or it was never finished."""
    if is_unfinished(folder_of(location)):
        raise AdapterError(f"{location}: this adapter was begun and not finished.\nWhat makes it failed or was killed.")
    try:
        return storage.digest_value([storage.digest(file) for file in weight_files(location)])
    except OSError as error:
        raise AdapterError(f"{location}: there is no adapter.\n{error}") from error


class ExpertCache:
    """Adapters read lately, the longest unused dropped first when their bytes exceed the bound."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._entries: OrderedDict[tuple[str, str], LoraAdapter] = OrderedDict()

    def read(self, name: str, location: str) -> LoraAdapter:
        """The adapter as it is on disk now. Raises AdapterError that names it."""
        try:
            key = (location, adapter_digest(location))
            if key not in self._entries:
                self._keep(key, read_adapter(location, name))
        except AdapterError as error:
            text = str(error)
            raise type(error)(text if text.startswith(name) else f"{name}: {text}") from error
        self._entries.move_to_end(key)
        return replace(self._entries[key], name=name)  # one adapter may go by several names

    def _keep(self, key: tuple[str, str], adapter: LoraAdapter) -> None:
        self._entries[key] = adapter
        self.held += adapter.nbytes
        while self.held > self.limit and len(self._entries) > 1:
            _, dropped = self._entries.popitem(last=False)
            self.held -= dropped.nbytes


@dataclass(frozen=True)
class MergeInputs:
    """A merge task with its inputs found: the anchor's location (or None), and the key of the result."""

    anchor: str | None
    digests: Mapping[str, str]
    key: str


def find_inputs(task: MergeTask) -> MergeInputs:
    """Digests of what a merge reads, and the key they make with the recipe. Raises AdapterError, MergeError."""
    digests = {}
    for expert in task.experts:
        try:
            digests[expert.name] = adapter_digest(expert.location)
        except AdapterError as error:
            raise AdapterError(f"{expert.name}: {error}") from error
    anchor = _anchor(task)
    key = storage.digest_value(
        {
            "experts": [[e.name, e.weight, digests[e.name]] for e in task.experts],
            "anchor": adapter_digest(anchor) if anchor else None,
            "merges": dict(task.merges),
        }
    )
    return MergeInputs(anchor, digests, key)


def _anchor(task: MergeTask) -> str | None:
    wanted = task.merges["anchor"]
    if wanted == "none":
        return None
    if wanted != "auto":
        return storage.resolve(task.workspace, wanted)
    starts = {e.name: open_adapter(e.location, e.name).started_from for e in task.experts}
    if len(set(starts.values())) > 1:
        listed = ", ".join(f"{name} from {start or 'the base'}" for name, start in sorted(starts.items())[:4])
        raise MergeError(
            f"{task.name}: its experts were started from different adapters.\nFound {listed}. "
            "Set the recipe's `anchor` to an adapter, or to none."
        )
    start = next(iter(starts.values()), None)
    return storage.resolve(task.workspace, start) if start else None


def build(task: MergeTask, inputs: MergeInputs, cache: ExpertCache) -> LoraAdapter:
    """Carry out a merge in memory. Experts that do not fit into the cache together are read module by module."""
    merges = task.merges
    opened = [open_adapter(e.location, e.name) for e in task.experts]
    if sum(adapter.nbytes for adapter in opened) <= cache.limit:
        opened = [cache.read(e.name, e.location) for e in task.experts]
    return merge(
        opened,
        [e.weight for e in task.experts],
        method=merges["method"],
        rank=merges["rank"],
        scale=merges["scale"],
        anchor=cache.read("anchor", inputs.anchor) if inputs.anchor else None,
        dtype=merges["dtype"],
        name=task.name,
        **merges["method_parameters"],
    )


def merge_to_folder(task: MergeTask, cache: ExpertCache) -> dict[str, Any]:
    """Carry out a merge unless its result is already there. Returns what the driver reports of it."""
    try:
        inputs = find_inputs(task)
    except RaymergeError:
        invalidate(task.folder)
        raise
    if is_complete(task.folder, inputs.key):
        return {"skipped": True}
    invalidate(task.folder)
    adapter = build(task, inputs, cache)
    files = encode_adapter(adapter)
    manifest = {
        "name": task.name,
        "experts": [{"name": e.name, "weight": e.weight, "digest": inputs.digests[e.name]} for e in task.experts],
        "anchor": adapter_digest(inputs.anchor) if inputs.anchor else None,
        "merges": dict(task.merges),
        "error": adapter.errors[WHOLE],
        "errors": {path: error for path, error in sorted(adapter.errors.items()) if path != WHOLE},
        "ranks": {path: header.rank for path, header in adapter.headers.items()},
    }
    write_artefact(task.folder, files, manifest, inputs.key)
    return {"skipped": False, "error": manifest["error"], "bytes": sum(len(data) for data in files.values())}


def first_line(error: BaseException) -> str:
    """What an error says in one line."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if isinstance(error, RaymergeError) else f"{type(error).__name__}: {line}"
