"""Merging adapters: each module's deltas are combined by a method and compressed, and the error is stated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, TypeVar

import torch

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.factors import Compressed, Factor, Truncation, filled, rounded
from raymerge.merging.gram import inner_of, squared_norm_of
from raymerge.merging.lowrank import sum_norm, truncate
from raymerge.merging.methods import METHODS, Method
from raymerge.merging.methods.linear import anchor_share
from raymerge.merging.rank import RankRule, parse_rank

_FLOATS: Mapping[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")
}
Scale = float | Literal["match_norm"]
WHOLE = "*"  # the key of an adapter's overall error
_T = TypeVar("_T")


@dataclass(frozen=True)
class Inputs:
    """Adapters to merge, checked and in the order of their names.

    shapes, ranks: of each module, sorted; ranks of those experts that have it, and the anchor's. squares: where they
    are wanted, |a_i - anchor|^2 by (expert, module), noted while the modules are read.
    """

    experts: tuple[LoraAdapter, ...]
    weights: tuple[float, ...]
    anchor: LoraAdapter | None
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, Sequence[int]]
    squares: dict[tuple[int, str], float] | None

    def anchor_module(self, path: str) -> LoraModule | None:
        """The anchor's module, or None."""
        return None if self.anchor is None else self.anchor.modules.get(path)

    def modules(self, path: str, anchor: LoraModule | None) -> Iterator[LoraModule | None]:
        """One module of each expert, read one after the other."""
        for index, adapter in enumerate(self.experts):
            module = adapter.modules.get(path)
            if self.squares is not None:
                self.squares[index, path] = _squared_distance(module, anchor)
            yield module


def merge(
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    *,
    method: str = "linear",
    rank: Any = "keep",
    scale: Scale = 1.0,
    anchor: LoraAdapter | None = None,
    dtype: torch.dtype | str | None = None,
    name: str = "merged",
    **method_parameters: Any,
) -> LoraAdapter:
    """Merge adapters into one: anchor + scale * merge(a_i - anchor), compressed to a rank module by module.

    adapters: of any ranks, scalings, dtypes and target modules; a module that one lacks is a zero delta. They are
    only read, one module at a time, so that adapters from open_adapter are never in memory whole. They are summed in
    the order of their names. weights: one number for each. rank: see `rank.parse_rank`. scale: a number, or match_norm
    for sum(|w_i| |a_i|) / |sum(w_i a_i)|. anchor: an adapter that deltas are measured from, or None for the base.
    dtype: of the result, the experts' widest unless given.

    Returns an adapter with scalings of 1 and the relative Frobenius error of each module, rounding included, and of
    the whole under `*`. Warns if the adapters name different base models. Raises MergeError, RankError.
    """
    chosen, parameters = _method(method, method_parameters)
    rule, factor = parse_rank(rank), _scale(scale)
    later = factor is None and anchor is None  # the norm to be matched is known when all modules are summed
    inputs = _checked(adapters, weights, anchor, measure=later)
    target = _dtype(dtype, inputs)
    if factor is None:
        factor = 1.0 if later else matched_scale(adapters, weights, anchor)
    found: dict[str, Compressed | Truncation] = {}
    with torch.no_grad():
        for path in inputs.shapes:
            truncated = _truncate(inputs, path, chosen, parameters, rule, factor)
            found[path] = _narrowed(truncated) if later else rounded(truncated, 1.0, target)
        final = _matched(inputs, [one.norm for one in found.values()]) if later else 1.0
        done: dict[str, Compressed] = {}
        for path in inputs.shapes:
            one = found.pop(path)
            done[path] = rounded(one, final, target) if isinstance(one, Truncation) else one
    return _as_adapter(name, inputs, done, rule)


