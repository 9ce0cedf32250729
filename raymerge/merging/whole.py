"""What an adapter holds beside its factors: biases of its modules, and whole tensors that replace the base's.

They are merged like deltas and never compressed. A whole tensor's delta is what it adds to the base's, so the base is
needed; without it a weighted mean is still right (the base cancels) if all experts have the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.adapters.dora import dense_module
from raymerge.errors import MergeError
from raymerge.merging.exact import formed
from raymerge.merging.factors import cast
from raymerge.merging.inputs import Inputs
from raymerge.merging.rank import RankRule
from raymerge.merging.site import Combined, Dense, Site, Weighted

if TYPE_CHECKING:
    from raymerge.adapters.base_weights import BaseWeights

Combine = Callable[[Site, str], Combined]
_EXACT = RankRule("exact")
_MEAN = 1e-6  # by how much a sum of weights, or a scale, may differ from 1 and still be 1 but for rounding


def merge_biases(inputs: Inputs, combine: Combine, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Merged biases of those modules that have one in some expert or in the anchor: (out_features,) by module."""
    merged = {}
    for path, headers in inputs.headers.items():
        if any(header is not None and header.biased for header in headers):
            name = f"{path}.bias"
            site = _site(name, (inputs.shape(path)[0],), inputs, partial(_bias, path=path), path)
            merged[path] = cast(_result(site, combine(site, path), scale)[:, 0], dtype, name)
    return merged


def merge_whole(
    inputs: Inputs, combine: Combine, scale: float, base: BaseWeights | None, method: str
) -> dict[str, Tensor]:
    """Merged whole tensors by name, each in the widest dtype of the experts'. method: its name, or nothing for one of a
    dialect. Raises MergeError, naming the tensor, where the base is needed and not given."""
    merged = {}
    for name in inputs.whole:
        owners = [adapter for adapter in inputs.adapters if name in adapter.whole]
        lacked = base is not None and base.lacks(name)
        if base is None or lacked:
            _check_mean(name, owners[0].name, inputs, scale, method, lacked=lacked)
            _check_shapes(name, owners[0].whole_shapes[name], owners)
            result = _mean(name, inputs)
        else:
            start = base.weight(name).double()
            _check_shapes(name, tuple(start.shape), owners)
            site = _site(name, tuple(start.shape), inputs, partial(_moved, name=name, start=start))
            result = start + _result(site, combine(site, name), scale).reshape(start.shape)
        dtypes = [adapter.whole[name].dtype for adapter in owners]
        merged[name] = cast(result, reduce(torch.promote_types, dtypes), name)
    return merged


def _check_mean(name: str, owner: str, inputs: Inputs, scale: float, method: str, *, lacked: bool) -> None:
    """Raise MergeError unless the merge is a weighted mean, in which a base that is not known cancels."""
    weights = inputs.weights_at(name)
    lacking = next((expert.name for expert in inputs.experts if name not in expert.whole), None)
    why = None
    if lacking is not None:
        why = f"{lacking} does not have it"
    elif method != "linear":
        why = f"the method is {method or 'of a dialect'}, not linear"
    elif abs(math.fsum(weights) - 1) > _MEAN:
        why = f"the weights sum to {math.fsum(weights):.9g}, not to 1"
    elif inputs.anchor is not None:
        why = "there is an anchor"
    elif abs(scale - 1) > _MEAN:
        why = f"the scale is {scale:.9g}, not 1"
    if why is not None:
        mean = "only a mean is right: method linear, weights that sum to 1, scale 1."
        remedy = (
            f"The base given has no such tensor, so {mean}"
            if lacked
            else f"Give the base model (--base, a project's base_model, base=) to merge what it adds; without it {mean}"
        )
        raise MergeError(f"{owner}: {name} is stored whole, not as a delta, and {why}.\n{remedy}")


def _mean(name: str, inputs: Inputs) -> Tensor:
    total = torch.zeros(inputs.experts[0].whole_shapes[name], dtype=torch.float64)
    for weight, expert in zip(inputs.weights_at(name), inputs.experts, strict=True):
        total += weight * expert.whole[name].double()
    return total


def _check_shapes(name: str, expected: tuple[int, ...], owners: list[LoraAdapter]) -> None:
    for owner in owners:
        if owner.whole_shapes[name] != expected:
            raise MergeError(
                f"{owner.name}: {name} has shape {owner.whole_shapes[name]}, where {expected} was expected.\n"
                "Whole tensors merge where they replace the same tensor of the base; was a vocabulary resized?"
            )


def _bias(adapter: LoraAdapter, path: str) -> Tensor | None:
    module = adapter.modules.get(path)
    return None if module is None or module.bias is None else module.scaling * module.bias.double()


def _moved(adapter: LoraAdapter, name: str, start: Tensor) -> Tensor | None:
    return adapter.whole[name].double() - start if name in adapter.whole else None


def _site(
    name: str,
    shape: tuple[int, ...],
    inputs: Inputs,
    delta_of: Callable[[LoraAdapter], Tensor | None],
    place: str | None = None,
) -> Site:
    """A site of dense deltas, which are made one after the other. place: the module whose weights count."""
    matrix = (shape[0], math.prod(shape[1:]))

    def module_of(adapter: LoraAdapter) -> LoraModule | None:
        delta = delta_of(adapter)
        return None if delta is None else dense_module(delta.reshape(matrix), min(matrix))

    def read() -> Iterator[LoraModule | None]:
        return map(module_of, inputs.experts)

    ranks = (min(matrix),) * len(inputs.experts)
    anchor = None if inputs.anchor is None else module_of(inputs.anchor)
    return Site(name, matrix, inputs.names, inputs.weights_at(place or name), ranks, anchor, _EXACT, read)


def _result(site: Site, combined: Combined, scale: float) -> Tensor:
    """anchor + scale * merged, dense: float64, of the site's shape."""
    start = None if site.anchor is None else _delta(site.anchor)
    if isinstance(combined, Dense):
        total = scale * combined.delta.double()
    elif isinstance(combined, Weighted):
        total = torch.zeros(site.shape, dtype=torch.float64)
        for module, coefficient in zip(site.read(), combined.coefficients, strict=True):
            if module is not None and coefficient:
                total.add_(_delta(module), alpha=scale * coefficient)
        if start is not None:
            total.sub_(start, alpha=scale * math.fsum(combined.coefficients))
    else:
        total = scale * formed(site.shape, list(combined.factors))[0]
    return total if start is None else total.add_(start)


def _delta(module: LoraModule) -> Tensor:
    """What `dense_module` was given: its other side is an identity."""
    return module.B if module.in_features <= module.out_features else module.A
