"""What an adapter begins from: the layers that get factors, and the factors before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raymerge import storage
from raymerge.adapters.adapter import LoraAdapter
from raymerge.adapters.tensors import encode_tensors
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.models.layers import linear_modules, shape_of
from raymerge.models.stacked import FactorStack
from raymerge.models.training.settings import TrainingSettings


def targets(base: BaseModel, wanted: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """Layers that get factors, sorted by path. Raises ModelError if a name matches none."""
    linear = linear_modules(base.model)
    if wanted == "all-linear":
        head = base.model.get_output_embeddings()
        return {name: linear[name] for name in sorted(linear) if linear[name] is not head}
    names = (wanted,) if isinstance(wanted, str) else wanted
    if not names:
        raise ModelError(
            "training.target_modules is empty: name a module, or all-linear.\nAn adapter changes at least one layer."
        )
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in linear):
            ends = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linear}))
            raise ModelError(
                f"training.target_modules names {name!r}, which {base.location} lacks; it has: {ends}.\n"
                "Expected `all-linear`, or the path of a linear layer, or the end of one."
            )
    matches = tuple(f".{name}" for name in names)
    return {path: linear[path] for path in sorted(linear) if f".{path}".endswith(matches)}


def check_start(start: LoraAdapter, layers: Mapping[str, nn.Module], settings: TrainingSettings) -> None:
    """Raise ModelError if training cannot begin from a copy of this adapter."""
    start.require_plain("cannot be trained further")
    for name, header in start.headers.items():
        if name not in layers:
            raise ModelError(
                f"start_from {start.name}: it changes {name}, which this training does not.\n"
                "Set training.target_modules so that it covers the adapter's modules."
            )
        expected = shape_of(layers[name])
        if header.shape != expected:
            raise ModelError(f"start_from {start.name}: {name} is {header.shape}, the model's is {expected}.")
        if header.rank != settings.rank:
            raise ModelError(
                f"start_from {start.name}: {name} has rank {header.rank}, training.rank is {settings.rank}.\n"
                "A copy keeps its rank: set training.rank to it, or compress the adapter first."
            )


def digest_start(start: LoraAdapter) -> str:
    """Digest of an adapter's name, factors and scalings."""
    tensors = {f"{path}.{name}": t for path, m in start.modules.items() for name, t in (("A", m.A), ("B", m.B))}
    scalings = {path: m.scaling for path, m in start.headers.items()}
    return storage.digest_value([start.name, scalings, storage.digest_bytes(encode_tensors(tensors, {}))])


def first_factors(name: str, seed: int, module: str, rank: int, inner: int) -> Tensor:
    """An adapter's initial A: float32 (rank, inner), uniform as PEFT's, drawn by (seed, name, module) alone."""
    bound = 1 / math.sqrt(inner)
    digest = storage.digest_value([seed, name, module]).removeprefix("sha256:")
    generator = torch.Generator().manual_seed(int(digest[:15], 16))
    return (torch.rand(rank, inner, generator=generator) * 2 - 1) * bound


class Beginnings:
    """Factors before the first step, packed; what adapters share is made once."""

    def __init__(self, stack: FactorStack, settings: TrainingSettings, start: LoraAdapter | None) -> None:
        self._stack, self._settings, self._start = stack, settings, start
        self._shared: Tensor | None = None

    def of(self, name: str) -> Tensor:
        """Factors of an adapter by its name: those of the start, else a random A and B zero."""
        if not self._settings.shared_init:
            return self._drawn(name)
        if self._shared is None:
            self._shared = self._drawn("")
        return self._shared

    def _drawn(self, name: str) -> Tensor:
        settings, parts = self._settings, []
        for path, module in self._stack.modules.items():
            copied = self._start.modules.get(path) if self._start is not None else None
            if copied is None:
                A = first_factors(name, settings.seed, path, settings.rank, module.inner)
                Bt = torch.zeros(settings.rank, module.outer)
            else:
                A = copied.A.float()
                Bt = (copied.B.float() * (copied.scaling / settings.scaling)).T
            parts += [A.reshape(-1), Bt.reshape(-1)]
        return torch.cat(parts)
