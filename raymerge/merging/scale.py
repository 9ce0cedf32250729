"""The scale of a merge: a number, the norm of what is merged, or a multiple of that norm; and offsets from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from raymerge.errors import MergeError, unknown
from raymerge.merging.settings import Setting

Scale = float | Literal["match_norm"] | Mapping[str, float]
MOST_OFFSET = 3.0
_OFFSETS = "{clusters: {cluster_00: 0.2}, layers: [-0.1, 0, 0.1]}, or one of both"


def parse_scale(scale: Any) -> tuple[float, bool]:
    """A factor, and whether it multiplies the matched norm: 2, match_norm, or {"match_norm": 1.4}.

    Raises MergeError for anything else.
    """
    is_matched = scale == "match_norm" or (isinstance(scale, Mapping) and list(scale) == ["match_norm"])
    factor = scale["match_norm"] if isinstance(scale, Mapping) and is_matched else 1.0 if is_matched else scale
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        raise MergeError(f"scale {scale!r} is no scale.\nExpected a finite number, match_norm, or {{match_norm: 1.4}}.")
    if is_matched and factor <= 0:
        raise MergeError(f"scale {scale!r}: match_norm is multiplied by a number above 0.")
    return float(factor), is_matched


def scaled(scale: Scale, factor: float) -> Scale:
    """A scale times a factor above 0, in its shortest form. Raises MergeError for what is no scale."""
    own, is_matched = parse_scale(scale)
    if not is_matched:
        return own * factor
    return "match_norm" if own * factor == 1.0 else {"match_norm": own * factor}


def parse_offsets(written: Any) -> dict[str, Any]:
    """{"clusters": {label: d}, "layers": [d, ...]}, either or both: logarithms of factors on a scale, float.

    Raises MergeError for an unknown key, an empty part, and a number that is not from -MOST_OFFSET to MOST_OFFSET.
    """
    if not isinstance(written, Mapping) or not written:
        raise MergeError(f"scale_offsets are {written!r}.\nExpected {_OFFSETS}.")
    for key, part in written.items():
        if key not in ("clusters", "layers"):
            raise MergeError(unknown("key of scale_offsets", str(key), ("clusters", "layers")))
        if not part or not isinstance(part, Mapping if key == "clusters" else list | tuple):
            raise MergeError(f"scale_offsets.{key}: is {part!r}.\nExpected {_OFFSETS}.")
        for d in part.values() if isinstance(part, Mapping) else part:
            if isinstance(d, bool) or not isinstance(d, int | float) or not abs(d) <= MOST_OFFSET:
                raise MergeError(
                    f"scale_offsets.{key}: {d!r} cannot be an offset.\nExpected a logarithm from {-MOST_OFFSET:g} to "
                    f"{MOST_OFFSET:g}: 0.2 makes a scale 1.22 times as large, -0.2 0.82 times."
                )
    offsets = {
        "clusters": {str(label): float(d) for label, d in written.get("clusters", {}).items()},
        "layers": [float(d) for d in written.get("layers", ())],
    }
    return {key: part for key, part in offsets.items() if part}


def by_depth(weight: float, layers: Sequence[float]) -> Setting:
    """A weight times exp(d) at places spread over the depth of a model, from the first layer to the last; without any,
    the weight alone. See `settings` for what it is between two places."""
    return [weight * math.exp(d) for d in layers] if layers else weight
