"""LoRA adapters as data: the factors and the scaling of each module. No file, no model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from raymerge.errors import AdapterError


@dataclass(frozen=True)
class ModuleHeader:
    """What is known of a module without its weights. dtype is the wider one of its two factors."""

    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype
    nbytes: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the delta: (out_features, in_features)."""
        return self.out_features, self.in_features


@dataclass(frozen=True, eq=False)
class LoraModule:
    """One module's delta in factors: delta = scaling * B @ A.

    A: (rank, in_features), B: (out_features, rank), any float dtypes. Where the base stores the weight as (in, out)
    (`fan_in_fan_out`, Conv1D) the factors are the same; only folding transposes. Raises AdapterError if the shapes do
    not make a product, or the scaling is no finite number.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1] or self.A.shape[0] < 1:
            raise AdapterError(
                f"These factors make no delta: A {tuple(self.A.shape)}, B {tuple(self.B.shape)}.\n"
                "Expected A (rank, in_features) and B (out_features, rank)."
            )
        if not math.isfinite(self.scaling):
            raise AdapterError(f"A scaling is a finite number; found {self.scaling!r}.")

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self.A.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of A."""
        return int(self.A.shape[1])

    @property
    def out_features(self) -> int:
        """Rows of B."""
        return int(self.B.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the delta: (out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """The wider dtype of the two factors."""
        return torch.promote_types(self.A.dtype, self.B.dtype)

    @property
    def header(self) -> ModuleHeader:
        """The module without its weights."""
        nbytes = self.A.nbytes + self.B.nbytes
        return ModuleHeader(self.rank, self.in_features, self.out_features, self.scaling, self.dtype, nbytes)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The delta, dense: (out_features, in_features)."""
        return self.scaling * (self.B.detach().to(dtype) @ self.A.detach().to(dtype))


class StoredModules(Mapping[str, LoraModule]):
    """Modules that stay where they are stored: each access reads one. A subclass says how."""

    headers: Mapping[str, ModuleHeader]

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __contains__(self, path: object) -> bool:
        return path in self.headers  # Mapping would read the weights to find out


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter: modules by their full dotted path in the base model, sorted.

    started_from: the adapter that its training began from, None for a fresh one. errors: relative Frobenius error of
    each module against what it stands for, rounding included, and under `*` that of the whole; empty for a trained
    adapter. fan_in_fan_out: whether the base stores its weights as (in_features, out_features).
    """

    name: str
    modules: Mapping[str, LoraModule]
    base_model: str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    started_from: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.modules, StoredModules):
            object.__setattr__(self, "modules", {path: self.modules[path] for path in sorted(self.modules)})

    @property
    def headers(self) -> Mapping[str, ModuleHeader]:
        """Shapes, ranks and dtypes by module, without reading a weight."""
        if isinstance(self.modules, StoredModules):
            return self.modules.headers
        return {path: module.header for path, module in self.modules.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of its factors; float32 if it has none."""
        found = [header.dtype for header in self.headers.values()]
        return reduce(torch.promote_types, found) if found else torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(header.nbytes for header in self.headers.values())
