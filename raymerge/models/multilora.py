"""Many adapters on one resident base model: every row of a batch has its own adapter, or its own mixture.

The factors of all loaded adapters are stacked per module, ranks padded with zeros (a module that an adapter lacks is
all zero). Rows that share an adapter stand together, so a module costs two batched products whatever the number of
adapters: h = x A^T, y += h B^T. A mixture of k experts is one adapter of k times the rank, its weights folded into B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raymerge.adapters.adapter import LoraAdapter, ModuleHeader
from raymerge.errors import ModelError
from raymerge.models.dealing import Layout, plan_layout
from raymerge.models.layers import Forward, compute_dtype, frozen_weight, is_quantised, linear_modules, shape_of, wrap
from raymerge.models.products import frozen_product
from raymerge.models.weighted import WeightedLayer, check_factors, frozen, place_mixture

# Copies of factors that a batch of mixtures may make beyond twice what is loaded, in bytes.
_MIXTURE_COPIES = 256 * 2**20

# Adds to a layer's output (batch, ..., out_features), in place, what the adapters make of its input.
AddDelta = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Factors:
    """One module's factors of n adapters, scaling folded into Bt.

    A: (n, rank, in_features). Bt: (n, rank, out_features). Both in the dtype that the layer computes in, on its device.
    """

    A: Tensor
    Bt: Tensor


class MultiLora:
    """Adapters attached to a model; without an active `rows`, `mixtures` or `weighted` the model is the base."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: tuple[str, ...] = ()
        self._factors: dict[str, Factors] = {}
        self._active: Mapping[str, AddDelta | WeightedLayer] = {}
        self._restores: list[Callable[[], None]] = []
        self._unchanged: list[nn.Module] = []

    @property
    def module_names(self) -> tuple[str, ...]:
        """Modules that some loaded adapter changes, sorted."""
        return tuple(self._factors)

    @property
    def nbytes(self) -> int:
        """Bytes of the stacked factors on all devices."""
        return sum(_nbytes(f) for f in self._factors.values())

    def load(self, adapters: Sequence[LoraAdapter]) -> None:
        """Attach these adapters, in this order, in place of all that were loaded.

        Raises ModelError if an adapter names a module that the model lacks, or has another shape;
        UnsupportedAdapterError if one holds more than deltas of linear modules.
        """
        self.detach()
        linear = linear_modules(self.model)
        headers = [adapter.headers for adapter in adapters]
        for adapter, own in zip(adapters, headers, strict=True):
            adapter.require_plain("cannot be run in a batch with others")
            check_fits(adapter.name, own, linear)
        self.names = tuple(adapter.name for adapter in adapters)
        for name in sorted({name for own in headers for name in own}):
            having = {number: own[name].rank for number, own in enumerate(headers) if name in own}
            self._factors[name] = _stacked(
                adapters, name, having, linear[name], compute_dtype(self.model, linear[name])
            )
            self._restores.append(wrap(linear[name], self._adapter_of(name, linear[name])))
        self._unchanged = [own for name, own in linear.items() if name not in self._factors and not is_quantised(own)]

    def detach(self) -> None:
        """Put the model back as it was and forget the adapters."""
        for restore in self._restores:
            restore()
        self._restores, self._factors, self.names, self._unchanged = [], {}, (), []

    @contextmanager
    def rows(self, index: Tensor | Sequence[int]) -> Iterator[None]:
        """Run row i of every batch with adapter `index[i]`; -1 is the base alone.

        index: int64 (batch,). Raises ModelError if an index names no adapter.
        """
        chosen = [int(i) for i in index]
        if chosen and not -1 <= min(chosen) <= max(chosen) < len(self.names):
            found = f"{min(chosen)} to {max(chosen)}"
            raise ModelError(f"rows name adapters {found}.\nExpected -1 to {len(self.names) - 1}.")
        layout = plan_layout(chosen)
        chosen_factors = {name: _selected(f, layout.adapters) for name, f in self._factors.items()}
        with self._activated(_grouped(chosen_factors, layout)):
            yield

    @contextmanager
    def mixtures(self, weights: Tensor) -> Iterator[None]:
        """Run row i of every batch with the sum over adapters j of weights[i, j] times adapter j.

        weights: floating (batch, adapters); a row of zeros is the base. Raises ModelError if the shape differs or a
        weight is not finite.
        """
        weights = torch.as_tensor(weights).detach().to("cpu", torch.float64)
        if weights.ndim != 2 or weights.shape[1] != len(self.names):
            raise ModelError(f"mixture weights are {tuple(weights.shape)}.\nExpected (rows, {len(self.names)}).")
        if not bool(torch.isfinite(weights).all()):
            raise ModelError("mixture weights hold NaN or Inf.\nEvery weight must be a finite number.")
        unique, inverse = torch.unique(weights, dim=0, return_inverse=True)
        most = int((unique != 0).sum(1).max()) if len(unique) else 0
        used = torch.nonzero((weights != 0).any(0)).flatten()
        if self._is_cheaper_apart(len(unique), most, len(used)):
            index = torch.where((unique != 0).any(1)[inverse], inverse, -1)
            layout = plan_layout(index.tolist())
            active = _grouped(self._mixed(unique, max(most, 1), layout), layout)
        else:
            active = {n: add_dense(_selected(f, used), weights[:, used]) for n, f in self._factors.items()}
        with self._activated(active):
            yield

    @contextmanager
    def weighted(self, experts: Tensor, weights: Tensor, factors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Run a batch of groups, equally many rows each and in order: group g with the sum over j of weights[g, j]
        times adapter experts[g, j]. Gradients flow into weights and factors and the layers' inputs, not into the base.

        experts: int64 (groups, k), -1 is nobody. weights: floating (groups, k). factors: by module, a 0-d tensor that
        multiplies the weights there. Raises ModelError if shapes differ, an expert or a module is not loaded, or a
        weight is not finite.
        """
        check_factors(factors or {}, self._factors)
        mixtures = place_mixture(experts, weights, {own.A.device for own in self._factors.values()}, len(self.names))
        active = {
            name: WeightedLayer(own.A, own.Bt, mixtures[own.A.device].times((factors or {}).get(name)))
            for name, own in self._factors.items()
        }
        with self._activated(active), frozen(self._unchanged):
            yield

    def _is_cheaper_apart(self, unique: int, most: int, used: int) -> bool:
        """Whether mixtures run as adapters of their own rather than as one product over all experts in use."""
        copies = unique * most * (self.nbytes // max(len(self.names), 1))
        return used == 0 or (2 * most <= used and copies <= max(2 * self.nbytes, _MIXTURE_COPIES))

    def _mixed(self, unique: Tensor, most: int, layout: Layout) -> dict[str, Factors]:
        chosen = unique[layout.adapters]
        experts = torch.argsort((chosen != 0).to(torch.int8), dim=1, descending=True, stable=True)[:, :most]
        weights = chosen.gather(1, experts)
        mixed = {}
        for name, factors in self._factors.items():
            place = factors.A.device
            A = factors.A[experts.to(place)].flatten(1, 2)
            Bt = factors.Bt[experts.to(place)] * weights.to(place, factors.Bt.dtype)[:, :, None, None]
            mixed[name] = Factors(A, Bt.flatten(1, 2))
        return mixed

    @contextmanager
    def _activated(self, active: Mapping[str, AddDelta | WeightedLayer]) -> Iterator[None]:
        if self._active:
            raise ModelError("rows, mixtures or weights are active already.\nLeave one `with` block before the next.")
        self._active = active
        try:
            yield
        finally:
            self._active = {}

    def _adapter_of(self, name: str, layer: Any) -> Callable[[Forward, Tensor], Tensor]:
        weight = None if is_quantised(layer) else frozen_weight(layer)

        def adapt(original: Forward, x: Tensor) -> Tensor:
            add = self._active.get(name)
            if add is None:
                return original(x)
            if isinstance(add, WeightedLayer):
                return add.answer(original, x, weight, layer.bias)
            if weight is not None and not torch.is_grad_enabled():
                out = frozen_product(x, weight, layer.bias)
            else:
                out = original(x).clone()  # autograd may need what the layer computed
            add(out, x)
            return out

        return adapt


def add_grouped(factors: Factors, layout: Layout) -> AddDelta:
    """What adds each row's delta, one batched product for A and one for B; factors are in the order of the groups."""
    At, Bt = factors.A.transpose(1, 2), factors.Bt
    groups, inner, outer = len(At), At.shape[1], Bt.shape[2]

    def add_in_order(out: Tensor, x: Tensor) -> None:
        if x.shape[0] != layout.batch:
            x, out = _as_rows(x.contiguous(), layout.batch), _as_rows(out, layout.batch)
        out.view(groups, -1, outer).baddbmm_(torch.bmm(x.reshape(groups, -1, inner), At), Bt)

    def add_dealt(out: Tensor, x: Tensor) -> None:
        assert layout.slots is not None
        assert layout.rows is not None
        assert layout.places is not None
        x, out = _as_rows(x.contiguous(), layout.batch), _as_rows(out, layout.batch)
        dealt = x.index_select(0, layout.slots).view(groups, -1, inner)
        delta = torch.bmm(torch.bmm(dealt, At), Bt).view(len(layout.slots), -1, outer)
        out.index_add_(0, layout.rows, delta.index_select(0, layout.places))

    return add_in_order if layout.slots is None else add_dealt


def add_dense(factors: Factors, weights: Tensor) -> AddDelta:
    """What adds each row's mixture: one product over all experts, scaled in between by weights (batch, experts).

    Copies of the weights go to each module's device: they are a few thousand numbers.
    """
    batch, experts = weights.shape
    A, Bt = factors.A.flatten(0, 1), factors.Bt.flatten(0, 1)
    scale = weights.to(A.device, A.dtype)[:, None, :, None]

    def add(out: Tensor, x: Tensor) -> None:
        inner = _as_rows(x.contiguous(), batch) @ A.T
        scaled = inner.view(batch, -1, experts, len(A) // experts) * scale
        _as_rows(out, batch).view(-1, Bt.shape[1]).addmm_(scaled.view(-1, len(A)), Bt)

    return add


def _as_rows(x: Tensor, batch: int) -> Tensor:
    """(batch, tokens, features), also where a model has flattened batch and tokens."""
    if x.ndim == 3 and x.shape[0] == batch:
        return x
    if x.ndim != 2 or batch == 0 or x.shape[0] % batch:
        raise ModelError(f"a batch of {x.shape[0]} rows meets adapters for {batch}.\nName one adapter for each row.")
    return x.view(batch, -1, x.shape[1])


def _grouped(factors: Mapping[str, Factors], layout: Layout) -> dict[str, AddDelta]:
    if not len(layout.adapters):
        return {}
    layouts = {device: layout.on(device) for device in {own.A.device for own in factors.values()}}
    return {name: add_grouped(own, layouts[own.A.device]) for name, own in factors.items()}


def _nbytes(factors: Factors) -> int:
    return factors.A.nbytes + factors.Bt.nbytes


def _selected(factors: Factors, adapters: Tensor) -> Factors:
    """The factors of some adapters, int64 on the CPU; the very same tensors where it is all of them in order."""
    if torch.equal(adapters, torch.arange(len(factors.A))):
        return factors
    adapters = adapters.to(factors.A.device)
    return Factors(factors.A.index_select(0, adapters), factors.Bt.index_select(0, adapters))


def check_fits(adapter: str, headers: Mapping[str, ModuleHeader], linear: Mapping[str, nn.Module]) -> None:
    """Raise ModelError if an adapter names a linear layer that the model lacks, or one of another shape."""
    for name, header in headers.items():
        if name not in linear:
            near = ", ".join(list(linear)[:3])
            raise ModelError(f"{adapter}: the model has no linear layer {name}.\nIt has {near}, ...")
        if header.shape != shape_of(linear[name]):
            raise ModelError(
                f"{adapter}: {name} is {header.shape} (out, in), the model's is {shape_of(linear[name])}.\n"
                "The adapter was trained on another base model."
            )


def _stacked(
    adapters: Sequence[LoraAdapter], name: str, ranks: Mapping[int, int], layer: Any, dtype: torch.dtype
) -> Factors:
    """One module's factors of all adapters, ranks by the number of the adapter; each is read once."""
    outer, inner = shape_of(layer)
    A = torch.zeros(len(adapters), max(ranks.values()), inner, dtype=dtype)
    Bt = torch.zeros(len(adapters), max(ranks.values()), outer, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for number, rank in ranks.items():
        module = adapters[number].modules[name]
        A[number, :rank] = module.A.detach()
        Bt[number, :rank] = (module.B.detach().to(wide) * module.scaling).T
    return Factors(A.to(layer.weight.device), Bt.to(layer.weight.device))
