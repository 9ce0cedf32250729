"""Merging adapters: each module's deltas are combined by a method and compressed, and the error is stated."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import MergeError
from raymerge.merging.factors import Compressed, Factor, Truncation, filled, rounded
from raymerge.merging.inputs import Inputs, Weights, widest_dtype
from raymerge.merging.lowrank import sum_norm, truncate, truncate_formed
from raymerge.merging.prepare import Merge, prepare
from raymerge.merging.rank import RankRule
from raymerge.merging.scale import Scale, parse_scale
from raymerge.merging.site import Combined, Dense, Site, Weighted
from raymerge.merging.whole import merge_biases, merge_whole

if TYPE_CHECKING:
    from raymerge.adapters.base_weights import BaseWeights

_FLOATS: Mapping[str, torch.dtype] = {
    name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")
}
WHOLE = "*"  # the key of an adapter's overall error
_T = TypeVar("_T")


def merge(
    adapters: Sequence[LoraAdapter],
    weights: Weights = None,
    *,
    method: str = "linear",
    dialect: str = "delta",
    rank: Any = "keep",
    scale: Scale = 1.0,
    anchor: LoraAdapter | None = None,
    base: BaseWeights | None = None,
    dtype: torch.dtype | str | None = None,
    name: str = "merged",
    **method_parameters: Any,
) -> LoraAdapter:
    """Merge adapters into one: anchor + scale * merge(a_i - anchor), compressed to a rank module by module.

    adapters: of any ranks, scalings, dtypes and target modules; a module that one lacks is a zero delta. They are
    only read, module by module, so that adapters from open_adapter are never in memory whole. They are taken in the
    order of their names. weights: for each a number, or a setting that differs by layer or module (`settings`), in
    their order or by name; 1/N unless given. method, method_parameters: see `methods.METHODS`. dialect: `delta`, or a
    library whose numbers are wanted (`dialects.DIALECTS`). rank: see `rank.parse_rank`. scale: a number, or match_norm
    for the mean norm of what is merged: sum(|w_i| |a_i|) / |merge(a_i)|, or {"match_norm": f} for f times that.
    anchor: an adapter that deltas are measured from, or None for the base. base: the base model's weights, which whole
    tensors need (see `whole`). dtype: of the result, the experts' widest unless given.

    Returns an adapter with scalings of 1 and the relative Frobenius error of each module, rounding included, and of
    the whole under `*`. Warns if the adapters name different base models. Raises MergeError, RankError.
    """
    factor, is_matched = parse_scale(scale)
    later = is_matched and anchor is None  # the norm to be matched is known when all modules are summed
    merging = prepare(
        adapters, weights, method=method, dialect=dialect, rank=rank, anchor=anchor, measure=later, **method_parameters
    )
    inputs = merging.inputs
    _check_dialect(dialect, anchor, scale)
    target = _dtype(dtype, inputs)
    if is_matched and not later:
        factor *= _matched_scale(merging)
    found: dict[str, Compressed | Truncation] = {}
    with torch.no_grad():
        for path in inputs.headers:
            site = merging.site(path)
            truncated = _truncate(site, merging.combined(site), factor)
            if later:
                found[path] = truncated if target == torch.float64 else _narrowed(truncated)
            else:
                found[path] = rounded(truncated, 1.0, target, f"{name}: {path}")
        final = _matched(merging, [one.norm / factor for one in found.values()]) if later else 1.0
        done: dict[str, Compressed] = {}
        for path in inputs.headers:
            one = found.pop(path)
            done[path] = rounded(one, final, target, f"{name}: {path}") if isinstance(one, Truncation) else one
        biases = merge_biases(inputs, merging.combined, factor * final, target)
        whole = merge_whole(inputs, merging.combined, factor * final, base, method if dialect == "delta" else "")
    return _as_adapter(name, merging, done, biases, whole)


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
    if all(module is None for module in modules):
        raise MergeError("No expert has this module, so its shape is unknown.")
    merged = merge(adapters, weights, method=method, rank=rank, dtype=dtype, **method_parameters)
    return merged.modules["module"], merged.errors["module"]


def matched_scale(adapters: Sequence[LoraAdapter], weights: Weights = None, anchor: LoraAdapter | None = None) -> float:
    """The scale that gives a linear merge the mean norm of what it merges: sum(|w_i| |a_i|) / |sum(w_i a_i)|, with a_i
    measured from the anchor; 1 where the sum is zero. Nothing is compressed for it."""
    return _matched_scale(prepare(adapters, weights, anchor=anchor))


def mixture_weights(
    adapters: Sequence[LoraAdapter],
    weights: Sequence[float],
    scale: Scale = 1.0,
    anchor: LoraAdapter | None = None,
    products: torch.Tensor | None = None,
) -> tuple[list[float], float]:
    """Weights at which a mixture of experts and anchor computes what their linear merge at rank exact does.

    products: inner products of the deltas of the adapters and, last, of the anchor where there is one (`gram`), if they
    are known; then no adapter is read. Returns the experts' weights in the order given, and the anchor's (0 without).
    """
    factor, is_matched = parse_scale(scale)
    if is_matched and products is not None:
        factor *= _matched_by(products, weights, anchored=anchor is not None)
    elif is_matched:
        factor *= matched_scale(adapters, weights, anchor)
    return [factor * weight for weight in weights], 1.0 - factor * sum(weights) if anchor is not None else 0.0


def _matched_by(products: torch.Tensor, weights: Sequence[float], *, anchored: bool) -> float:
    """`matched_scale` from inner products, the anchor's last: float64 (n, n) or (n + 1, n + 1)."""
    products = products.double()
    if anchored:
        to_anchor = products[:-1, -1]
        products = products[:-1, :-1] - to_anchor[:, None] - to_anchor + products[-1, -1]
    w = torch.tensor(weights, dtype=torch.float64)
    wanted = float((w.abs() * products.diagonal().clamp(min=0).sqrt()).sum())
    there = math.sqrt(max(float(w @ products @ w), 0.0))
    return wanted / there if there > 0 else 1.0