def merge_module(
    modules: Sequence[LoraModule | None],
    weights: Sequence[float],
    method: str = "linear",
    rank: Any = "keep",
    *,
    dtype: torch.dtype | str | None = None,
    **method_parameters: Any,
) -> tuple[LoraModule, float]:
    """Merge one module of several adapters; None where one lacks it. Returns it, and its relative Frobenius error."""
    names = [f"expert {index:09}" for index in range(len(modules))]
    adapters = [LoraAdapter(n, {} if m is None else {"module": m}) for n, m in zip(names, modules, strict=True)]
    merged = merge(adapters, weights, method=method, rank=rank, dtype=dtype, **method_parameters)
    if not merged.modules:
        raise MergeError("No expert has this module, so its shape is unknown.")
    return merged.modules["module"], merged.errors["module"]


def matched_scale(
    adapters: Sequence[LoraAdapter], weights: Sequence[float], anchor: LoraAdapter | None = None
) -> float:
    """The scale that gives a linear merge the mean norm of what it merges: sum(|w_i| |a_i|) / |sum(w_i a_i)|, with a_i
    measured from the anchor; 1 where the sum is zero. Nothing is compressed for it."""
    inputs = _checked(adapters, weights, anchor, measure=True)
    norms = []
    with torch.no_grad():
        for path, shape in inputs.shapes.items():
            start = inputs.anchor_module(path)

            def differences(path: str = path, start: LoraModule | None = start) -> Iterator[Factor]:
                if start is not None:
                    yield Factor(start.B, start.A, -sum(inputs.weights) * start.scaling)
                yield from METHODS["linear"].combine(inputs.modules(path, start), inputs.weights, None, 1.0)

            norms.append(sum_norm(shape, inputs.ranks[path], differences))
    return _matched(inputs, norms)


def mixture_weights(
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    scale: Scale = 1.0,
    anchor: LoraAdapter | None = None,
) -> tuple[list[float], float]:
    """Weights at which a mixture of experts and anchor computes what their linear merge at rank exact does.

    Returns the experts' weights in the order given, and the anchor's (0 without one).
    """
    factor = _scale(scale)
    if factor is None:
        factor = matched_scale(adapters, weights, anchor)
    return [factor * weight for weight in weights], anchor_share(weights, factor) if anchor is not None else 0.0


def _truncate(
    inputs: Inputs, path: str, method: Method, parameters: Mapping[str, Any], rule: RankRule, scale: float
) -> Truncation:
    anchor = inputs.anchor_module(path)

    def factors() -> Iterator[Factor]:
        return method.combine(inputs.modules(path, anchor), inputs.weights, anchor, scale, **parameters)

    try:
        return truncate(inputs.shapes[path], inputs.ranks[path], factors, rule)
    except MergeError as error:
        raise type(error)(f"{path}: {error}") from error


def _narrowed(found: Truncation) -> Truncation:
    return replace(found, B=found.B.float(), A=found.A.float())


def _squared_distance(module: LoraModule | None, anchor: LoraModule | None) -> float:
    if anchor is None:
        return 0.0 if module is None else squared_norm_of(module)
    if module is None:
        return squared_norm_of(anchor)
    return max(squared_norm_of(module) - 2 * inner_of(module, anchor) + squared_norm_of(anchor), 0.0)


def _matched(inputs: Inputs, norms: Sequence[float]) -> float:
    squares = [0.0] * len(inputs.experts)
    for (index, _), square in sorted((inputs.squares or {}).items()):
        squares[index] += square
    wanted = math.fsum(abs(w) * math.sqrt(square) for w, square in zip(inputs.weights, squares, strict=True))
    there = math.sqrt(math.fsum(norm**2 for norm in norms))
    return wanted / there if there > 0 else 1.0


