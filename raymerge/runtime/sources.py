"""What answers for the personas of an evaluation item: resident adapters, and everybody's share of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raymerge.adapters import LoraAdapter
from raymerge.adapters.formats import adapter_digest
from raymerge.errors import AdapterError, MergeError, ModelError, StorageError
from raymerge.merging.merge import mixture_weights
from raymerge.models.layers import linear_modules
from raymerge.models.multilora import check_fits
from raymerge.runtime.experts import ExpertCache, MergeInputs, build, find_inputs, first_line, read_anchor
from raymerge.runtime.tasks import AnswerSource, MergeTask

UNUSABLE = (AdapterError, MergeError, ModelError, StorageError)  # fails one persona, not the item


@dataclass(frozen=True)
class Resident:
    """Adapters side by side, and each persona's weights over them by their number; no weight is the base."""

    adapters: tuple[LoraAdapter, ...]
    weights: Mapping[str, Mapping[int, float]]

    def choose(self, personas: Sequence[str]) -> Tensor | None:
        """What `generate` takes for rows of these personas: None, int64 (rows,), or float (rows, adapters)."""
        if not self.adapters:
            return None
        rows = [self.weights[persona] for persona in personas]
        if all(list(row.values()) in ([], [1.0]) for row in rows):
            return torch.tensor([next(iter(row), -1) for row in rows])
        shares = torch.zeros(len(rows), len(self.adapters))
        for number, row in enumerate(rows):
            for adapter, weight in row.items():
                shares[number, adapter] = weight
        return shares


def source_digests(sources: Sequence[AnswerSource]) -> tuple[dict[str, Any], dict[str, str]]:
    """What decides each persona's answers, by digest; and personas without a usable source -> why."""
    digests: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for source in sources:
        try:
            digests[source.persona] = _digest(source)
        except UNUSABLE as error:
            digests[source.persona] = None
            failed[source.persona] = first_line(error)
    return digests, failed


def _digest(source: AnswerSource) -> Any:
    if source.location is not None:
        return adapter_digest(source.location)
    return [source.kind, find_inputs(source.merge).key] if source.merge is not None else source.kind


def load_sources(sources: Sequence[AnswerSource], cache: ExpertCache, model: Any) -> tuple[Resident, dict[str, str]]:
    """Read or merge what answers, each adapter once; and personas for whom that failed -> why.

    model: the base model, which every adapter must fit.
    """
    loader = _Loader(cache, model)
    weights: dict[str, Mapping[int, float]] = {}
    failed: dict[str, str] = {}
    for source in sources:
        try:
            weights[source.persona] = loader.load(source)
        except UNUSABLE as error:
            failed[source.persona] = first_line(error)
    return Resident(tuple(loader.adapters), weights), failed


class _Loader:
    """Adapters in the order in which they were first asked for."""

    def __init__(self, cache: ExpertCache, model: Any) -> None:
        self.cache = cache
        self.linear = linear_modules(model)
        self.adapters: list[LoraAdapter] = []
        self._numbers: dict[str, int] = {}

    def load(self, source: AnswerSource) -> Mapping[int, float]:
        """A persona's weights over the adapters, after adding those that are new."""
        if source.location is not None:
            adapter = self.cache.read(source.persona, source.location, base=source.base)
            return {self._add(source.location, adapter): 1.0}
        if source.merge is None:
            return {}
        inputs = find_inputs(source.merge)
        if source.kind == "mixture" and inputs.base is None:  # else `build` refuses what could not be written either
            return self._mixture(source.merge, inputs)
        if inputs.key not in self._numbers:
            self._add(inputs.key, build(source.merge, inputs, self.cache))
        return {self._numbers[inputs.key]: 1.0}

    def _mixture(self, task: MergeTask, inputs: MergeInputs) -> Mapping[int, float]:
        experts = [
            self.cache.read(e.name, e.location, digest=inputs.digests[e.name], base=inputs.base) for e in task.experts
        ]
        anchor = read_anchor(inputs, self.cache)
        shares, anchor_share = mixture_weights(experts, [e.weight for e in task.experts], task.merges["scale"], anchor)
        numbers = [self._add(e.location, adapter) for e, adapter in zip(task.experts, experts, strict=True)]
        row = dict(zip(numbers, shares, strict=True))
        if anchor is not None and inputs.anchor is not None:
            number = self._add(inputs.anchor, anchor)
            row[number] = row.get(number, 0.0) + anchor_share
        return row

    def _add(self, identity: str, adapter: LoraAdapter) -> int:
        if identity not in self._numbers:
            adapter.require_plain("cannot be scored")  # here it fails its own personas, later all of the item
            check_fits(adapter.name, adapter.headers, self.linear)
            self._numbers[identity] = len(self.adapters)
            self.adapters.append(adapter)
        return self._numbers[identity]
