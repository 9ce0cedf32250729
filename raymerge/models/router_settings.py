"""What a router's training is asked, what it gives back, and what it tells those who watch it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from raymerge.errors import ModelError


@dataclass(frozen=True)
class RouterSettings:
    """How a router is trained.

    learning_rate falls along a cosine to 0. weight_decay: of the network alone. personas_per_step, rows_per_persona:
    what an optimiser step takes at most. entropy: bonus in the loss on each nat of entropy of the weights.
    patience: epochs without a better validation loss after which it ends; None trains all of them. The best epoch is
    kept either way, where there are validation rows. clip: largest norm of a gradient.
    layers: places spread over the depth of the model that have an offset each, a logarithm of a factor on the weights,
    as in `merging.scale.by_depth`; 0 is none. layers_penalty: in the loss, times the mean of their squares.
    """

    epochs: int = 5
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    personas_per_step: int = 40
    rows_per_persona: int = 5
    entropy: float = 0.0
    patience: int | None = None
    clip: float = 1.0
    layers: int = 0
    layers_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Learner:
    """A persona's rows to learn from, and those that say which epoch is best: (rendered prompt, answer). One that is
    held out has neither."""

    name: str
    rows: tuple[tuple[str, str], ...] = ()
    validation: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RouterProgress:
    """How far a training is. epoch: done, fractions too. loss: of the last step, nats per answer token, mean over its
    personas. validation: the last one. entropy: of the weights in the last step, nats, mean over its personas."""

    step: int
    steps: int
    epoch: float
    epochs: int
    loss: float
    validation: float | None
    entropy: float


class RouterWatch(Protocol):
    """Who is told how a training goes, and keeps checkpoints."""

    def stepped(self, progress: RouterProgress, tokens: int) -> None:
        """After each step. tokens: of its rows."""

    def said(self, text: str) -> None:
        """Something a user should know."""

    def due(self) -> bool:
        """Whether a checkpoint is wanted now."""

    def save(self, state: bytes) -> None:
        """Keep a checkpoint."""


@dataclass(frozen=True)
class TrainedRouter:
    """A trained router.

    network: on the CPU. scale: the learned factor on match_norm. layers: learned offsets. history: by epoch, 0 before
    training: `loss` (nats per answer token, mean over the steps of the epoch; in epoch 0 over one step's rows of every
    persona), `validation` (where there are such rows), `entropy` (nats, mean over personas). best_epoch: the one whose
    router this is.
    """

    network: nn.Module
    scale: float
    layers: tuple[float, ...]
    history: tuple[Mapping[str, float], ...] = field(repr=False)
    best_epoch: int


def check_training(
    learners: Sequence[Learner], settings: RouterSettings, sizes: Mapping[str, int], outputs: tuple[int, int] | None
) -> None:
    """Raise ModelError, naming what it is, for what no training can be.

    sizes: rows of what must have one for each learner, by name. outputs: of an mlp, and experts.
    """
    for name in ("learning_rate", "weight_decay", "entropy", "clip", "layers_penalty"):
        if not math.isfinite(getattr(settings, name)):
            raise ModelError(f"router.{name} is {getattr(settings, name)}.\nExpected a finite number.")
    for name in ("epochs", "learning_rate", "personas_per_step", "rows_per_persona", "clip"):
        if getattr(settings, name) <= 0:
            raise ModelError(f"router.{name} is {getattr(settings, name)}.\nExpected a number above 0.")
    for name in ("weight_decay", "layers_penalty", "seed"):
        if getattr(settings, name) < 0:
            raise ModelError(f"router.{name} is {getattr(settings, name)}.\nExpected 0 or more.")
    if settings.layers < 0 or settings.layers == 1:
        raise ModelError(f"router.layers is {settings.layers}.\nExpected 0, or 2 and more: one place is the scale.")
    if settings.patience is not None and settings.patience < 1:
        raise ModelError(f"router.patience is {settings.patience}.\nExpected a number above 0, or none.")
    for name, rows in sizes.items():
        if rows != len(learners):
            raise ModelError(f"{name} have {rows} rows for {len(learners)} personas.\nExpected one for each.")
    if outputs is not None and outputs[0] != outputs[1]:
        raise ModelError(f"the mlp has {outputs[0]} outputs for {outputs[1]} experts.\nExpected one for each.")
    if not any(one.rows for one in learners):
        raise ModelError("no persona has training examples.\nA router learns from the answers of at least one.")
    if settings.patience is not None and not any(one.validation for one in learners):
        raise ModelError(
            f"no persona has validation examples, and router.patience is {settings.patience}.\n"
            "Early stopping looks at them: give some personas rows with split validation, or leave patience out."
        )
