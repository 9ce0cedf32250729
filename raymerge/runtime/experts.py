"""Experts on a worker: read once, kept within a bound in bytes, merged as a task says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from raymerge import storage
from raymerge.adapters import LoraAdapter, encode_adapter, open_adapter, read_adapter
from raymerge.adapters.base_weights import BaseWeights
from raymerge.adapters.formats import adapter_digest
from raymerge.errors import AdapterError, MergeError, RaymergeError
from raymerge.manifest import invalidate, is_complete, write_artefact
from raymerge.merging.gram import gram
from raymerge.merging.merge import WHOLE, merge
from raymerge.merging.scale import by_depth
from raymerge.runtime.bases import Described, base_digest, base_of_dora, describe, is_folder, need_base
from raymerge.runtime.tasks import MergeTask

MOST_PRODUCTS = 1_000_000  # remembered: some 200 MiB


class InnerProducts:
    """Inner products of adapters' deltas, remembered by the digests of their files: mixtures of the same experts at
    other weights are what a search tries, and their norms follow from these."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], float] = {}

    def of(self, adapters: Mapping[str, LoraAdapter]) -> torch.Tensor:
        """float64 (n, n) of adapters by digest, in their order. Raises MergeError if shapes differ."""
        order = sorted(adapters)  # so that a product has the same bytes whichever it is asked for first
        if any((a, b) not in self._known for i, a in enumerate(order) for b in order[i:]):
            products = gram([adapters[digest] for digest in order]).tolist()
            if len(self._known) + len(order) ** 2 > MOST_PRODUCTS:
                self._known.clear()
            for i, a in enumerate(order):
                self._known |= {(a, b): products[i][j] for j, b in enumerate(order[i:], i)}
        pairs = [[self._known[min(a, b), max(a, b)] for b in adapters] for a in adapters]
        return torch.tensor(pairs, dtype=torch.float64)


class ExpertCache:
    """Adapters read lately, the longest unused dropped first when their bytes exceed the bound."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.products = InnerProducts()
        self.held = 0
        self._entries: OrderedDict[tuple[str, ...], LoraAdapter] = OrderedDict()

    def read(self, name: str, location: str, *, digest: str | None = None, base: str | None = None) -> LoraAdapter:
        """The adapter as it is on disk now. digest: of it, where it is known. base: where the base model lies, which is
        opened for DoRA alone. Raises AdapterError that names it; ModelError for a base that cannot be read."""
        try:
            key, needed = _key(name, location, digest or adapter_digest(location), base)
            if key not in self._entries:
                self._keep(key, read_adapter(location, name, base=None if needed is None else BaseWeights(needed)))
        except AdapterError as error:
            text = str(error)
            raise type(error)(text if text.startswith(name) else f"{name}: {text}") from error
        self._entries.move_to_end(key)
        return replace(self._entries[key], name=name)  # one adapter may go by several names

    def open(self, name: str, location: str, *, digest: str, base: str | None) -> LoraAdapter:
        """The adapter where it is held, else one that reads each module when it is asked for. Raises as `read`."""
        key, needed = _key(name, location, digest, base)
        if key in self._entries:
            return replace(self._entries[key], name=name)
        return open_adapter(location, name, base=None if needed is None else BaseWeights(needed))

    def _keep(self, key: tuple[str, ...], adapter: LoraAdapter) -> None:
        self._entries[key] = adapter
        self.held += adapter.nbytes
        while self.held > self.limit and len(self._entries) > 1:
            _, dropped = self._entries.popitem(last=False)
            self.held -= dropped.nbytes


def _key(name: str, location: str, digest: str, base: str | None) -> tuple[tuple[str, ...], str | None]:
    """What tells an adapter in the cache from others, and where the base lies if its deltas depend on it."""
    needed = base_of_dora(name, base) if describe(location, name, digest).dora else None
    return (location, digest, *(() if needed is None else (base_digest(needed),))), needed


@dataclass(frozen=True)
class MergeInputs:
    """A merge task with its inputs found.

    anchor: its location, or None. base: the base's location where this merge needs it, else None. digests: of the
    experts by name. key: of the result.
    """

    anchor: str | None
    anchor_digest: str | None
    base: str | None
    base_digest: str | None
    digests: Mapping[str, str]
    key: str


def find_inputs(task: MergeTask, known: dict[str, str] | None = None) -> MergeInputs:
    """Digests of what a merge reads, and the key they make with the recipe. No weight is read but to be digested.

    known: digests of experts by location, of merges that are looked at together and share many: looked at and added to.
    Raises AdapterError for an adapter that is not there or cannot be used without a base that is not there; MergeError.
    """
    digests = {}
    found = {}
    known = {} if known is None else known
    for expert in task.experts:
        if expert.location not in known:
            known[expert.location] = adapter_digest(expert.location, expert.name)
        digests[expert.name] = known[expert.location]
        found[expert.name] = describe(expert.location, expert.name, digests[expert.name])
    anchor = _anchor(task, found)
    anchor_digest = adapter_digest(anchor) if anchor else None
    if anchor is not None and anchor_digest is not None:
        found["anchor"] = describe(anchor, "anchor", anchor_digest)
    base = _base(task, found)
    of_base = None if base is None else base_digest(base)
    key = storage.digest_value(
        {
            "experts": [[e.name, e.weight, digests[e.name]] for e in task.experts],
            "anchor": anchor_digest,
            "merges": dict(task.merges),
            **({} if of_base is None else {"base": of_base}),
        }
    )
    return MergeInputs(anchor, anchor_digest, base, of_base, digests, key)


def _anchor(task: MergeTask, found: Mapping[str, Described]) -> str | None:
    wanted = task.merges["anchor"]
    if wanted == "none":
        return None
    if wanted != "auto":
        return storage.resolve(task.workspace, wanted)
    starts = {name: described.started_from for name, described in found.items()}
    if len(set(starts.values())) > 1:
        listed = ", ".join(f"{name} from {start or 'the base'}" for name, start in sorted(starts.items())[:4])
        raise MergeError(
            f"{task.name}: its experts were started from different adapters.\nFound {listed}. "
            "Set the recipe's `anchor` to an adapter, or to none."
        )
    start = next(iter(starts.values()), None)
    return storage.resolve(task.workspace, start) if start else None


def _base(task: MergeTask, found: Mapping[str, Described]) -> str | None:
    """The base's location where the merge depends on its weights. Raises UnsupportedAdapterError if it is not there."""
    for name, described in found.items():
        if described.dora:
            return base_of_dora(name, task.base)
    merges = task.merges
    is_mean = merges["method"] == "linear" and merges["scale"] == 1.0 and "scale_offsets" not in merges
    for name, described in found.items():
        if described.whole is not None and (is_folder(task.base) or not is_mean):
            why = f"stores {described.whole} whole, and its delta is what that adds to the base's"
            return need_base(name, why, task.base)
    return None  # in a mean of whole tensors the base cancels; `merge` refuses what is none after all


