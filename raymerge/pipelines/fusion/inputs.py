"""What a fuse reads: adapters opened, checked together and digested, and their weights only where they are needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.adapters.formats import adapter_digest, open_adapter, read_adapter, weight_files
from raymerge.errors import ModelError
from raymerge.merging.rank import parse_rank
from raymerge.pipelines.fusion.figures import SCHEMA
from raymerge.pipelines.fusion.request import Fusion, Meant, merges_of

if TYPE_CHECKING:
    from raymerge.adapters import LoraAdapter
    from raymerge.adapters.base_weights import BaseWeights

HELD = 2 * 2**30  # bytes of adapters up to which they are read once and kept


@dataclass(frozen=True)
class Loaded:
    """The adapters of a request, in the order given, the anchor, the base's weights, and their digests.

    files: all that is read, with what each is in words. base_digest: None where no adapter depends on the base. dtype:
    of the result, as torch names it.
    """

    experts: tuple[LoraAdapter, ...]
    anchor: LoraAdapter | None
    base: BaseWeights | None
    digests: tuple[str, ...]
    anchor_digest: str | None
    base_digest: str | None
    files: tuple[tuple[str, str], ...]
    dtype: str

    @property
    def adapters(self) -> tuple[LoraAdapter, ...]:
        """Experts, and the anchor last where there is one."""
        return self.experts if self.anchor is None else (*self.experts, self.anchor)


def open_inputs(meant: Meant) -> Loaded:
    """Open and digest all adapters, so that what is wrong with one is said before anything is made. No weights are
    read, but those of pickles, which cannot be opened without."""
    from raymerge.adapters.base_weights import BaseWeights
    from raymerge.merging.inputs import widest_dtype

    request = meant.request
    where = None if request.base is None else storage.resolve(os.getcwd(), request.base)
    base = None if where is None else BaseWeights(where)
    if where is not None and not storage.exists(where):
        raise ModelError(f"{where}: there is no base model.\nExpected a folder with safetensors weights.")
    adapters = [_open(meant, location, name, base) for location, name in _places(meant)]
    count = len(meant.sources)
    experts, anchor = tuple(adapters[:count]), adapters[count] if request.anchor is not None else None
    _check_together(meant, experts, anchor)
    digests = [adapter_digest(location, name) for location, name in _places(meant)]
    needs_base = any(one.whole_shapes or _is_dora(one) for one in adapters)
    loaded = Loaded(
        experts,
        anchor,
        base,
        tuple(digests[:count]),
        digests[count] if anchor is not None else None,
        _state(where) if where is not None and needs_base else None,
        _files(meant, where),
        request.dtype or str(widest_dtype(adapters)).removeprefix("torch."),
    )
    if request.format == "mlx":
        _check_mlx(loaded, meant.fusions[0].name)
    return loaded


def read_inputs(meant: Meant, loaded: Loaded) -> Loaded:
    """The same with its weights in memory, if they are small; others are read module by module."""
    if sum(adapter.nbytes for adapter in loaded.adapters) > HELD:
        return loaded
    places = zip(_places(meant), loaded.adapters, strict=True)
    more: dict[str, Any] = {} if loaded.base is None else {"base": loaded.base}
    read = [
        opened if _is_pickle(meant, location) else read_adapter(location, name, **more)
        for (location, name), opened in places
    ]
    count = len(loaded.experts)
    return replace(loaded, experts=tuple(read[:count]), anchor=None if loaded.anchor is None else read[count])


def key_of(meant: Meant, loaded: Loaded, fusion: Fusion) -> str:
    """The digest of all that decides a fused adapter and its manifest."""
    names = [source.name for source in meant.sources]
    experts = sorted([list(entry) for entry in zip(names, loaded.digests, fusion.weights, strict=True)])
    merges = {**merges_of(meant, fusion), "anchor": loaded.anchor_digest, "dtype": loaded.dtype}
    return storage.digest_value(
        {"schema": SCHEMA, "name": fusion.name, "experts": experts, "merges": merges, "base": loaded.base_digest}
    )


def _places(meant: Meant) -> list[tuple[str, str]]:
    """Locations and names of the experts, and of the anchor."""
    places = [(source.location, source.name) for source in meant.sources]
    anchor = meant.request.anchor
    return places if anchor is None else [*places, (storage.resolve(os.getcwd(), anchor), f"anchor {anchor}")]


def _open(meant: Meant, location: str, name: str, base: BaseWeights | None) -> LoraAdapter:
    more: dict[str, Any] = {} if base is None else {"base": base}
    if _is_pickle(meant, location):
        return read_adapter(location, name, allow_pickle=True, **more)
    return open_adapter(location, name, **more)


def _is_pickle(meant: Meant, location: str) -> bool:
    return meant.request.allow_pickle and weight_files(location)[0].endswith(".bin")


def _check_together(meant: Meant, experts: Sequence[LoraAdapter], anchor: LoraAdapter | None) -> None:
    """Raise MergeError now, and for all of a sweep, if these adapters cannot be merged by any method."""
    from raymerge.merging.inputs import check_inputs

    for fusion in meant.fusions:
        check_inputs(experts, fusion.weights, anchor, parse_rank(meant.rank))


def _check_mlx(loaded: Loaded, name: str) -> None:
    """Raise UnsupportedAdapterError now if the result holds what MLX has no form for."""
    import torch

    from raymerge.adapters.adapter import LoraAdapter, LoraModule
    from raymerge.adapters.mlx import check_expressible

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, loaded.dtype, torch.float32), device="meta")

    modules: dict[str, LoraModule] = {}
    for adapter in loaded.adapters:
        for path, one in adapter.headers.items():
            before = modules.get(path)
            biased = one.biased or (before is not None and before.bias is not None)
            bias = empty(one.out_features) if biased else None
            A, B = empty(1, one.in_features), empty(one.out_features, 1)
            modules[path] = LoraModule(A, B, 1.0, bias=bias, embedding=one.embedding)
    whole = {tensor: empty(*shape) for one in loaded.adapters for tensor, shape in one.whole_shapes.items()}
    swapped = any(adapter.fan_in_fan_out for adapter in loaded.experts)
    check_expressible(LoraAdapter(name, modules, fan_in_fan_out=swapped, whole=whole))


def _is_dora(adapter: LoraAdapter) -> bool:
    """Whether it was read with its base: its modules have the rank of factors that are no longer there."""
    return any(header.nominal is not None for header in adapter.headers.values())


def _state(location: str) -> str:
    """A base model's files by size and time: they are too large to be digested for every fuse."""
    files = [[file.path, file.size, file.mtime] for file in storage.list_files(location)]
    return storage.digest_value([location, files])


def _files(meant: Meant, base: str | None) -> tuple[tuple[str, str], ...]:
    """All that is read, with what each is in words."""
    found = []
    for index, (location, _) in enumerate(_places(meant)):
        what = "one of the adapters to fuse" if index < len(meant.sources) else "the anchor"
        found += [(file, what) for file in weight_files(location)]
    if base is not None:
        names = [name for name in storage.list_names(base) if name.endswith((".safetensors", ".json"))]
        found += [(storage.join(base, name), "the base model") for name in names]
    return tuple(found)
