"""Prefix tuning of many prefixes at once against one frozen base model.

Prefixes of a chunk share every batch, each with its own rows. Nothing couples them: each has its own loss, gradient
norm, rate and optimiser state, so the result is what training each alone with PEFT gives (1e-4 in the logits).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raymerge.errors import ModelError
from raymerge.models.answers import AnswerHead, TokenRow, encode_rows, pad_right
from raymerge.models.base import BaseModel
from raymerge.models.prefix import Prefix, Prefixes, check_room
from raymerge.models.training import GroupProgress, TrainingGroup, TrainingSettings, batch_order, learning_rate
from raymerge.models.training.memory import fitting
from raymerge.models.training.rows import Limits

# Tokens of one step, those of the prefixes included: large products that stay in the caches of a CPU.
_TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass(frozen=True)
class TrainedPrefix:
    """A trained prefix. losses: of each optimiser step, nats per answer token. tokens: answer tokens it learned from,
    each counted once."""

    prefix: Prefix
    losses: tuple[float, ...] = field(repr=False)
    tokens: int

    @property
    def diverged(self) -> bool:
        """Whether a loss or a number of the prefix is NaN or infinite: such a prefix must not be used."""
        finite = all(math.isfinite(loss) for loss in self.losses)
        return not finite or not bool(torch.isfinite(self.prefix.embeddings).all())


def first_prefix(base: BaseModel, tokens: int, seed: int) -> tuple[dict[str, Any], Tensor]:
    """What PEFT begins with: the configuration that it saves, and its first embeddings, float32 (tokens, width)."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(base.model, config)
    embeddings = wrapped.prompt_encoder["default"].embedding.weight.detach().float().cpu().clone()
    saved = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": base.location}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in saved.items()}, embeddings


def train_prefixes(
    base: BaseModel,
    groups: Sequence[TrainingGroup],
    first: Tensor,
    settings: TrainingSettings,
    wanted: Container[str] | None = None,
    *,
    stepped: Callable[[Mapping[str, GroupProgress], int], None] | None = None,
    said: Callable[[str], None] | None = None,
) -> Iterator[TrainedPrefix]:
    """Train one prefix for each group, as each chunk of them is done, in no particular order.

    first: what every prefix begins with, float32 (tokens, width). settings: those of an adapter that are about its
    optimiser, its rows and their order; each group sees the batches that training an adapter would show it, and every
    prefix is trained to the end, whatever `patience` is.
    wanted: names of those that are missing; a chunk without any is left out, so that bytes do not depend on it.
    stepped, said: as of `Watch`, of the groups that are not left out.
    Loss: mean cross entropy over the answer's tokens, the end token included. Optimiser: AdamW.
    Raises ModelError if the prefix leaves no room, a group has no rows, a row is longer than what is left, or memory
    does not hold one row.
    """
    check_room("training", len(first), base.model, room=2)
    encoded = {group.name: _encoded(base, group, len(first), settings) for group in groups}
    chunks = _chunks(encoded, len(first), settings, base)
    chunks = [chunk for chunk in chunks if wanted is None or any(name in wanted for name in chunk)]
    steps = {name: len(batch_order(len(encoded[name]), settings)) for chunk in chunks for name in chunk}
    told = _Told(steps, settings.epochs, stepped, said)
    for chunk in chunks:
        yield from _train_chunk(base, {name: encoded[name] for name in chunk}, first, settings, told)


def _encoded(base: BaseModel, group: TrainingGroup, taken: int, settings: TrainingSettings) -> list[TokenRow]:
    """A group's rows by length."""
    if not group.rows:
        raise ModelError(f"{group.name}: has no training examples.\nA prefix needs at least one.")
    limits = [limit for limit in (settings.max_length, base.max_length and base.max_length - taken) if limit]
    limit = min(limits, default=None)
    prompts, answers = [prompt for prompt, _ in group.rows], [answer for _, answer in group.rows]
    if limit is not None and not settings.truncate:
        longest = max(map(len, encode_rows(base, prompts, answers, end=True, limit=2**31)))
        if longest > limit:
            raise ModelError(
                f"{group.name}: a training row has {longest} tokens, and the prefix leaves room for {limit}.\n"
                "Shorten the prefix or the row, or set training.truncate."
            )
    return sorted(encode_rows(base, prompts, answers, end=True, limit=limit), key=len)


