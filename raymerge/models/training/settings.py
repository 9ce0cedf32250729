"""What a training is asked, what it gives back, and what it tells those who watch it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from raymerge.adapters.adapter import LoraAdapter
from raymerge.errors import ModelError


@dataclass(frozen=True)
class TrainingSettings:
    """How an adapter is trained.

    alpha: B @ A is scaled by alpha / rank, with `rslora` by alpha / sqrt(rank) (arXiv:2312.03732).
    dropout: share of the features of what enters A that a step leaves out; the others are scaled by 1 / (1 - share).
    target_modules: `all-linear` (every linear layer but the output head), or module names as PEFT matches them (the
        whole dotted path, or its end).
    batch_size: rows of one adapter in an optimiser step. micro_batch: how many of them are computed at once; None is
        all of them, and either becomes fewer where memory runs out. Neither memory nor micro_batch changes a result.
    gradient_checkpointing: compute each block of the model again in the backward pass instead of keeping what is in it.
    warmup: share of the steps in which the rate rises from 0; it then falls along a cosine to 0. clip: largest gradient
        norm of one adapter.
    patience: an adapter stops after so many epochs without a better validation loss, and the best one is kept; None
        trains all epochs and keeps the last.
    max_length: most tokens of a row, and never more than the model knows; None is what it knows.
    truncate: longer rows are cut (the start of the prompt first) instead of refused.
    shared_init: whether all adapters begin from one A. Adapters that share it merge with far less loss when
        compressed, since their deltas share a row space.
    together: adapters in training at once; None chooses by the tokens of a step.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    epochs: int = 3
    learning_rate: float = 2e-4
    batch_size: int = 6
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    patience: int | None = None
    max_length: int | None = None
    truncate: bool = False
    seed: int = 0
    shared_init: bool = True
    together: int | None = None

    @property
    def scaling(self) -> float:
        """Factor on B @ A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class TrainingGroup:
    """The rows that one adapter is trained on, and those that say when to stop: (rendered prompt, response)."""

    name: str
    rows: Sequence[tuple[str, str]]
    validation: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Trained:
    """A trained adapter.

    losses: of each optimiser step, nats per answer token. tokens: answer tokens it learned from, each counted once.
    validation: (step, nats per answer token) at the end of each epoch, where `patience` is set; best_step is the step
    whose factors the adapter then has, None where it has the last one's.
    """

    adapter: LoraAdapter
    losses: tuple[float, ...] = field(repr=False)
    tokens: int
    validation: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None

    @property
    def diverged(self) -> bool:
        """Whether the adapter must not be used: a factor is NaN or infinite, or a loss was, at which it stopped.

        Where the best of earlier steps was kept, a loss of later ones says nothing about it.
        """
        modules = self.adapter.modules.values()
        if not all(bool(factor.isfinite().all()) for module in modules for factor in (module.A, module.B)):
            return True
        return self.best_step is None and not all(math.isfinite(loss) for loss in self.losses)


@dataclass(frozen=True)
class GroupProgress:
    """How far one adapter is. epoch: passes over its rows so far, 1.5 in the middle of the second. loss, validation:
    the last ones, nats per answer token; loss is NaN before the first step."""

    step: int
    steps: int
    epoch: float
    loss: float
    validation: float | None
    done: bool


class Watch(Protocol):
    """Who is told of a training while it runs. Every method may do nothing; an error that one raises ends it."""

    def stepped(self, progress: Mapping[str, GroupProgress], tokens: int) -> None:
        """After each joint step. progress: of every group by name. tokens: of the step's rows, without padding."""

    def finished(self, trained: Trained) -> bool:
        """An adapter is done, after the step that was its last was told. Returns whether it is kept elsewhere.

        Checkpoints leave out the factors of those that are. A training that goes on from one tells again of the others.
        """

    def said(self, text: str) -> None:
        """Something that people should know."""

    def due(self) -> bool:
        """Whether a checkpoint is wanted now; asked after each joint step."""

    def save(self, state: bytes) -> None:
        """A checkpoint: all that decides the rest of the training, as a safetensors file."""


class Unwatched:
    """A watch that looks at nothing."""

    def stepped(self, progress: Mapping[str, GroupProgress], tokens: int) -> None:
        """See Watch."""

    def finished(self, trained: Trained) -> bool:
        """See Watch."""
        return False

    def said(self, text: str) -> None:
        """See Watch."""

    def due(self) -> bool:
        """See Watch."""
        return False

    def save(self, state: bytes) -> None:
        """See Watch."""


def steps_of(rows: int, settings: TrainingSettings) -> int:
    """Optimiser steps that an adapter with so many rows takes, unless it stops early."""
    return settings.epochs * math.ceil(rows / settings.batch_size)


def learning_rate(step: int, steps: int, settings: TrainingSettings) -> float:
    """Rate of a step: linear warm-up, then a cosine to zero."""
    rising = max(1, round(settings.warmup * steps))
    if step < rising:
        return settings.learning_rate * (step + 1) / rising
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def check_settings(groups: Sequence[TrainingGroup], settings: TrainingSettings) -> None:
    """Raise ModelError, naming the setting or the group, for what no training can be."""
    for name in ("alpha", "learning_rate", "warmup", "weight_decay", "clip", "dropout"):
        if not math.isfinite(getattr(settings, name)):
            raise ModelError(f"training.{name} is {getattr(settings, name)}.\nExpected a finite number.")
    for name in ("rank", "epochs", "batch_size", "alpha", "learning_rate", "clip"):
        if getattr(settings, name) <= 0:
            raise ModelError(f"training.{name} is {getattr(settings, name)}.\nExpected a number above 0.")
    for name in ("micro_batch", "patience", "max_length", "together"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ModelError(f"training.{name} is {value}.\nExpected a number above 0, or none.")
    if not 0 <= settings.warmup <= 1:
        raise ModelError(f"training.warmup is {settings.warmup}.\nExpected a share of the steps, 0 to 1.")
    if not 0 <= settings.dropout < 1:
        raise ModelError(f"training.dropout is {settings.dropout}.\nExpected a share, from 0 to less than 1.")
    names: set[str] = set()
    for group in groups:
        if group.name in names:
            raise ModelError(f"{group.name}: two groups have this name.\nEach adapter needs one of its own.")
        names.add(group.name)
        if not group.rows:
            raise ModelError(f"{group.name}: has no training examples.\nAn adapter needs at least one.")
        if settings.patience is not None and not group.validation:
            raise ModelError(
                f"{group.name}: has no validation examples, and training.patience is {settings.patience}.\n"
                "Early stopping looks at them: give it rows with split validation, or leave patience out."
            )