def build(task: MergeTask, inputs: MergeInputs, cache: ExpertCache) -> LoraAdapter:
    """Carry out a merge in memory. Experts that do not fit into the cache together are read module by module."""
    merges = task.merges
    base = None if inputs.base is None else BaseWeights(inputs.base)
    places = [(e.name, e.location, inputs.digests[e.name]) for e in task.experts]
    opened = [cache.open(name, place, digest=digest, base=inputs.base) for name, place, digest in places]
    if sum(adapter.nbytes for adapter in opened) <= cache.limit:
        opened = [cache.read(name, place, digest=digest, base=inputs.base) for name, place, digest in places]
    return merge(
        opened,
        [by_depth(e.weight, merges.get("scale_offsets", {}).get("layers", ())) for e in task.experts],
        method=merges["method"],
        rank=merges["rank"],
        scale=merges["scale"],
        anchor=read_anchor(inputs, cache),
        base=base,
        dtype=merges["dtype"],
        name=task.name,
        **merges["method_parameters"],
    )


def read_anchor(inputs: MergeInputs, cache: ExpertCache) -> LoraAdapter | None:
    """What a merge's deltas are measured from, or None. Raises what `ExpertCache.read` raises."""
    if inputs.anchor is None:
        return None
    return cache.read("anchor", inputs.anchor, digest=inputs.anchor_digest, base=inputs.base)


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
        "anchor": inputs.anchor_digest,
        "base": inputs.base_digest,
        "merges": dict(task.merges),
        "error": adapter.errors[WHOLE],
        "errors": {path: error for path, error in sorted(adapter.errors.items()) if path != WHOLE},
        "ranks": {path: header.rank for path, header in adapter.headers.items()},
        "notes": list(adapter.notes),
    }
    write_artefact(task.folder, files, manifest, inputs.key)
    return {"skipped": False, "error": manifest["error"], "bytes": sum(len(data) for data in files.values())}


def first_line(error: BaseException) -> str:
    """What an error says in one line."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if isinstance(error, RaymergeError) else f"{type(error).__name__}: {line}"
