"""Which adapters merge together, and why others do not: by the shapes of their modules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymerge.adapters.adapter import ModuleHeader
    from raymerge.pipelines.inspection.adapter import Inspected

Shape = tuple[tuple[int, ...], bool]  # of the delta or the whole tensor, and whether it is an embedding's


@dataclass(frozen=True)
class Group:
    """Adapters that merge together. apart: for each group before this one, why the two do not merge; empty where they
    share no module. bases: how many of its adapters name which base model. strangers: pairs of sets of its adapters; no
    adapter of the one shares a module with one of the other, so that two such alone do not merge."""

    names: tuple[str, ...]
    apart: tuple[str, ...]
    bases: Mapping[str, int]
    strangers: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As mappings and lists."""
        return {
            "adapters": list(self.names),
            "apart": [why or "they share no module" for why in self.apart],
            "base_models": dict(self.bases),
            "share_no_module": [[list(first), list(second)] for first, second in self.strangers],
        }


@dataclass
class _Growing:
    """A group while adapters are sorted into it. shapes: of each module, and who brought it."""

    members: list[Inspected]
    shapes: dict[str, tuple[Shape, str]]

    def why_not(self, other: _Growing) -> str | None:
        """Why another group does not merge with this one, empty where they share no module; None if it does."""
        shared = self.shapes.keys() & other.shapes.keys()
        if not shared:
            return ""
        path = min((path for path in shared if self.shapes[path][0] != other.shapes[path][0]), default=None)
        if path is None:
            return None
        (here, owner), (there, stranger) = self.shapes[path], other.shapes[path]
        return f"{path} has {_words(there)} in {stranger}, {_words(here)} in {owner}"

    def absorb(self, other: _Growing) -> None:
        self.members += other.members
        self.shapes = other.shapes | self.shapes


def group(adapters: Sequence[Inspected]) -> list[Group]:
    """Sort readable adapters into groups, those with most modules first, each into the first that it merges with."""
    groups: list[_Growing] = []
    for one in sorted((_alone(adapter) for adapter in adapters), key=lambda g: (-len(g.shapes), g.members[0].name)):
        _sort_in(one, groups)
    while _joined(groups):
        pass
    return [
        Group(
            tuple(sorted(adapter.name for adapter in one.members)),
            tuple(other.why_not(one) or "" for other in groups[:number]),
            dict(sorted(Counter(a.base_model for a in one.members if a.base_model).items())),
            tuple(_strangers(one.members)),
        )
        for number, one in enumerate(groups)
    ]


def _strangers(members: Sequence[Inspected]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Adapters with the same modules are one set, so that there are few pairs however many adapters."""
    alike: dict[frozenset[str], list[str]] = defaultdict(list)
    for adapter in sorted(members, key=lambda adapter: adapter.name):
        alike[frozenset(_shapes(adapter))].append(adapter.name)
    for (first, some), (second, others) in combinations(alike.items(), 2):
        if first.isdisjoint(second):
            yield tuple(some), tuple(others)


def _sort_in(one: _Growing, groups: list[_Growing]) -> None:
    home = next((other for other in groups if other.why_not(one) is None), None)
    if home is None:
        groups.append(one)
    else:
        home.absorb(one)


def _joined(groups: list[_Growing]) -> bool:
    """Whether a group found a home in an earlier one, which has grown since."""
    before = len(groups)
    again, groups[:] = groups[:], []
    for one in again:
        _sort_in(one, groups)
    return len(groups) < before


def _alone(adapter: Inspected) -> _Growing:
    return _Growing([adapter], {path: (shape, adapter.name) for path, shape in _shapes(adapter).items()})


def _shapes(adapter: Inspected) -> dict[str, Shape]:
    headers: Mapping[str, ModuleHeader] = adapter.headers or {}
    modules: dict[str, Shape] = {path: (header.shape, header.embedding) for path, header in headers.items()}
    return modules | {name: (shape, False) for name, shape in (adapter.whole or {}).items()}


def _words(shape: Shape) -> str:
    return f"shape {shape[0]}{' (an embedding)' if shape[1] else ''}"
