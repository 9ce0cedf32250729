"""Batched greedy answers and reference scores, every row with its own adapter or mixture.

Rows that share an adapter are put side by side and batches are cut between adapters where that is possible, so that
the factors are read in place. The batches follow from the rows and the batch size alone, so equal calls give equal
bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from raymerge.errors import ModelError
from raymerge.models.answers import AnswerHead, encode_prompts, encode_rows, keep_end, pad_right
from raymerge.models.base import BaseModel
from raymerge.models.multilora import MultiLora
from raymerge.models.prefix import Prefixes

# Tokens between two looks at the text for a stop string, and, on a GPU, at whether all rows are done.
_LOOK_EVERY = 4

Choice = Tensor | Sequence[int] | None
Attached = MultiLora | Prefixes | None


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated.

    stop: an answer ends before any of these strings; one that names a token (`<s>`) ends it at that token too. The
        model's own end tokens always do.
    """

    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()


def generate(
    base: BaseModel,
    lora: Attached,
    prompts: Sequence[str],
    adapters: Choice,
    settings: GenerationSettings,
    batch_size: int = 64,
    on_rows: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers to rendered prompts, in their order, without outer white space.

    adapters: int64 (rows,), an adapter or prefix of `lora` for each row, -1 for the base; or floating (rows, adapters),
        the weights of each row's mixture; None is the base for all.
    on_rows: called with the number of rows of each batch when they are done.
    A prompt that leaves no room for the answer loses its start (its opening token stays).
    Raises ModelError if adapters and prompts do not fit each other.
    """
    rows = _Rows(lora, adapters, len(prompts))
    tokens = encode_prompts(base, prompts)
    if base.max_length is not None:
        room = max(1, base.max_length - settings.max_new_tokens - rows.taken)
        tokens = [keep_end(row, room) for row in tokens]
    stopping = _Stopping(base, settings)
    answers = [""] * len(prompts)
    for batch in plan_batches(rows.owners, [len(row) for row in tokens], batch_size):
        with rows.acting(batch):
            new = _greedy(base, [tokens[i] for i in batch], settings.max_new_tokens, stopping)
        for i, text in zip(batch, stopping.texts(new), strict=True):
            answers[i] = text
        if on_rows is not None:
            on_rows(len(batch))
    return answers


def score_references(
    base: BaseModel,
    lora: Attached,
    prompts: Sequence[str],
    references: Sequence[str],
    adapters: Choice,
    batch_size: int = 64,
    on_rows: Callable[[int], None] | None = None,
) -> list[float]:
    """Negative log-likelihood of each reference given its prompt: nats per token of the reference, end token left out.

    adapters, on_rows: as for `generate`. Raises ModelError if a reference has no token, or the lengths differ.
    """
    if len(prompts) != len(references):
        raise ModelError(f"{len(prompts)} prompts meet {len(references)} references.\nEach prompt needs one.")
    rows = _Rows(lora, adapters, len(prompts))
    limit = base.max_length and base.max_length - rows.taken
    encoded = encode_rows(base, prompts, references, end=False, limit=limit)
    head = AnswerHead(base, adapted=lora is not None and _changes_head(base, lora))
    scores = [0.0] * len(prompts)
    for batch in plan_batches(rows.owners, [len(row) for row in encoded], batch_size):
        padded = pad_right([encoded[i] for i in batch], base.pad_id)
        row, column = torch.nonzero(padded.answer, as_tuple=True)
        places = row * padded.ids.shape[1] + column - 1
        with rows.acting(batch), torch.inference_mode():
            logits = head.logits(padded.ids.to(base.device), places.to(base.device))
            nats = nn.functional.cross_entropy(logits, padded.ids[row, column].to(base.device), reduction="none")
        totals = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, row, nats.cpu().double())
        for i, total in zip(batch, totals.tolist(), strict=True):
            scores[i] = total / len(encoded[i].answer)
        if on_rows is not None:
            on_rows(len(batch))
    return scores


def plan_batches(owners: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of each batch: an owner's rows together, by length, and an owner cut only where it exceeds a batch."""
    if batch_size < 1:
        raise ModelError(f"batch_size is {batch_size}.\nExpected at least 1.")
    order = sorted(range(len(owners)), key=lambda i: (owners[i], lengths[i], i))
    batches: list[list[int]] = []
    for _, group in groupby(order, key=lambda i: owners[i]):
        rows = list(group)
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            if batches and len(batches[-1]) + len(part) <= batch_size:
                batches[-1] += part
            else:
                batches.append(part)
    return batches


class _Rows:
    """Which adapter or mixture answers for each row of a call."""

    def __init__(self, lora: Attached, adapters: Choice, count: int) -> None:
        self.lora = lora
        self.taken = 0  # places of the context that a prefix has
        self.choice: Tensor | None = None
        self.owners = [-1] * count
        if adapters is None:
            return
        if lora is None:
            raise ModelError("rows name adapters, but none are loaded.\nPass a MultiLora, or no adapters.")
        if isinstance(lora, Prefixes):
            self.taken = lora.tokens
        self.choice = torch.as_tensor(adapters).cpu()
        if len(self.choice) != count:
            raise ModelError(f"{count} prompts meet adapters for {len(self.choice)}.\nName one for each prompt.")
        if self.choice.ndim == 1:
            self.owners = self.choice.tolist()
        elif count:
            self.owners = torch.unique(self.choice, dim=0, return_inverse=True)[1].tolist()

    def acting(self, batch: Sequence[int]) -> AbstractContextManager[None]:
        """The context in which these rows run as one batch."""
        if self.choice is None or self.lora is None:
            return nullcontext()
        chosen = self.choice[list(batch)]
        if chosen.ndim == 1:
            return self.lora.rows(chosen)
        if isinstance(self.lora, Prefixes):
            raise ModelError("prefixes cannot be mixed.\nName one for each row.")
        return self.lora.mixtures(chosen)


class _Stopping:
    """What ends an answer: end tokens, tokens named as stops, and stop strings."""

    def __init__(self, base: BaseModel, settings: GenerationSettings) -> None:
        self.tokenizer = base.tokenizer
        vocabulary = self.tokenizer.get_vocab() if settings.stop else {}
        named = {int(vocabulary[text]) for text in settings.stop if text in vocabulary}
        self.ids = sorted({*base.end_ids, *named})
        special = set(self.tokenizer.all_special_tokens) if settings.stop else set()
        self.strings = [text for text in settings.stop if text and text not in special]
        self.device_ids = torch.tensor(self.ids, dtype=torch.int64, device=base.device)

    def is_end(self, token: Tensor) -> Tensor:
        """Whether each token of (rows,) ends its answer."""
        return torch.isin(token, self.device_ids)

    def texts(self, new: Tensor) -> list[str]:
        """The answers in new tokens (rows, tokens), cut before what ended them."""
        cut = [_before(row, self.ids) for row in new.tolist()]
        return [
            self._before_string(text).strip() for text in self.tokenizer.batch_decode(cut, skip_special_tokens=True)
        ]

    def found(self, new: Tensor) -> Tensor:
        """Whether each answer so far holds a stop string; bool (rows,) on the CPU."""
        texts = self.tokenizer.batch_decode(new.tolist(), skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.strings) for text in texts])

    def _before_string(self, text: str) -> str:
        return text[: min((at for at in (text.find(stop) for stop in self.strings) if at >= 0), default=len(text))]


