"""What raymerge keeps of an adapter in its safetensors metadata, where other readers pass it over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from raymerge.errors import AdapterError

if TYPE_CHECKING:
    from raymerge.adapters.adapter import LoraAdapter

_STARTED_FROM, _ERRORS = "raymerge.started_from", "raymerge.errors"


def encode_metadata(adapter: LoraAdapter) -> dict[str, str]:
    """Where an adapter's training began and what it lost, where there is anything to say."""
    metadata = {}
    if adapter.started_from:
        metadata[_STARTED_FROM] = adapter.started_from
    if adapter.errors:
        metadata[_ERRORS] = compact(adapter.errors)
    return metadata


def started_from(metadata: Mapping[str, str]) -> str | None:
    """The adapter that a training began from."""
    return metadata.get(_STARTED_FROM) or None


def errors_of(metadata: Mapping[str, str], where: str) -> dict[str, float]:
    """Errors by module, empty where none are kept. Raises AdapterError if they cannot be read."""
    return numbers(metadata, _ERRORS, where)


def compact(values: Mapping[str, float]) -> str:
    """Numbers by name as one line of JSON, the same for equal values."""
    return json.dumps(dict(values), sort_keys=True, separators=(",", ":"))


def numbers(metadata: Mapping[str, str], key: str, where: str) -> dict[str, float]:
    """Numbers by name, as `compact` wrote them under a key. Raises AdapterError if they cannot be read."""
    try:
        return {str(name): float(value) for name, value in json.loads(metadata.get(key, "{}")).items()}
    except (ValueError, AttributeError, TypeError) as error:
        what = key.rpartition(".")[2]
        raise AdapterError(f"{where} has {what} in its metadata that cannot be read.\n{error}.") from error
