"""Adapters to merge, checked, in the order of their names, and seen module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch

from raymerge.adapters.adapter import LoraAdapter, LoraModule, ModuleHeader
from raymerge.errors import MergeError
from raymerge.merging.rank import RankRule
from raymerge.merging.settings import Setting, checked, depths, unmatched, value_at
from raymerge.merging.shapes import check_shapes
from raymerge.merging.site import Site


@dataclass(frozen=True)
class Inputs:
    """Adapters to merge.

    weights: as given, one for each expert. headers: of each module, sorted by path: that of each expert, None where it
    lacks the module, and the anchor's last. whole: names of whole tensors. depths: of modules and whole tensors.
    """

    experts: tuple[LoraAdapter, ...]
    weights: tuple[Setting, ...]
    anchor: LoraAdapter | None
    headers: Mapping[str, Sequence[ModuleHeader | None]]
    whole: Sequence[str]
    depths: Mapping[str, float]
    rule: RankRule

    @property
    def adapters(self) -> tuple[LoraAdapter, ...]:
        """Experts, and the anchor last where there is one."""
        return _together(self.experts, self.anchor)

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, sorted."""
        return tuple(expert.name for expert in self.experts)

    def shape(self, path: str) -> tuple[int, int]:
        """Shape of a module's delta: (out_features, in_features)."""
        return next(header.shape for header in self.headers[path] if header is not None)

    def kept(self, path: str) -> int:
        """The largest rank among the experts and the anchor: what `rank: keep` means."""
        return max(header.nominal or header.rank for header in self.headers[path] if header is not None)

    def weights_at(self, path: str) -> tuple[float, ...]:
        """The experts' weights at a module or whole tensor; 1 where no pattern of a weight fits it."""
        return tuple(value_at(weight, path, self.depths[path], 1.0) for weight in self.weights)

    def site(self, path: str) -> Site:
        """One module of all experts."""
        ranks = tuple(0 if header is None else header.rank for header in self.headers[path])
        anchor = None if self.anchor is None else self.anchor.modules.get(path)

        def read() -> Iterator[LoraModule | None]:
            for expert in self.experts:
                yield expert.modules.get(path)

        return Site(
            path,
            self.shape(path),
            self.names,
            self.weights_at(path),
            ranks[: len(self.experts)],
            anchor,
            self.rule,
            read,
            self.kept(path),
        )


Weights = Sequence[Setting] | Mapping[str, Setting] | None


def check_inputs(
    adapters: Sequence[LoraAdapter], weights: Weights, anchor: LoraAdapter | None, rule: RankRule
) -> Inputs:
    """Put adapters in the order of their names and check that they fit. Raises MergeError that says why not."""
    wrong = next((one for one in (*adapters, anchor) if one is not None and not isinstance(one, LoraAdapter)), None)
    if wrong is not None:
        raise MergeError(f"{wrong!r} is no adapter.\nRead it with load_adapter first.")
    weights = listed_weights([adapter.name for adapter in adapters], weights)
    order = sorted(range(len(adapters)), key=lambda i: adapters[i].name)
    experts = tuple(adapters[i] for i in order)
    for first, second in pairwise(experts):
        if first.name == second.name:
            raise MergeError(
                f"two adapters are named {first.name}.\nNames tell experts apart: they order the sum and seed what is "
                "random. Give one of them another name."
            )
    headers = _headers(experts, anchor)
    whole = sorted({name for adapter in _together(experts, anchor) for name in adapter.whole})
    places = depths([*headers, *whole])
    settings = tuple(_weight(adapters[i].name, weights[i], places) for i in order)
    return Inputs(experts, settings, anchor, headers, whole, places, rule)


def _together(experts: tuple[LoraAdapter, ...], anchor: LoraAdapter | None) -> tuple[LoraAdapter, ...]:
    return experts if anchor is None else (*experts, anchor)


def listed_weights(names: Sequence[str], weights: Weights) -> Sequence[Setting]:
    """One weight for each adapter, in their order: as given, by name, or 1/N each where none are given."""
    if weights is None:
        return [1 / len(names)] * len(names) if names else _unequal(0, 0)
    if isinstance(weights, str):
        raise MergeError(f"weights {weights!r} are a text.\nExpected a number for each adapter, such as [0.6, 0.4].")
    if isinstance(weights, Mapping):
        if sorted(weights) != sorted(names):
            raise MergeError(
                f"weights for {', '.join(sorted(weights))}, and adapters {', '.join(sorted(names))}.\n"
                "Expected one weight for each adapter, by its name."
            )
        return [weights[name] for name in names]
    return weights if names and len(weights) == len(names) else _unequal(len(names), len(weights))


def _unequal(adapters: int, weights: int) -> Sequence[Setting]:
    raise MergeError(f"{adapters} adapters and {weights} weights.\nExpected one weight for each adapter.")


def _headers(
    experts: tuple[LoraAdapter, ...], anchor: LoraAdapter | None
) -> Mapping[str, Sequence[ModuleHeader | None]]:
    adapters = _together(experts, anchor)
    headers_of = [adapter.headers for adapter in adapters]
    paths = sorted({path for headers in headers_of for path in headers})
    table = {path: [headers.get(path) for headers in headers_of] for path in paths}
    for path, headers in table.items():
        present = zip(adapters, headers, strict=True)
        check_shapes(path, ((adapter.name, header) for adapter, header in present if header is not None))
    if len(experts) > 1 and not _share(experts):
        listed = "; ".join(f"{e.name} has {', '.join(list(e.headers)[:2]) or 'none'}" for e in experts[:3])
        raise MergeError(f"the adapters share no module, so there is nothing to merge.\nFound {listed}.")
    return table


def _share(experts: Sequence[LoraAdapter]) -> bool:
    """Whether some module or whole tensor is in two experts at least."""
    seen: set[str] = set()
    for expert in experts:
        names = {*expert.headers, *expert.whole}
        if seen & names:
            return True
        seen |= names
    return False


def _weight(name: str, weight: Setting, paths: Mapping[str, object]) -> Setting:
    try:
        setting = checked(weight, lambda value: True, "a finite number")
    except ValueError as error:
        text = str(error)
        raise MergeError(f"{name}: its weight is {weight!r}.\n{text[0].upper()}{text[1:]}.") from error
    check_patterns(setting, paths, f"{name}: its weight")
    return setting


def check_patterns(setting: Setting, paths: Mapping[str, object], where: str) -> None:
    """Raise MergeError if a pattern fits no module: it is most likely mistyped."""
    lost = unmatched(setting, paths)
    if lost:
        raise MergeError(
            f"{where} names modules by {lost[0]!r}, which fits none.\n"
            f"Modules are named like {next(iter(paths), 'none')}."
        )


def widest_dtype(adapters: Sequence[LoraAdapter]) -> torch.dtype:
    """The dtype that holds the factors of all adapters."""
    found: torch.dtype = reduce(torch.promote_types, [adapter.dtype for adapter in adapters])
    return found
