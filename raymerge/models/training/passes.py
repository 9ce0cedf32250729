"""Passes through the model: losses and gradients of many adapters' rows, in as many portions as memory asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from raymerge.models.adapted import Part, attached
from raymerge.models.answers import AnswerHead
from raymerge.models.base import BaseModel
from raymerge.models.dropout import Dropout, row_keys
from raymerge.models.stacked import FactorStack
from raymerge.models.training.memory import fitting_rows, recomputing
from raymerge.models.training.rows import Limits, Portion, Taken, plan, portion
from raymerge.models.training.settings import TrainingSettings

T = TypeVar("T")


class Passes:
    """Runs rows through the model with the adapters of a stack, at limits that memory has been found to allow."""

    def __init__(
        self,
        base: BaseModel,
        layers: Mapping[str, nn.Module],
        stack: FactorStack,
        settings: TrainingSettings,
        limits: Limits,
        said: Callable[[str], None],
    ) -> None:
        self.limits = limits
        self._base, self._layers, self._stack, self._settings, self._said = base, layers, stack, settings, said
        self._part = Part()
        head = base.model.get_output_embeddings()
        self._head = AnswerHead(base, adapted=any(layer is head for layer in layers.values()))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The context in which the model runs with the adapters."""
        again = recomputing(self._base.model) if self._settings.gradient_checkpointing else nullcontext()
        with attached(self._base.model, self._layers, self._stack, lambda: self._part), again:
            yield

    def losses(self, taken: Mapping[int, Taken], steps: Mapping[int, tuple[str, int]]) -> tuple[list[float], int]:
        """Gradients of each slot's mean loss over the answer tokens of all it takes, added to the stack's.

        taken: by slot, of all slots. steps: by slot, the adapter's name and step, which say what dropout leaves out.
        Returns the losses in the order of the slots, nats per answer token, and the tokens of the rows.
        Raises ModelError if memory runs out at one row of one adapter.
        """
        device = self._base.device
        counts = torch.tensor([float(own.answer_tokens) for own in taken.values()], device=device)

        def compute(limits: Limits) -> tuple[Tensor, int]:
            for rows in self._stack.rows:
                rows.gradients.zero_()
            total, tokens = torch.zeros(len(counts), device=device), 0
            for part in self._portions(taken, limits):
                slots = torch.tensor(part.slots, device=device)
                own = self._nats(part, self._dropout(part, steps)) / counts[slots]
                torch.autograd.backward(own.sum())
                total.index_add_(0, slots, own.detach())
                tokens += part.tokens
            return total, tokens

        total, tokens = self._fitting(taken, compute, most=None)
        return total.tolist(), tokens

    def validation(self, taken: Mapping[int, Taken]) -> dict[int, float]:
        """Loss of some slots, nats per answer token, by slot. Raises what `losses` raises."""

        def compute(limits: Limits) -> dict[int, float]:
            total = dict.fromkeys(taken, 0.0)
            for part in self._portions(taken, limits):
                with torch.no_grad():
                    found = self._nats(part, None).tolist()
                for slot, nats in zip(part.slots, found, strict=True):
                    total[slot] += nats
            return {slot: nats / taken[slot].answer_tokens for slot, nats in total.items()}

        return self._fitting(taken, compute, most=self._settings.batch_size)

    def _fitting(self, taken: Mapping[int, Taken], compute: Callable[[Limits], T], most: int | None) -> T:
        """compute at the limits of memory. most: rows of an adapter at once, whatever memory allows."""
        kind = self._base.device.type
        found, self.limits = fitting_rows(compute, self.limits, taken, kind, self._said, most=most)
        return found

    def _portions(self, taken: Mapping[int, Taken], limits: Limits) -> Iterator[Portion]:
        for parts in plan(taken, limits, self._base.device.type):
            yield portion(taken, parts)

    def _dropout(self, part: Portion, steps: Mapping[int, tuple[str, int]]) -> Dropout | None:
        if not self._settings.dropout:
            return None
        keys = [
            row_keys(self._settings.seed, *steps[slot], numbers)
            for slot, numbers in zip(part.slots, part.numbers, strict=True)
        ]
        return Dropout(self._settings.dropout, torch.cat(keys).to(self._base.device))

    def _nats(self, part: Portion, dropout: Dropout | None) -> Tensor:
        """Cross entropy summed over each adapter's answer tokens: (adapters,)."""
        device = self._base.device
        whole = part.slots == tuple(range(self._stack.slots))
        self._part = Part(None if whole else part.slots, dropout)
        places = part.places.to(device)
        logits = self._head.logits(part.ids.to(device), places)
        nats = nn.functional.cross_entropy(logits, part.targets.to(device), reduction="none")
        # laid out by place, so that every device sums in one order
        everywhere = nats.new_zeros(part.ids.numel()).index_copy(0, places, nats)
        return everywhere.view(len(part.slots), -1).sum(1)
