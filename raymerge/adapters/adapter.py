"""LoRA adapters as data: the factors and the scaling of each module. No file, no model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from raymerge.adapters.tensors import StoredTensors
from raymerge.errors import AdapterError, UnsupportedAdapterError


@dataclass(frozen=True)
class ModuleHeader:
    """What is known of a module without its weights. dtype is the widest of its tensors.

    biased: it has a trained bias. embedding, nominal: as in LoraModule.
    """

    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype
    nbytes: int
    biased: bool = False
    embedding: bool = False
    nominal: int | None = None

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

    bias: (out_features,), a trained bias: the module adds scaling * (B @ A @ x + bias) to the base's output.
    embedding: A is (rank, num_embeddings) and B (embedding_dim, rank), so that the delta is the transpose of what is
    added to the embedding's weight. nominal: for a dense delta, written as a product with the identity of its smaller
    side: the rank that stands for it where ranks are kept (DoRA's r).
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None
    embedding: bool = False
    nominal: int | None = None

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1] or self.A.shape[0] < 1:
            raise AdapterError(
                f"These factors make no delta: A {tuple(self.A.shape)}, B {tuple(self.B.shape)}.\n"
                "Expected A (rank, in_features) and B (out_features, rank)."
            )
        if not math.isfinite(self.scaling):
            raise AdapterError(f"A scaling is a finite number; found {self.scaling!r}.")
        if self.bias is not None and tuple(self.bias.shape) != (self.out_features,):
            raise AdapterError(
                f"This bias does not fit its module: {tuple(self.bias.shape)}.\n"
                f"Expected ({self.out_features},), as B is {tuple(self.B.shape)}."
            )

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
        """The widest dtype of the factors and the bias."""
        widest = torch.promote_types(self.A.dtype, self.B.dtype)
        return widest if self.bias is None else torch.promote_types(widest, self.bias.dtype)

    @property
    def header(self) -> ModuleHeader:
        """The module without its weights."""
        nbytes = self.A.nbytes + self.B.nbytes + (0 if self.bias is None else self.bias.nbytes)
        return ModuleHeader(
            self.rank, self.in_features, self.out_features, self.scaling, self.dtype, nbytes,
            self.bias is not None, self.embedding, self.nominal,
        )  # fmt: skip

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The delta, dense: (out_features, in_features)."""
        return torch.mm(self.B.detach().to(dtype), self.A.detach().to(dtype)).mul_(self.scaling)


class StoredModules(Mapping[str, LoraModule]):
    """Modules that stay where they are stored: each access reads one. A subclass says how."""

    headers: Mapping[str, ModuleHeader]

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __contains__(self, path: object) -> bool:
        return path in self.headers  # Mapping would read the weights to find out


@dataclass(frozen=True, eq=False, repr=False)
class LoraAdapter:
    """An adapter: modules by their full dotted path in the base model, sorted.

    started_from: the adapter that its training began from, None for a fresh one. errors: relative Frobenius error of
    each module against what it stands for, rounding included, and under `*` that of the whole; empty for a trained
    adapter. fan_in_fan_out: whether the base stores its weights as (in_features, out_features).

    whole: tensors that replace the base's, by the parameter's full name there (`lm_head.weight`), sorted; from trained
    modules, trained biases of the base and resized embeddings. modules_to_save, bias_mode: what PEFT's configuration
    says of them, so that they are written as they were. notes: what users of a merged adapter should know of its
    method.
    """

    name: str
    modules: Mapping[str, LoraModule]
    base_model: str | None = None
    fan_in_fan_out: bool = False
    task_type: str | None = None
    started_from: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias_mode: str = "none"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.modules, StoredModules):
            object.__setattr__(self, "modules", {path: self.modules[path] for path in sorted(self.modules)})
        if not isinstance(self.whole, StoredTensors):
            object.__setattr__(self, "whole", {name: self.whole[name] for name in sorted(self.whole)})

    def __repr__(self) -> str:
        ranks = sorted({header.rank for header in self.headers.values()})
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
        return f"LoraAdapter({self.name!r}, {len(self.headers)} modules of rank {shown}, {self.dtype})"

    @property
    def headers(self) -> Mapping[str, ModuleHeader]:
        """Shapes, ranks and dtypes by module, without reading a weight."""
        if isinstance(self.modules, StoredModules):
            return self.modules.headers
        return {path: module.header for path, module in self.modules.items()}

    @property
    def whole_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the whole tensors by name, without reading one."""
        if isinstance(self.whole, StoredTensors):
            return self.whole.shapes
        return {name: tuple(tensor.shape) for name, tensor in self.whole.items()}

    @property
    def unusual(self) -> str:
        """What it holds beside deltas of linear modules, in words for people; empty if nothing."""
        headers = self.headers
        kinds = {
            "trained biases (lora_bias)": [path for path, header in headers.items() if header.biased],
            "a LoRA of an embedding": [path for path, header in headers.items() if header.embedding],
            "whole tensors": list(self.whole_shapes),
        }
        return ", ".join(f"{kind} ({found[0]}{', ...' * (len(found) > 1)})" for kind, found in kinds.items() if found)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of its factors; float32 if it has none."""
        found = [header.dtype for header in self.headers.values()]
        return reduce(torch.promote_types, found) if found else torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, biases and whole tensors."""
        factors = sum(header.nbytes for header in self.headers.values())
        if isinstance(self.whole, StoredTensors):
            return factors + self.whole.nbytes
        return factors + sum(tensor.nbytes for tensor in self.whole.values())

    def require_plain(self, purpose: str) -> None:
        """Raise UnsupportedAdapterError if it holds more than deltas of linear modules. purpose: what cannot be done
        with such an adapter, as in `cannot be run in a batch`."""
        if self.unusual:
            raise UnsupportedAdapterError(
                f"{self.name}: {purpose}, since it holds {self.unusual}.\n"
                "Only deltas of linear modules can be used here."
            )
