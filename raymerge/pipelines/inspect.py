"""`raymerge inspect`: what adapters are, what is unusual about them, and which merge together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.errors import ModelError, RaymergeError
from raymerge.pipelines.inspection.adapter import Inspected, inspect_adapter, with_weights_read
from raymerge.pipelines.inspection.groups import Group, group
from raymerge.pipelines.inspection.places import find_adapters
from raymerge.runtime.progress import passing_line

if TYPE_CHECKING:
    from raymerge.pipelines.inspection.similarity import Similarity

MATRIX, MAP = "similarity.json", "similarity.png"
OUT = "inspect"


@dataclass(frozen=True)
class Inspection:
    """Adapters in the order of their names, the groups that merge, and, where asked for, the cosines of deltas."""

    adapters: tuple[Inspected, ...]
    groups: tuple[Group, ...]
    warnings: tuple[str, ...]
    similarity: Similarity | None

    def to_json(self) -> dict[str, Any]:
        """Everything, as mappings and lists."""
        found: dict[str, Any] = {
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "groups": [group.to_json() for group in self.groups],
            "warnings": list(self.warnings),
        }
        return found if self.similarity is None else {**found, "similarity": self.similarity.to_json()}


def inspect(
    given: Sequence[str],
    *,
    similarity: bool = False,
    out: str | None = None,
    base: str | None = None,
    allow_pickle: bool = False,
    norm: bool = True,
    as_json: bool = False,
) -> int:
    """Look at adapters and print what is found; with similarity, write the matrix as JSON and PNG into `out`.

    given: folders, folders above them, or patterns. out: a folder, by default `inspect`; with as_json nothing is
    written unless it is given. base: the base model's weights, which DoRA needs. norm: read the weights; without it the
    headers alone. Raises AdapterError for an argument that leads to no adapter, and ModelError if there is no base
    where it should be. Returns the exit status: 1 if some adapter cannot be read.
    """
    found = inspection(given, similarity=similarity, base=base, allow_pickle=allow_pickle, norm=norm)
    folder = OUT if out is None and not as_json else out
    if folder is not None and found.similarity is not None and found.similarity.names:
        _write(found.similarity, storage.resolve(os.getcwd(), folder))
    if as_json:
        print(storage.encode_json(found.to_json()).decode(), end="")
    else:
        _show(found, folder or OUT)
    return 1 if any(adapter.error is not None for adapter in found.adapters) else 0


def inspection(
    given: Sequence[str],
    *,
    similarity: bool = False,
    base: str | None = None,
    allow_pickle: bool = False,
    norm: bool = True,
) -> Inspection:
    """What inspect prints, as data."""
    weights = None
    if base is not None:
        from raymerge.adapters.base_weights import BaseWeights

        place = storage.resolve(os.getcwd(), base)
        if not storage.exists(place):
            raise ModelError(f"{place}: there is no base model.\nExpected a folder with safetensors weights.")
        weights = BaseWeights(place)
    adapters = []
    places = find_adapters(given)
    with passing_line() as say:
        with _one_thread():
            for number, (name, location) in enumerate(places.items(), 1):
                say(f"adapter {number} of {len(places)}")
                adapters.append(inspect_adapter(location, name, base=weights, allow_pickle=allow_pickle, norm=norm))
        groups = group(_readable(adapters))
        found: Similarity | None = None
        if similarity:
            say("similarities")
            adapters, groups, found = _similar(adapters, groups)
    return Inspection(tuple(adapters), tuple(groups), tuple(_warnings(groups)), found)


def _readable(adapters: Sequence[Inspected]) -> list[Inspected]:
    return [adapter for adapter in adapters if adapter.error is None]


def _similar(adapters: list[Inspected], groups: list[Group]) -> tuple[list[Inspected], list[Group], Similarity]:
    """Similarities of the adapters whose weights can be read; the others are told apart only where some cannot."""
    from raymerge.pipelines.inspection.similarity import measure

    try:
        return adapters, groups, measure(groups, _readable(adapters))
    except RaymergeError:
        checked = [with_weights_read(adapter) for adapter in adapters]
        readable = _readable(checked)
        if len(readable) == len(_readable(adapters)):  # it is none of them
            raise
        groups = group(readable)
        return checked, groups, measure(groups, readable)


def _warnings(groups: Sequence[Group]) -> Iterator[str]:
    """Adapters that fit each other and name different base models may still come from one: a base has many names."""
    for number, one in enumerate(groups, 1):
        if len(one.bases) > 1:
            which = "the adapters name" if len(groups) == 1 else f"group {number} names"
            named = sorted(one.bases.items(), key=lambda pair: (-pair[1], pair[0]))
            listed = ", ".join(f"{base} ({count})" for base, count in named[:4])
            more = f" and {len(named) - 4} more" if len(named) > 4 else ""
            yield f"{which} {len(named)} base models: {listed}{more}. Merge them only if these are the same."


def _write(similarity: Similarity, folder: str) -> None:
    from raymerge.evaluation.drawing import png, styled
    from raymerge.evaluation.similarity_map import similarity_map

    with styled():
        picture = png(similarity_map(similarity.names, similarity.cosines))
    storage.write_json(storage.join(folder, MATRIX), similarity.to_json())
    storage.write_bytes(storage.join(folder, MAP), picture)


def _show(found: Inspection, out: str) -> None:
    from rich.console import Console

    from raymerge.pipelines.inspection.table import overview, similarity_lines

    console = Console(highlight=False)
    console.print(overview(found.adapters, found.groups, found.warnings))
    if found.similarity is None:
        return
    console.print(similarity_lines(found.similarity))
    if found.similarity.names:
        where = storage.join(out, MAP)
        console.print(f"\nWrote {where} and {storage.join(out, MATRIX)}", soft_wrap=True, markup=False)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Norms are many small products, which several threads would only slow down."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
