"""Which adapters merge with each other, and why others do not: by the shapes of their modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymerge.adapters.adapter import ModuleHeader
    from raymerge.pipelines.inspect_adapter import Inspected

Shape = tuple[tuple[int, ...], bool]  # of the delta or the whole tensor, and whether it is an embedding's


@dataclass(frozen=True)
class Group:
    """Adapters that merge with each other. apart: for each group before this one, why the two do not merge; empty where
    they share no module. bases: how many of its adapters name which base model."""

    names: tuple[str, ...]
    apart: tuple[str, ...]
    bases: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """As mappings and lists."""
        apart = [why or "they share no module" for why in self.apart]
        return {"adapters": list(self.names), "apart": apart, "base_models": dict(self.bases)}


@dataclass
class _Growing:
    """A group while adapters are sorted into it: each module's shape, and who brought it."""

    members: list[Inspected] = field(default_factory=list)
    shapes: dict[str, tuple[Shape, str]] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)

    def why_not(self, name: str, shapes: Mapping[str, Shape]) -> str | None:
        """Why an adapter does not merge with this group, empty where they share no module; None if it does."""
        shared = [path for path in shapes if path in self.shapes]
        if not shared:
            return ""
        for path in shared:
            there, owner = self.shapes[path]
            if there != shapes[path]:
                return f"{path} has {_words(shapes[path])} in {name}, {_words(there)} in {owner}"
        return None

    def add(self, adapter: Inspected, shapes: Mapping[str, Shape]) -> None:
        self.members.append(adapter)
        for path, shape in shapes.items():
            self.shapes.setdefault(path, (shape, adapter.name))


def group(adapters: Sequence[Inspected]) -> list[Group]:
    """Sort readable adapters into groups, each into the first that it merges with, those with most modules first."""
    groups: list[_Growing] = []
    found = {adapter.name: _shapes(adapter) for adapter in adapters}
    for adapter in sorted(adapters, key=lambda a: (-len(found[a.name]), a.name)):
        shapes, reasons = found[adapter.name], []
        for one in groups:
            why = one.why_not(adapter.name, shapes)
            if why is None:
                one.add(adapter, shapes)
                break
            reasons.append(why)
        else:
            new = _Growing(apart=reasons)
            new.add(adapter, shapes)
            groups.append(new)
    return [
        Group(
            tuple(sorted(adapter.name for adapter in one.members)),
            tuple(one.apart),
            dict(sorted(Counter(a.base_model for a in one.members if a.base_model).items())),
        )
        for one in groups
    ]


def _shapes(adapter: Inspected) -> dict[str, Shape]:
    headers: Mapping[str, ModuleHeader] = adapter.headers or {}
    modules: dict[str, Shape] = {path: (header.shape, header.embedding) for path, header in headers.items()}
    return modules | {name: (shape, False) for name, shape in (adapter.whole or {}).items()}


def _words(shape: Shape) -> str:
    return f"shape {shape[0]}{' (an embedding)' if shape[1] else ''}"
