"""Passes through the model with a mixture for each persona: losses, and their gradients for the mixtures' weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from raymerge.adapters.adapter import LoraAdapter, ModuleHeader
from raymerge.errors import ModelError
from raymerge.merging.gram import gram
from raymerge.models.answers import AnswerHead
from raymerge.models.base import BaseModel
from raymerge.models.layers import compute_dtype, frozen_weight, is_quantised, linear_modules, wrap
from raymerge.models.multilora import MultiLora
from raymerge.models.products import frozen_layer
from raymerge.models.router_rows import Shard
from raymerge.models.training.memory import TooLittleMemoryError, fitting_rows, ran_out, reason_of
from raymerge.models.training.rows import Limits, Portion, Taken, plan, portion

T = TypeVar("T")


@dataclass(frozen=True)
class Experts:
    """Experts by their numbers. load: some of them, in that order, whose modules may be read more than once. headers:
    of one, by module, without reading a weight."""

    load: Callable[[Sequence[int]], Sequence[LoraAdapter]]
    headers: Callable[[int], Mapping[str, ModuleHeader]]


@dataclass(frozen=True)
class Mixtures:
    """What the personas of a batch run with: experts int64 (p, k), numbers of resident ones, -1 nobody; weights
    float32 (p, k); factors: what multiplies the weights of each module, float32 (modules,), None where it is 1."""

    experts: Tensor
    weights: Tensor
    factors: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """What a batch has given: losses of its personas, nats per answer token, float32 (p,); gradients of the mean loss
    by weight and by factor; tokens of the rows."""

    losses: Tensor
    weights: Tensor
    factors: Tensor | None
    tokens: int


def bytes_by_module(base: BaseModel, numbers: Sequence[int], experts: Experts) -> dict[str, int]:
    """What a resident expert takes in each module that some expert changes, ranks padded to the largest of all: bytes
    by module, sorted. Reads headers alone.

    numbers: of the experts that may be resident.
    """
    linear = linear_modules(base.model)
    widest: dict[str, int] = {}
    for number in numbers:
        for path, header in experts.headers(number).items():
            item = compute_dtype(base.model, linear[path]).itemsize if path in linear else 4
            widest[path] = max(widest.get(path, 0), header.rank * sum(header.shape) * item)
    return dict(sorted(widest.items()))


class Passes:
    """A base model with the experts of one shard, at limits that memory has been found to allow.

    names: of the personas, for errors. modules: those that some expert changes, in the order of `Mixtures.factors`.
    rows: of one persona at once in a validation, at most.
    """

    def __init__(
        self,
        base: BaseModel,
        names: Sequence[str],
        experts: Experts,
        modules: Sequence[str],
        limits: Limits,
        rows: int,
        said: Callable[[str], None],
    ) -> None:
        self.limits = limits
        self.modules = tuple(modules)
        self._base, self._names, self._experts, self._rows, self._said = base, names, experts, rows, said
        self._lora = MultiLora(base.model)
        self._head = AnswerHead(base)
        self._resident: Shard | None = None
        self._products: dict[bytes, Tensor] = {}  # by the experts of a shard

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The context in which shards are brought and batches run; afterwards the model is as it was."""
        restores = []
        head = self._base.model.get_output_embeddings()
        if isinstance(head, nn.Linear) and not is_quantised(head):
            restores.append(wrap(head, frozen_layer(frozen_weight(head), head.bias)))
        try:
            yield
        finally:
            self._lora.detach()
            self._resident = None
            for restore in restores:
                restore()

    def bring(self, shard: Shard) -> Tensor:
        """Make the experts of a shard resident; the inner products of their deltas, float32 (n, n).

        Raises ModelError if memory does not hold them together, or the norm of one is not finite.
        """
        if self._resident is not shard:
            self._resident = None
            self._lora.detach()  # the memory of those before is free first
            try:
                self._take(shard)
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                raise ModelError(
                    f"{len(shard.experts)} experts do not fit into memory together.\n{reason_of(error)}\n"
                    "Set router.experts_memory to less than is free, or lower router.candidates."
                ) from error
            self._resident = shard
        return self._products[shard.experts.tobytes()]

    def _take(self, shard: Shard) -> None:
        adapters = self._experts.load(shard.experts.tolist())
        self._lora.load(adapters)
        linear, head = linear_modules(self._base.model), self._base.model.get_output_embeddings()
        self._head = AnswerHead(self._base, adapted=any(linear[n] is head for n in self._lora.module_names))
        key = shard.experts.tobytes()
        if key not in self._products:
            self._products[key] = _products(adapters).to(self._base.device)

    def losses(self, personas: Sequence[int], taken: Mapping[int, Taken], mixtures: Mixtures) -> Gradients:
        """Losses of personas, and the gradients of their mean.

        taken: by the place of the persona in `personas`, as in `mixtures`. Raises ModelError if a loss is not finite,
        or memory runs out at one row of one persona.
        """
        counts = self._counts(taken)

        def compute(limits: Limits) -> Gradients:
            weights = mixtures.weights.detach().clone().requires_grad_()
            factors = None if mixtures.factors is None else mixtures.factors.detach().clone().requires_grad_()
            total, tokens = torch.zeros_like(counts), 0
            for part, places in self._portions(taken, limits):
                nats = self._nats(part, places, replace(mixtures, weights=weights, factors=factors))
                own = self._checked(nats, part, personas).sum(1) / counts[places]
                torch.autograd.backward(own.sum() / len(counts))
                total.index_add_(0, places, own.detach())
                tokens += part.tokens
            assert weights.grad is not None
            return Gradients(total, weights.grad, None if factors is None else factors.grad, tokens)

        return self._fitting(taken, compute, most=None)

    @torch.no_grad()
    def validation(self, personas: Sequence[int], taken: Mapping[int, Taken], mixtures: Mixtures) -> Tensor:
        """Losses of personas without gradients, nats per answer token: float32 (p,). Raises what `losses` raises."""
        counts = self._counts(taken)

        def compute(limits: Limits) -> Tensor:
            total = torch.zeros_like(counts)
            for part, places in self._portions(taken, limits):
                nats = self._nats(part, places, mixtures)
                total.index_add_(0, places, self._checked(nats, part, personas).sum(1))
            return total / counts

        return self._fitting(taken, compute, most=self._rows)

    def _counts(self, taken: Mapping[int, Taken]) -> Tensor:
        return torch.tensor([float(own.answer_tokens) for own in taken.values()], device=self._base.device)

    def _portions(self, taken: Mapping[int, Taken], limits: Limits) -> Iterator[tuple[Portion, Tensor]]:
        for parts in plan(taken, limits, self._base.device.type):
            part = portion(taken, parts)
            yield part, torch.tensor(part.slots, device=self._base.device)

    def _fitting(self, taken: Mapping[int, Taken], compute: Callable[[Limits], T], most: int | None) -> T:
        """compute at the limits of memory. most: rows of a persona at once, whatever memory allows."""
        kind = self._base.device.type
        try:
            found, limits = fitting_rows(compute, self.limits, taken, kind, lambda _: None, most=most)
        except TooLittleMemoryError as error:
            _, reason, *_ = str(error).splitlines()
            resident = f"{len(self._lora.names)} experts ({math.ceil(self._lora.nbytes / 2**20):,} MiB)"
            raise ModelError(
                f"memory runs out at one row of one persona, beside {resident}.\n{reason}\n"
                "Set router.experts_memory so that fewer experts are in memory at a time, lower router.k, or set "
                "hardware.dtype to one of fewer bytes; a larger GPU helps too."
            ) from error
        if limits.rows != self.limits.rows:
            self._said(f"memory ran out at the rows of a persona: {limits.rows} at once from now on, accumulated")
        if limits.slots != self.limits.slots:
            self._said(f"memory ran out at the rows of several personas: those of {limits.slots} from now on, in turn")
        self.limits = limits
        return found

    def _nats(self, part: Portion, places: Tensor, mixtures: Mixtures) -> Tensor:
        """What the answer of each row costs: float32 (personas, rows)."""
        device = self._base.device
        factors = None
        if mixtures.factors is not None:
            by_module = dict(zip(self.modules, mixtures.factors.unbind(), strict=True))
            factors = {name: by_module[name] for name in self._lora.module_names}
        predicting = part.places.to(device)
        with self._lora.weighted(mixtures.experts[places], mixtures.weights[places], factors):
            logits = self._head.logits(part.ids.to(device), predicting)
        nats = nn.functional.cross_entropy(logits, part.targets.to(device), reduction="none")
        # laid out by place, so that every device sums in one order
        everywhere = nats.new_zeros(part.ids.numel()).index_copy(0, predicting, nats)
        return everywhere.view(len(part.slots), -1, part.ids.shape[1]).sum(2)

    def _checked(self, nats: Tensor, part: Portion, personas: Sequence[int]) -> Tensor:
        """The same costs. Raises ModelError, naming persona and answer, if one is not finite."""
        if math.isfinite(float(nats.detach().sum())):
            return nats
        place, row = (~torch.isfinite(nats)).nonzero()[0].tolist()
        ids = part.ids.view(*nats.shape, -1)[place, row]
        own = part.places.div(ids.numel(), rounding_mode="floor") == place * nats.shape[1] + row
        answer = self._base.tokenizer.decode(part.targets[own], skip_special_tokens=True)
        raise ModelError(
            f"{self._names[personas[part.slots[place]]]}: the loss of its answer {answer[:80]!r} is not finite.\n"
            "Its prompt or an expert of its mixture is more than the base can compute with in this dtype.\n"
            "Leave it out, or set hardware.dtype to float32."
        )


def _products(adapters: Sequence[LoraAdapter]) -> Tensor:
    """Inner products of deltas, float32 (n, n). Raises ModelError, naming the adapter, if a norm is not finite."""
    found = gram(adapters, "float32").float()
    if bool(torch.isfinite(found).all()):
        return found
    for adapter in adapters:  # products of one that is not finite spoil those of others
        if not bool(torch.isfinite(gram([adapter], "float32").float()).all()):
            raise ModelError(
                f"{adapter.name}: the norm of what it adds to the base is not finite.\n"
                "No mixture with it can be computed: leave it out, or train it again."
            )
    return found