def _check_dialect(dialect: str, anchor: LoraAdapter | None, scale: Scale) -> None:
    if dialect != "delta" and (anchor is not None or parse_scale(scale)[1]):
        what = "an anchor" if anchor is not None else "match_norm"
        raise MergeError(f"dialect {dialect} cannot be used with {what}, which that library lacks.\nUse dialect delta.")
    if dialect == "peft" and scale != 1:
        raise MergeError("dialect peft has no scale.\nMultiply the weights, or use dialect delta.")


def _truncate(site: Site, combined: Combined, scale: float) -> Truncation:
    """anchor + scale * merged, at the best rank that the site's rule allows."""
    anchor = site.anchor
    if isinstance(combined, Dense):
        S = combined.delta.double().mul_(scale)
        if anchor is not None:
            S.addmm_(anchor.B.double(), anchor.A.double(), alpha=anchor.scaling)
        return truncate_formed(S, site.rule, site.kept)
    if isinstance(combined, Weighted):
        coefficients = [scale * c for c in combined.coefficients]
        ranks = [*site.ranks, 0 if anchor is None else anchor.rank]
        return truncate(site.shape, ranks, lambda: _weighted(site, coefficients), site.rule, kept=site.kept, as_is=True)
    factors = [f._replace(weight=f.weight * scale) for f in combined.factors]
    if anchor is not None:
        factors.append(Factor(anchor.B, anchor.A, anchor.scaling))
    rule = RankRule("exact") if combined.cut and anchor is None else site.rule
    return truncate(site.shape, [f.rank for f in factors], lambda: factors, rule, kept=site.kept, as_is=True)


def _weighted(site: Site, coefficients: Sequence[float], anchored: float = 1.0) -> Iterator[Factor]:
    """anchored * anchor + sum(c_i (a_i - anchor)), as (anchored - sum(c_i)) * anchor + sum(c_i a_i), read one by one.

    Nothing is rounded here: coefficients and scalings travel beside the factors.
    """
    if site.anchor is not None:
        yield Factor(site.anchor.B, site.anchor.A, (anchored - sum(coefficients)) * site.anchor.scaling)
    for module, coefficient in zip(site.read(), coefficients, strict=True):
        if module is not None:
            yield Factor(module.B, module.A, coefficient * module.scaling)