def _greedy(base: BaseModel, prompts: Sequence[Sequence[int]], most: int, stopping: _Stopping) -> Tensor:
    """New tokens (rows, at most `most`) on the CPU; what follows an end token has no meaning."""
    ids, mask = _pad_left(prompts, most, base)
    width = ids.shape[1]
    accepted = inspect.signature(base.model.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    new = torch.zeros(len(prompts), most, dtype=torch.int64, device=base.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=base.device)
    cache = None
    begin = 0
    with torch.inference_mode():
        for step in range(most):
            end = width + step
            if "position_ids" in accepted:
                extra["position_ids"] = positions[:, begin:end]
            out = base.model(
                input_ids=ids, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **extra
            )
            cache, begin = out.past_key_values, end
            token = out.logits[:, -1].argmax(-1)
            new[:, step] = token
            done |= stopping.is_end(token)
            if _all_done(done, new[:, : step + 1], stopping):
                return new[:, : step + 1].cpu()
            ids = token[:, None]
    return new.cpu()


def _all_done(done: Tensor, new: Tensor, stopping: _Stopping) -> bool:
    looks = new.shape[1] % _LOOK_EVERY == 0
    if stopping.strings and looks:
        done |= stopping.found(new).to(done.device)
    return (looks or done.device.type == "cpu") and bool(done.all())


def _pad_left(prompts: Sequence[Sequence[int]], most: int, base: BaseModel) -> tuple[Tensor, Tensor]:
    """Prompts (rows, width) padded on the left, and their mask with places for the answer (rows, width + most)."""
    width = max(len(tokens) for tokens in prompts)
    ids = torch.full((len(prompts), width), base.pad_id, dtype=torch.int64)
    mask = torch.ones((len(prompts), width + most), dtype=torch.int64)
    for number, tokens in enumerate(prompts):
        ids[number, width - len(tokens) :] = torch.tensor(tokens)
        mask[number, : width - len(tokens)] = 0
    return ids.to(base.device), mask.to(base.device)


def _before(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((at for at, token in enumerate(row) if token in ends), len(row))]


def _changes_head(base: BaseModel, lora: MultiLora | Prefixes) -> bool:
    head = base.model.get_output_embeddings()
    return any(module is head for name, module in base.model.named_modules() if name in lora.module_names)
