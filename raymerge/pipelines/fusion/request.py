"""A fuse as it was asked for, what that means, and the command that says the same."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge import storage
from raymerge.merging.methods import Method
from raymerge.merging.settings import Setting


@dataclass(frozen=True)
class Request:
    """The command line as written. Locations are relative to the working directory; None is what was not given."""

    adapters: Sequence[str]
    out: str
    weights: str | None = None
    weights_file: str | None = None
    normalize: bool = False
    method: str = "linear"
    parameters: Mapping[str, str] = field(default_factory=dict)
    rank: str = "keep"
    uniform: bool = False
    scale: str = "1"
    anchor: str | None = None
    base: str | None = None
    dtype: str | None = None
    dialect: str = "delta"
    format: str = "peft"
    allow_pickle: bool = False
    explain: bool = False
    sweep: str | None = None
    name: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Source:
    """An adapter to fuse: its name, its location as written, and where that is."""

    name: str
    written: str
    location: str


@dataclass(frozen=True)
class Fusion:
    """One adapter to make, in the folder named. parameters: of the method, those that were given. weights: one for
    each adapter, in the order given. equal: whether they are those that nobody asked for."""

    name: str
    folder: str
    method: Method
    parameters: Mapping[str, Any]
    weights: tuple[Setting, ...]
    equal: bool = False


@dataclass(frozen=True)
class Meant:
    """A request with its meaning. fusions: one, or those of a sweep."""

    request: Request
    sources: tuple[Source, ...]
    fusions: tuple[Fusion, ...]
    rank: Any
    scale: Any


def merges_of(meant: Meant, fusion: Fusion) -> dict[str, Any]:
    """What decides how the adapters become one, with all parameters: as the manifest holds it."""
    request = meant.request
    return {
        "method": fusion.method.name,
        "method_parameters": fusion.method.resolve(fusion.parameters).model_dump(mode="json"),
        "dialect": request.dialect,
        "scale": meant.scale,
        "rank": meant.rank,
        "anchor": request.anchor,
        "dtype": request.dtype,
        "format": request.format,
    }


def shown(meant: Meant, fusion: Fusion) -> str:
    """A fusion's folder as the request writes it."""
    return meant.request.out if meant.request.sweep is None else storage.join(meant.request.out, fusion.name)


def command(meant: Meant, fusion: Fusion) -> str:
    """The command that makes a fusion by itself, from the same working directory."""
    request = meant.request
    words = [["raymerge", "fuse", *request.adapters], ["--out", shown(meant, fusion)]]
    if not fusion.equal:
        words.append(["--weights", ",".join(written(weight) for weight in fusion.weights)])
    words.append(["--method", fusion.method.name])
    words += [["--param", f"{name}={written(value)}"] for name, value in fusion.parameters.items()]
    words += [["--rank", request.rank], *([["--uniform"]] if request.uniform else [])]
    plain = {"scale": "1", "anchor": None, "base": None, "dtype": None, "dialect": "delta", "format": "peft"}
    for name, usual in plain.items():
        if getattr(request, name) != usual:
            words.append([f"--{name}", getattr(request, name)])
    if request.allow_pickle:
        words.append(["--allow-pickle"])
    if fusion.name != storage.name_of(shown(meant, fusion)):
        words.append(["--name", fusion.name])
    return " \\\n  ".join(shlex.join(part) for part in words)


def written(setting: Any) -> str:
    """A setting as the command line takes it."""
    return setting if isinstance(setting, str) else json.dumps(setting)
