"""What adapters need of the base model they were trained on: DoRA to be read, whole tensors to be merged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raymerge import storage
from raymerge.adapters.formats import adapter_digest, read_header
from raymerge.adapters.metadata import started_from
from raymerge.adapters.peft import AdapterHeader
from raymerge.errors import UnsupportedAdapterError


@dataclass(frozen=True)
class Described:
    """What an adapter's files say of it. started_from: what its training began from. dora: whether its deltas depend on
    the base's weights. whole: the first of its tensors that replace the base's, None if it has none."""

    started_from: str | None
    dora: bool
    whole: str | None


@lru_cache(maxsize=100_000)
def describe(location: str, name: str, digest: str) -> Described:
    """What an adapter of this digest says of itself; no weight is read. Raises what `read_header` raises."""
    header = read_header(location, name)
    whole = min(header.whole, default=None) if isinstance(header, AdapterHeader) else None
    return Described(started_from(header.metadata), header.settings.dora, whole)


def base_digest(location: str) -> str:
    """One digest for a base model's files: configuration, weights and tokenizer; of a hub id, the id. The content of a
    file is read once in a process."""
    kinds = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt")
    files = [f.path for f in storage.list_files(location) if f.path.endswith(kinds)]
    found = [[name, storage.digest(storage.join(location, name))] for name in files]
    return storage.digest_value(found or location)


def is_folder(base: str | None) -> bool:
    """Whether there is a base model whose weights can be read: a resolved location, and no hub id such as org/name."""
    return base is not None and (storage.is_uri(base) or os.path.isabs(base))


def need_base(name: str, why: str, base: str | None) -> str:
    """The base's location for an adapter that needs it. why: `holds whole tensors, ...`.

    Raises UnsupportedAdapterError if the project has no base, or only a hub id.
    """
    if base is not None and is_folder(base):
        return base
    found = "the project has no `base_model`" if base is None else f"base_model {base} is a hub id, not a folder"
    raise UnsupportedAdapterError(
        f"{name}: {why}, and {found}.\nSet `base_model` to a folder or URI with the base's safetensors weights."
    )


def base_of_dora(name: str, base: str | None) -> str:
    """The base's location for a DoRA adapter. Raises what need_base raises."""
    return need_base(name, "is a DoRA adapter, whose deltas depend on the base's weights", base)


def digest_with_base(location: str, name: str, base: str | None) -> Any:
    """What decides an adapter's deltas: its digest, and for DoRA that of the base. Raises AdapterError."""
    digest = adapter_digest(location)
    if not describe(location, name, digest).dora:
        return digest
    return [digest, base_digest(base_of_dora(name, base))]
