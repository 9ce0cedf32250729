"""A merge that is checked and not carried out: its inputs, its method, and the merged delta of each module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.dialects import method_of
from raymerge.merging.gram import inner_of, squared_norm_of
from raymerge.merging.inputs import Inputs, Weights, check_inputs, check_patterns
from raymerge.merging.methods import Method
from raymerge.merging.methods.parameters import Parameters
from raymerge.merging.rank import parse_rank
from raymerge.merging.site import Combined, Site


@dataclass(frozen=True)
class Merge:
    """What is merged, and how: inputs, a method and its parameters, both checked.

    squares: |a_i - anchor|^2 by (expert, module), noted while modules are read; None where nobody asks.
    """

    inputs: Inputs
    method: Method
    parameters: Parameters
    squares: dict[tuple[int, str], float] | None = None

    def site(self, path: str) -> Site:
        """One module of all experts. Where norms are asked for, they are noted as it is read."""
        site = self.inputs.site(path)
        if self.squares is None:
            return site
        squares = self.squares

        def read() -> Iterator[LoraModule | None]:
            for index, module in enumerate(site.read()):
                if (index, path) not in squares:
                    squares[index, path] = _squared_distance(module, site.anchor)
                yield module

        return replace(site, read=read)

    def combined(self, site: Site, path: str | None = None) -> Combined:
        """The merged delta of a site, from the anchor. path: of the module it belongs to, if not its own."""
        place = path or site.path
        depth = self.inputs.depths[place]
        if not self.method.signed and min(site.weights) < 0:
            name, weight = min(zip(site.names, site.weights, strict=True), key=lambda pair: pair[1])
            raise MergeError(f"{name}: weight {weight:g} is negative, which method {self.method.name} cannot use.")
        try:
            return self.method.load()(site, **self.parameters.at(place, depth))
        except MergeError as error:
            raise type(error)(f"{site.path}: {error}") from error


def prepare(
    adapters: Sequence[LoraAdapter],
    weights: Weights = None,
    *,
    method: str = "linear",
    dialect: str = "delta",
    rank: Any = "keep",
    anchor: LoraAdapter | None = None,
    measure: bool = False,
    **method_parameters: Any,
) -> Merge:
    """Check what `merge.merge` is asked for; arguments as there. measure: note the experts' norms as they are read.

    Raises MergeError, RankError.
    """
    chosen = method_of(method, dialect)
    parameters = chosen.resolve(method_parameters)
    rule = parse_rank(rank)
    inputs = check_inputs(adapters, weights, anchor, rule)
    chosen.check_experts(len(inputs.experts))
    for key in type(parameters).model_fields:
        check_patterns(getattr(parameters, key), inputs.depths, f"method {method}: {key}")
    if rule.kind == "exact":
        _refuse_dense(inputs, "rank exact would keep whole.\nChoose keep, a number, or an energy; the error is stated")
    if dialect == "peft":
        _refuse_dense(inputs, "peft's own merges do not see.\nUse dialect delta")
    return Merge(inputs, chosen, parameters, {} if measure else None)


def _refuse_dense(inputs: Inputs, why: str) -> None:
    for path, headers in inputs.headers.items():
        for adapter, header in zip(inputs.adapters, headers, strict=True):
            if header is not None and header.nominal is not None:
                raise MergeError(f"{adapter.name}: {path} is DoRA, a delta of full rank, which {why}.")


def _squared_distance(module: LoraModule | None, anchor: LoraModule | None) -> float:
    if anchor is None:
        return 0.0 if module is None else squared_norm_of(module)
    if module is None:
        return squared_norm_of(anchor)
    return max(squared_norm_of(module) - 2 * inner_of(module, anchor) + squared_norm_of(anchor), 0.0)
