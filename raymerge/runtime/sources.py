"""What answers for the personas of an evaluation item: resident adapters, prefixes, and everybody's share of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raymerge import storage
from raymerge.adapters import LoraAdapter, ModuleHeader
from raymerge.adapters.formats import adapter_digest
from raymerge.errors import AdapterError, MergeError, ModelError, StorageError
from raymerge.merging.inputs import widest_dtype
from raymerge.merging.merge import mixture_weights
from raymerge.merging.scale import parse_scale
from raymerge.models.layers import linear_modules
from raymerge.models.multilora import check_fits
from raymerge.models.prefix import Prefix, check_prefix, read_prefix
from raymerge.runtime.bases import describe
from raymerge.runtime.experts import ExpertCache, MergeInputs, build, find_inputs, first_line, read_anchor
from raymerge.runtime.tasks import AnswerSource, MergeTask

UNUSABLE = (AdapterError, MergeError, ModelError, StorageError)  # fails one persona, not the item


@dataclass(frozen=True)
class Answerer:
    """What answers for a persona: weights over resident adapters by their number, or the number of a resident prefix;
    neither is the base.

    anchor: the adapter that what is merged was measured from, None for the base. nbytes: of the weights that would be
    published for it, those of a mixture as one adapter of rank exact. experts: how many contribute.
    """

    weights: Mapping[int, float] = field(default_factory=dict)
    prefix: int | None = None
    anchor: int | None = None
    nbytes: int = field(default=0, compare=False)
    experts: int = field(default=0, compare=False)

    def scaled(self, factor: float) -> Answerer:
        """What it adds to its anchor, or to the base, times a factor. Raises ModelError for a prefix."""
        if factor == 1.0:
            return self
        if self.prefix is not None:
            raise ModelError(f"a prefix cannot be multiplied by {factor}.\nIt adds nothing to the weights.")
        weights = {number: factor * weight for number, weight in self.weights.items()}
        if self.anchor is not None:
            weights[self.anchor] = weights.get(self.anchor, 0.0) + 1.0 - factor
        return replace(self, weights=weights)


@dataclass(frozen=True)
class Resident:
    """Adapters and prefixes side by side, and what of them answers for each persona."""

    adapters: tuple[LoraAdapter, ...]
    prefixes: tuple[Prefix, ...]
    answerers: Mapping[str, Answerer]

    @property
    def taken(self) -> int:
        """Places of the context that the longest prefix has."""
        return max((prefix.tokens for prefix in self.prefixes), default=0)

    def choose(self, answerers: Sequence[Answerer]) -> Tensor | None:
        """What `generate` takes for rows without a prefix: None, int64 (rows,), or float (rows, adapters)."""
        if not self.adapters:
            return None
        rows = [answerer.weights for answerer in answerers]
        if all(list(row.values()) in ([], [1.0]) for row in rows):
            return torch.tensor([next(iter(row), -1) for row in rows])
        shares = torch.zeros(len(rows), len(self.adapters))
        for number, row in enumerate(rows):
            for adapter, weight in row.items():
                shares[number, adapter] = weight
        return shares


def source_digests(sources: Sequence[AnswerSource], *, anchors: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """What decides each persona's answers, by digest; and personas without a usable source -> why.

    anchors: as of `load_sources`.
    """
    digests: dict[str, Any] = {}
    failed: dict[str, str] = {}
    known: dict[str, str] = {}
    for source in sources:
        try:
            digests[source.persona] = _digest(source, anchors, known)
        except UNUSABLE as error:
            digests[source.persona] = None
            failed[source.persona] = first_line(error)
    return digests, failed


def _digest(source: AnswerSource, anchors: bool, known: dict[str, str]) -> Any:
    if source.location is not None:
        own, anchor = adapter_digest(source.location), _anchor_location(source) if anchors else None
        return own if anchor is None else [own, adapter_digest(anchor, "anchor")]
    return [source.kind, find_inputs(source.merge, known).key] if source.merge is not None else source.kind


def _anchor_location(source: AnswerSource) -> str | None:
    """Where the anchor lies of an adapter that is used as it is; None for the base."""
    if source.kind != "adapter" or source.location is None or source.anchor in (None, "none"):
        return None
    named: str | None = source.anchor
    if named == "auto":
        digest = adapter_digest(source.location)
        named = describe(source.location, source.persona, digest).started_from
    return storage.resolve(source.workspace, named) if named else None


def load_sources(
    sources: Sequence[AnswerSource], cache: ExpertCache, model: Any, new_tokens: int, *, anchors: bool = False
) -> tuple[Resident, dict[str, str]]:
    """Read or merge what answers, each once; and personas for whom that failed -> why.

    model: the base model, which everything must fit. new_tokens: of an answer, for which a prefix must leave room.
    anchors: whether adapters and merges are to be scaled, so that what they are measured from must be resident too.
    """
    loader = _Loader(cache, model, new_tokens, anchors)
    answerers: dict[str, Answerer] = {}
    failed: dict[str, str] = {}
    for source in sources:
        try:
            answerers[source.persona] = loader.load(source)
        except UNUSABLE as error:
            failed[source.persona] = first_line(error)
    return Resident(tuple(loader.adapters), tuple(loader.prefixes), answerers), failed


class _Loader:
    """Adapters and prefixes in the order in which they were first asked for."""

    def __init__(self, cache: ExpertCache, model: Any, new_tokens: int, anchors: bool) -> None:
        self.cache = cache
        self.model = model
        self.new_tokens = new_tokens
        self.anchors = anchors
        self.linear = linear_modules(model)
        self.adapters: list[LoraAdapter] = []
        self._headers: list[Mapping[str, ModuleHeader]] = []
        self.prefixes: list[Prefix] = []
        self._numbers: dict[str, int] = {}
        self._prefix_numbers: dict[str, int] = {}
        self._known: dict[str, str] = {}  # digests of experts by location

    def load(self, source: AnswerSource) -> Answerer:
        """What answers for a persona, after adding what is new."""
        if source.kind == "prefix" and source.location is not None:
            prefix = self._add_prefix(source.location, source.persona)
            return Answerer(prefix=prefix, nbytes=self.prefixes[prefix].embeddings.nbytes, experts=1)
        if source.location is not None:
            adapter = self.cache.read(source.persona, source.location, base=source.base)
            place = _anchor_location(source) if self.anchors else None
            answerer = Answerer({self._add(source.location, adapter): 1.0}, nbytes=adapter.nbytes, experts=1)
            if place is None:
                return answerer
            return replace(answerer, anchor=self._add(place, self.cache.read("anchor", place, base=source.base)))
        if source.merge is None:
            return Answerer()
        inputs = find_inputs(source.merge, self._known)
        if source.kind == "mixture" and inputs.base is None:  # else `build` refuses what could not be written either
            return self._mixture(source.merge, inputs)
        if inputs.key not in self._numbers:
            self._add(inputs.key, build(source.merge, inputs, self.cache))
        anchor = read_anchor(inputs, self.cache) if self.anchors else None
        number = None if anchor is None or inputs.anchor is None else self._add(inputs.anchor, anchor)
        own = self._numbers[inputs.key]
        return Answerer({own: 1.0}, None, number, self.adapters[own].nbytes, len(source.merge.experts))

    def _mixture(self, task: MergeTask, inputs: MergeInputs) -> Answerer:
        experts = [
            self.cache.read(e.name, e.location, digest=inputs.digests[e.name], base=inputs.base) for e in task.experts
        ]
        anchor = read_anchor(inputs, self.cache)
        weights = [e.weight for e in task.experts]
        products = self._products(task, inputs, experts, anchor)
        shares, anchor_share = mixture_weights(experts, weights, task.merges["scale"], anchor, products)
        numbers = [self._add(e.location, adapter) for e, adapter in zip(task.experts, experts, strict=True)]
        row = dict(zip(numbers, shares, strict=True))
        itemsize = widest_dtype(experts).itemsize
        if anchor is None or inputs.anchor is None:
            return Answerer(row, nbytes=itemsize * self._exact_size(numbers), experts=len(experts))
        number = self._add(inputs.anchor, anchor)
        row[number] = row.get(number, 0.0) + anchor_share
        adds = [*numbers, number] if abs(anchor_share) > 1e-12 else numbers
        return Answerer(row, None, number, itemsize * self._exact_size(adds), len(experts))

    def _products(
        self, task: MergeTask, inputs: MergeInputs, experts: Sequence[LoraAdapter], anchor: LoraAdapter | None
    ) -> Tensor | None:
        """Inner products of the experts and, last, of the anchor; None where files are equal, hence not told apart."""
        if not parse_scale(task.merges["scale"])[1]:
            return None
        asked = {inputs.digests[e.name]: adapter for e, adapter in zip(task.experts, experts, strict=True)}
        if anchor is not None and inputs.anchor_digest is not None:
            asked[inputs.anchor_digest] = anchor
        return self.cache.products.of(asked) if len(asked) == len(experts) + (anchor is not None) else None

    def _add(self, identity: str, adapter: LoraAdapter) -> int:
        if identity not in self._numbers:
            adapter.require_plain("cannot be scored")  # here it fails its own personas, later all of the item
            check_fits(adapter.name, adapter.headers, self.linear)
            self._numbers[identity] = len(self.adapters)
            self.adapters.append(adapter)
            self._headers.append(adapter.headers)
        return self._numbers[identity]

    def _exact_size(self, numbers: Sequence[int]) -> int:
        """Entries of the factors of a linear merge at rank exact, before it is made: ranks add up as far as a module's
        shape allows. It is less where the adapters' factors depend on each other."""
        ranks: dict[str, int] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for number in numbers:
            for path, header in self._headers[number].items():
                ranks[path] = ranks.get(path, 0) + header.rank
                shapes[path] = header.shape
        return sum(min(rank, *shapes[path]) * sum(shapes[path]) for path, rank in ranks.items())

    def _add_prefix(self, location: str, name: str) -> int:
        if location not in self._prefix_numbers:
            prefix = read_prefix(location, name)
            check_prefix(prefix, self.model, room=self.new_tokens + 1)
            self._prefix_numbers[location] = len(self.prefixes)
            self.prefixes.append(prefix)
        return self._prefix_numbers[location]
