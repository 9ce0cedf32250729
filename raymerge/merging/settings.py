"""Weights and densities that differ by layer and by module: what is written, and what it is at one module.

A setting is a number; a list of numbers, spread over the depth of the model and interpolated between; or a mapping of
patterns of module paths to either, of which the first that fits counts. No torch is imported here.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Setting = float | Sequence[float] | Mapping[str, "float | Sequence[float]"]

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_FIRST = re.compile(r"embed(?!_out)|wte|wpe")


def depths(paths: Iterable[str]) -> dict[str, float]:
    """How deep in the model each module lies, from 0 (first layer) to 1 (last).

    The layer is the first number in a path. A module of no layer lies at 0 if its name is that of an embedding, else
    at 1, as a head does.
    """
    layers: dict[str, int] = {}
    outside: dict[str, float] = {}
    for path in paths:
        match = _LAYER.search(path)
        if match:
            layers[path] = int(match[1])
        else:
            outside[path] = 0.0 if _FIRST.search(path) else 1.0
    last = max(layers.values(), default=0)
    return {**{path: layer / last if last else 0.0 for path, layer in layers.items()}, **outside}


def value_at(setting: Setting, path: str, depth: float, otherwise: float) -> float:
    """What a setting is at a module. otherwise: where no pattern fits."""
    if isinstance(setting, Mapping):
        for pattern, value in setting.items():
            if fnmatch.fnmatchcase(path, pattern):
                return value_at(value, path, depth, otherwise)
        return otherwise
    if isinstance(setting, Sequence):
        place = depth * (len(setting) - 1)
        before = min(int(place), len(setting) - 1)
        after = min(before + 1, len(setting) - 1)
        share = place - before
        return float(setting[before] if share == 0 else setting[before] * (1 - share) + setting[after] * share)
    return float(setting)


def unmatched(setting: Setting, paths: Iterable[str]) -> list[str]:
    """Patterns of a setting that fit no module: most likely mistyped."""
    if not isinstance(setting, Mapping):
        return []
    known = list(paths)
    return [pattern for pattern in setting if not fnmatch.filter(known, pattern)]


def checked(setting: Any, allowed: Callable[[float], bool], expected: str) -> Setting:
    """A setting whose every number is finite and allowed. Raises ValueError that says what was expected."""
    if isinstance(setting, Mapping):
        if not setting:
            raise ValueError(f"expected {expected}, or patterns of modules with one each; found none")
        return {str(pattern): _plain(value, allowed, expected) for pattern, value in setting.items()}
    return _plain(setting, allowed, expected)


def _plain(value: Any, allowed: Callable[[float], bool], expected: str) -> float | list[float]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise ValueError(f"expected {expected}, or a list of them from the first layer to the last; found none")
        return [_number(one, allowed, expected) for one in value]
    return _number(value, allowed, expected)


def _number(value: Any, allowed: Callable[[float], bool], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not allowed(value):
        raise ValueError(f"expected {expected}; found {value!r}")
    return float(value)