def _narrowed(found: Truncation) -> Truncation:
    return replace(found, B=found.B.float(), A=found.A.float())


def _matched_scale(merging: Merge) -> float:
    measured = replace(merging, squares={})
    with torch.no_grad():
        return _matched(
            measured, [_norm(site, measured.combined(site)) for site in map(measured.site, measured.inputs.headers)]
        )


def _norm(site: Site, combined: Combined) -> float:
    """Frobenius norm of a merged delta, from the anchor. Reads every expert once at least."""
    if isinstance(combined, Dense):
        return float(torch.linalg.matrix_norm(combined.delta.double()))
    if not isinstance(combined, Weighted):
        factors = list(combined.factors)
        return sum_norm(site.shape, [f.rank for f in factors], lambda: factors)
    ranks = [*site.ranks, 0 if site.anchor is None else site.anchor.rank]
    return sum_norm(site.shape, ranks, lambda: _weighted(site, combined.coefficients, anchored=0.0))


def _matched(merging: Merge, norms: Sequence[float]) -> float:
    """sum(|w_i| |a_i|) over the norm of the merged delta, over all modules; |w_i a_i| where a weight varies."""
    squares = [0.0] * len(merging.inputs.experts)
    shares = {path: merging.inputs.weights_at(path) for path in merging.inputs.headers}
    for (index, path), square in sorted((merging.squares or {}).items()):
        squares[index] += shares[path][index] ** 2 * square
    wanted = math.fsum(math.sqrt(square) for square in squares)
    there = math.sqrt(math.fsum(norm**2 for norm in norms))
    return wanted / there if there > 0 else 1.0


def _as_adapter(
    name: str,
    merging: Merge,
    done: Mapping[str, Compressed],
    biases: Mapping[str, torch.Tensor],
    whole: Mapping[str, torch.Tensor],
) -> LoraAdapter:
    inputs = merging.inputs
    if inputs.rule.uniform and done:
        widest = max(one.A.shape[0] for one in done.values())
        done = {path: filled(one, widest) for path, one in done.items()}
    norm = math.sqrt(math.fsum(one.norm**2 for one in done.values()))
    lost = math.sqrt(math.fsum((one.error * one.norm) ** 2 for one in done.values()))
    errors = {path: one.error for path, one in done.items()}
    embedded = {path for path in done if any(h is not None and h.embedding for h in inputs.headers[path])}
    return LoraAdapter(
        name=name,
        modules={
            path: LoraModule(one.A, one.B, 1.0, bias=biases.get(path), embedding=path in embedded)
            for path, one in done.items()
        },
        base_model=_base_model(inputs.experts),
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in inputs.experts),
        task_type=_common([adapter.task_type for adapter in inputs.experts]),
        started_from=_common([adapter.started_from for adapter in inputs.experts]),
        errors={WHOLE: lost / norm if norm else 0.0, **errors},
        whole=whole,
        modules_to_save=tuple(sorted({name for one in inputs.experts for name in one.modules_to_save})),
        bias_mode=next((one.bias_mode for one in inputs.experts if one.bias_mode != "none"), "none"),
        notes=() if merging.method.note is None else (merging.method.note,),
    )


def _base_model(experts: Sequence[LoraAdapter]) -> str | None:
    names: dict[str, str] = {}
    for adapter in experts:
        if adapter.base_model is not None:
            names.setdefault(adapter.base_model, adapter.name)
    if len(names) > 1:
        listed = ", ".join(f"{base} ({name})" for base, name in list(names.items())[:4])
        warnings.warn(f"The adapters name different base models: {listed}. They are merged as one.", stacklevel=4)
    return next(iter(names), None)


def _common(values: Sequence[_T]) -> _T | None:
    return values[0] if all(value == values[0] for value in values) else None


def _dtype(dtype: torch.dtype | str | None, inputs: Inputs) -> torch.dtype:
    if dtype is None:
        return widest_dtype(inputs.adapters)
    chosen = _FLOATS.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _FLOATS.values():
        raise MergeError(f"dtype {dtype!r} cannot hold an adapter.\nAllowed: {', '.join(_FLOATS)}.")
    return chosen