def _as_adapter(name: str, inputs: Inputs, done: Mapping[str, Compressed], rule: RankRule) -> LoraAdapter:
    if rule.uniform and done:
        widest = max(one.A.shape[0] for one in done.values())
        done = {path: filled(one, widest) for path, one in done.items()}
    norm = math.sqrt(math.fsum(one.norm**2 for one in done.values()))
    lost = math.sqrt(math.fsum((one.error * one.norm) ** 2 for one in done.values()))
    errors = {path: one.error for path, one in done.items()}
    return LoraAdapter(
        name=name,
        modules={path: LoraModule(one.A, one.B, 1.0) for path, one in done.items()},
        base_model=_base_model(inputs.experts),
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in inputs.experts),
        task_type=_common([adapter.task_type for adapter in inputs.experts]),
        started_from=_common([adapter.started_from for adapter in inputs.experts]),
        errors={WHOLE: lost / norm if norm else 0.0, **errors},
    )


def _base_model(experts: Sequence[LoraAdapter]) -> str | None:
    named: dict[str, str] = {}
    for adapter in experts:
        if adapter.base_model is not None:
            named.setdefault(adapter.base_model, adapter.name)
    if len(named) > 1:
        listed = ", ".join(f"{base} ({name})" for base, name in list(named.items())[:4])
        warnings.warn(f"The adapters name different base models: {listed}. They are merged as one.", stacklevel=4)
    return next(iter(named), None)


def _common(values: Sequence[_T]) -> _T | None:
    return values[0] if all(value == values[0] for value in values) else None


def _checked(
    adapters: Sequence[LoraAdapter], weights: Sequence[float], anchor: LoraAdapter | None, *, measure: bool
) -> Inputs:
    if not adapters or len(adapters) != len(weights):
        raise MergeError(f"{len(adapters)} adapters and {len(weights)} weights.\nExpected one weight for each adapter.")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not math.isfinite(weight):
            raise MergeError(f"{adapter.name}: its weight is {weight!r}.\nExpected a finite number.")
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].name, weights[i]))
    experts = tuple(adapters[i] for i in order)
    first: dict[str, tuple[tuple[int, int], str]] = {}
    ranks: dict[str, list[int]] = {}
    for adapter in (*experts, *((anchor,) if anchor is not None else ())):
        for path, header in adapter.headers.items():
            shape, owner = first.setdefault(path, (header.shape, adapter.name))
            if shape != header.shape:
                raise MergeError(
                    f"{adapter.name}: {path} has shape {header.shape}, but {shape} in {owner}.\n"
                    "Shapes are (out_features, in_features). They were trained on different base models."
                )
            ranks.setdefault(path, []).append(header.rank)
    shapes = {path: first[path][0] for path in sorted(first)}
    return Inputs(experts, tuple(float(weights[i]) for i in order), anchor, shapes, ranks, {} if measure else None)


def _method(name: str, given: Mapping[str, Any]) -> tuple[Method, Mapping[str, Any]]:
    if name not in METHODS:
        raise MergeError(f"unknown method {name!r}.\nAllowed: {', '.join(sorted(METHODS))}.")
    method = METHODS[name]
    unknown = sorted(set(given) - set(method.parameters))
    if unknown:
        allowed = ", ".join(sorted(method.parameters)) or "none"
        raise MergeError(f"unknown parameter {unknown[0]!r} of method {name}.\nAllowed: {allowed}.")
    return method, {**method.parameters, **given}


def _scale(scale: Scale) -> float | None:
    """A number, or None for match_norm."""
    if scale == "match_norm":
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise MergeError(f"scale {scale!r} is no scale.\nExpected a finite number or match_norm.")
    return float(scale)


def _dtype(dtype: torch.dtype | str | None, inputs: Inputs) -> torch.dtype:
    if dtype is None:
        found = [adapter.dtype for adapter in (*inputs.experts, *((inputs.anchor,) if inputs.anchor else ()))]
        widest: torch.dtype = reduce(torch.promote_types, found)
        return widest
    chosen = _FLOATS.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _FLOATS.values():
        raise MergeError(f"dtype {dtype!r} cannot hold an adapter.\nAllowed: {', '.join(_FLOATS)}.")
    return chosen