def _chunks(
    encoded: Mapping[str, Sequence[TokenRow]], taken: int, settings: TrainingSettings, base: BaseModel
) -> list[list[str]]:
    """Groups of about equally many rows together, so many as fill a step."""
    order = sorted(encoded, key=lambda name: len(encoded[name]))
    longest = max((len(rows[-1]) for rows in encoded.values()), default=1) + taken
    budget = _TOKENS.get(base.device.type, _TOKENS["cuda"])
    size = settings.together or max(1, budget // (settings.batch_size * longest))
    count = max(1, math.ceil(len(order) / size))
    cuts = [round(len(order) * part / count) for part in range(count + 1)]
    return [order[begin:end] for begin, end in itertools.pairwise(cuts) if end > begin]


class _Told:
    """How far each prefix is, for those who want to be told."""

    def __init__(
        self,
        steps: Mapping[str, int],
        epochs: int,
        stepped: Callable[[Mapping[str, GroupProgress], int], None] | None,
        said: Callable[[str], None] | None,
    ) -> None:
        self.said = said or (lambda text: None)
        self._epochs = epochs
        self._stepped = stepped
        self._progress = {name: GroupProgress(0, most, 0.0, math.nan, None, False) for name, most in steps.items()}

    def step(self, losses: Mapping[str, float], tokens: int) -> None:
        """Tell of a joint step: the losses of those that took part, and the tokens of their rows."""
        for name, loss in losses.items():
            step, steps = self._progress[name].step + 1, self._progress[name].steps
            self._progress[name] = GroupProgress(step, steps, self._epochs * step / steps, loss, None, step == steps)
        if self._stepped is not None:
            self._stepped(self._progress, tokens)


def _train_chunk(
    base: BaseModel, encoded: Mapping[str, Sequence[TokenRow]], first: Tensor, settings: TrainingSettings, told: _Told
) -> Iterator[TrainedPrefix]:
    embeddings = [nn.Parameter(first.to(base.device, torch.float32).clone()) for _ in encoded]
    optimiser = torch.optim.AdamW(
        [{"params": [own]} for own in embeddings], lr=0.0, weight_decay=settings.weight_decay, fused=True
    )
    names = list(encoded)
    orders = [batch_order(len(rows), settings) for rows in encoded.values()]
    losses: list[list[float]] = [[] for _ in embeddings]
    # a chunk begins with what is asked, whatever the one before it found, so that its bytes do not depend on that
    gradients = _Gradients(base, embeddings, Limits(settings.micro_batch), told.said)
    try:
        for step in range(max(map(len, orders))):
            batches = {
                number: [rows[i] for i in orders[number][step].tolist()]
                for number, rows in enumerate(encoded.values())
                if step < len(orders[number])
            }
            own_losses = gradients.compute(batches).tolist()
            for number, own in zip(batches, own_losses, strict=True):
                nn.utils.clip_grad_norm_([embeddings[number]], settings.clip)
                optimiser.param_groups[number]["lr"] = learning_rate(step, len(orders[number]), settings)
                losses[number].append(own)
            optimiser.step()
            tokens = sum(len(row) for rows in batches.values() for row in rows)
            told.step({names[n]: own for n, own in zip(batches, own_losses, strict=True)}, tokens)
    finally:
        gradients.prefixes.detach()
    for (name, rows), trained, lost in zip(encoded.items(), embeddings, losses, strict=True):
        answered = sum(len(row.answer) for row in rows)
        yield TrainedPrefix(Prefix(name, trained.detach().cpu()), tuple(lost), answered)


class _Gradients:
    """Losses and gradients of the prefixes of a chunk, over so many rows at once as memory holds."""

    def __init__(
        self, base: BaseModel, embeddings: Sequence[nn.Parameter], limits: Limits, said: Callable[[str], None]
    ) -> None:
        self.base = base
        self.embeddings = embeddings
        self.limits = limits
        self.said = said
        self.head = AnswerHead(base)
        self.prefixes = Prefixes(base.model)
        self.prefixes.load(embeddings)

    def compute(self, batches: Mapping[int, Sequence[TokenRow]]) -> Tensor:
        """Put the gradients of each prefix in place; returns its mean loss over its own rows, float32 (prefixes,).

        Raises ModelError if memory does not hold one row.
        """
        most = max(map(len, batches.values()))

        def tried(limits: Limits) -> Limits:
            return Limits(min(most, limits.rows or most), min(len(batches), limits.slots or len(batches)))

        found, self.limits = fitting(lambda limits: self._accumulated(batches, limits), self.limits, tried, self.said)
        return found

    def _accumulated(self, batches: Mapping[int, Sequence[TokenRow]], limits: Limits) -> Tensor:
        for own in self.embeddings:
            own.grad = None
        numbers = list(batches)
        answered = [sum(len(row.answer) for row in rows) for rows in batches.values()]
        counts = torch.tensor(answered, dtype=torch.float32, device=self.base.device)
        losses = torch.zeros_like(counts)
        for part in _parts(list(batches.values()), limits):
            places = [place for place, _ in part]
            nats = self._nats([numbers[place] for place in places], [row for _, row in part])
            torch.autograd.backward((nats / counts[places]).sum())
            for place, own in zip(places, nats.detach(), strict=True):
                losses[place] += own
        return losses / counts

    def _nats(self, owners: Sequence[int], rows: Sequence[TokenRow]) -> Tensor:
        """What the answer of each row costs, with the prefix of its owner: float32 (rows,)."""
        padded = pad_right(rows, self.base.pad_id)
        ids = padded.ids.to(self.base.device)
        places = torch.nonzero(padded.answer.flatten()).flatten().to(self.base.device)
        with self.prefixes.rows(owners):
            logits = self.head.logits(ids, places - 1)
        nats = nn.functional.cross_entropy(logits, ids.flatten()[places], reduction="none")
        everywhere = nats.new_zeros(ids.numel()).index_copy(0, places, nats)  # one order of summing on any device
        return everywhere.view(ids.shape).sum(1)


def _parts(batches: Sequence[Sequence[TokenRow]], limits: Limits) -> Iterator[list[tuple[int, TokenRow]]]:
    """Rows that are computed at once, each with the place of its prefix."""
    slots = limits.slots or len(batches)
    height = limits.rows or max(map(len, batches))
    for begin in range(0, len(batches), slots):
        some = list(enumerate(batches))[begin : begin + slots]
        for start in range(0, max(len(rows) for _, rows in some), height):
            yield [(place, row) for place, rows in some for row in rows[start : start + height]]
