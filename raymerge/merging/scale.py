"""The scale of a merge: a number, the norm of what is merged, or a multiple of that norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from raymerge.errors import MergeError

Scale = float | Literal["match_norm"] | Mapping[str, float]


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
