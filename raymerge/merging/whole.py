"""What an adapter holds beside its factors: biases of its modules, and whole tensors that replace the base's.

They are merged like deltas and never compressed. A whole tensor's delta is what it adds to the base's, so the base is
needed; without it a weighted mean is still right (the base cancels) if all experts have the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.errors import AdapterError, MergeError
from raymerge.merging.exact import formed
from raymerge.merging.factors import Factor
from raymerge.merging.inputs import Inputs
from raymerge.merging.rank import RankRule
from raymerge.merging.site import Combined, Dense, Site, Weighted

if TYPE_CHECKING:
    from raymerge.adapters.base_weights import BaseWeights

Combine = Callable[[Site, str], Combined]
_EXACT = RankRule("exact")


def merge_biases(inputs: Inputs, combine: Combine, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Merged biases of those modules that have one in some expert or in the anchor: (out_features,) by module."""
    merged = {}
    for path, headers in inputs.headers.items():
        if not any(header is not None and header.biased for header in headers):
            continue
        experts = [_bias(adapter, path) for adapter in inputs.experts]
        anchor = None if inputs.anchor is None else _bias(inputs.anchor, path)
        site = _site(f"{path}.bias", experts, anchor, inputs, path)
        merged[path] = _result(site, combine(site, path), scale)[:, 0].to(dtype)
    return merged


def merge_whole(
    inputs: Inputs, combine: Combine, scale: float, base: BaseWeights | None, method: str
) -> dict[str, Tensor]:
    """Merged whole tensors by name, each in the widest dtype of the experts'. method: its name, or nothing for one of a
    dialect. Raises MergeError, naming the tensor, where the base is needed and not given."""
    merged = {}
    for name in inputs.whole:
        tensors = [expert.whole.get(name) for expert in inputs.experts]
        anchor = None if inputs.anchor is None else inputs.anchor.whole.get(name)
        start = _of_base(base, name)
        if start is None:
            result = _without_base(name, inputs, tensors, scale, method, lacked=base is not None)
        else:
            result = _on_base(name, inputs, tensors, anchor, combine, scale, start)
        dtypes = [tensor.dtype for tensor in (*tensors, anchor) if tensor is not None]
        merged[name] = result.to(reduce(torch.promote_types, dtypes))
    return merged


def _of_base(base: BaseWeights | None, name: str) -> Tensor | None:
    """The base's tensor; None where it has none, as of a head that was trained from nothing."""
    if base is None:
        return None
    try:
        return base.weight(name)
    except AdapterError:
        return None


def _without_base(
    name: str, inputs: Inputs, tensors: Sequence[Tensor | None], scale: float, method: str, *, lacked: bool
) -> Tensor:
    weights = inputs.weights_at(name)
    lacking = next((n for n, tensor in zip(inputs.names, tensors, strict=True) if tensor is None), None)
    why = None
    if lacking is not None:
        why = f"{lacking} does not have it"
    elif method != "linear":
        why = f"the method is {method or 'of a dialect'}, not linear"
    elif abs(math.fsum(weights) - 1) > 1e-6:
        why = f"the weights sum to {math.fsum(weights):g}, not to 1"
    elif scale != 1 or inputs.anchor is not None:
        why = "there is an anchor" if inputs.anchor is not None else f"the scale is {scale:g}, not 1"
    if why is not None:
        remedy = (
            "The base given has no such tensor, so only a mean is right: method linear, weights that sum to 1, scale 1."
            if lacked
            else "Give the base model (--base, or base=BaseWeights(...)): the delta is what it adds to the base's."
        )
        raise MergeError(f"{name} is stored whole, not as a delta, and {why}.\n{remedy}")
    found = [tensor for tensor in tensors if tensor is not None]
    _check_shapes(name, found[0].shape, dict(zip(inputs.names, found, strict=True)))
    total = torch.zeros(found[0].shape, dtype=torch.float64)
    for weight, tensor in zip(weights, found, strict=True):
        total += weight * tensor.double()
    return total


def _on_base(
    name: str,
    inputs: Inputs,
    tensors: Sequence[Tensor | None],
    anchor: Tensor | None,
    combine: Combine,
    scale: float,
    base: Tensor,
) -> Tensor:
    owned = {n: t for n, t in zip((*inputs.names, "anchor"), (*tensors, anchor), strict=True) if t is not None}
    _check_shapes(name, base.shape, owned)
    start = base.double()
    deltas = [None if tensor is None else _as_module(tensor.double() - start) for tensor in tensors]
    origin = None if anchor is None else _as_module(anchor.double() - start)
    site = _site(name, deltas, origin, inputs)
    return start + _result(site, combine(site, name), scale).reshape(start.shape)


def _check_shapes(name: str, expected: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    for owner, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(expected):
            raise MergeError(
                f"{owner}: {name} has shape {tuple(tensor.shape)}, where {tuple(expected)} was expected.\n"
                "Whole tensors merge where they replace the same tensor of the base; was a vocabulary resized?"
            )


def _bias(adapter: LoraAdapter, path: str) -> LoraModule | None:
    module = adapter.modules.get(path)
    if module is None or module.bias is None:
        return None
    one = torch.ones(1, 1, dtype=module.bias.dtype, device=module.bias.device)
    return LoraModule(one, module.bias[:, None], module.scaling)


def _as_module(delta: Tensor) -> LoraModule:
    """A dense delta as a product with the identity of its smaller side; a vector is a matrix of one column."""
    matrix = delta.reshape(delta.shape[0], -1) if delta.ndim != 1 else delta[:, None]
    out, into = matrix.shape
    if into <= out:
        return LoraModule(torch.eye(into, dtype=matrix.dtype), matrix, 1.0)
    return LoraModule(matrix, torch.eye(out, dtype=matrix.dtype), 1.0)


def _site(
    path: str, modules: Sequence[LoraModule | None], anchor: LoraModule | None, inputs: Inputs, place: str | None = None
) -> Site:
    shape = next(module.shape for module in (*modules, anchor) if module is not None)
    ranks = tuple(0 if module is None else module.rank for module in modules)
    return Site(
        path, shape, inputs.names, inputs.weights_at(place or path), ranks, anchor, _EXACT, lambda: iter(modules)
    )


def _result(site: Site, combined: Combined, scale: float) -> Tensor:
    """anchor + scale * merged, dense: float64, of the site's shape."""
    if isinstance(combined, Dense):
        merged = combined.delta.double()
    else:
        if isinstance(combined, Weighted):
            factors = [
                factor._replace(weight=factor.weight * coefficient)
                for delta, coefficient in zip(site.deltas(), combined.coefficients, strict=True)
                for factor in delta
            ]
        else:
            factors = list(combined.factors)
        merged = formed(site.shape, factors)[0]
    total = scale * merged
    if site.anchor is not None:
        total += formed(site.shape, [Factor(site.anchor.B, site.anchor.A, site.anchor.scaling)])[0]
    return total
