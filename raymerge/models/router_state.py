"""A router's training as it stands between two steps, and its form as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from raymerge.adapters.tensors import encode_tensors
from raymerge.errors import ModelError
from raymerge.models.training.rows import Limits


@dataclass
class Course:
    """How a router's training has gone so far.

    step: optimiser steps taken. losses: of the steps of the epoch that is under way. history: see TrainedRouter.
    best: what learned, as it was after the best epoch. allowed: which candidates the personas may have in this epoch,
    bool (P, C), None for all. limits: what memory has been found to allow at once.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best: Mapping[str, Tensor] = field(default_factory=dict)
    allowed: Tensor | None = None
    limits: Limits = field(default_factory=Limits)


def encode_course(
    course: Course, learned: Mapping[str, Tensor], moments: Mapping[str, Tensor], training: Mapping[str, Any]
) -> bytes:
    """A training as a safetensors file. learned: what learns, by name. moments: Adam's of it. training: what must be
    the same where it is read, as JSON values."""
    tensors = {f"learned.{name}": tensor for name, tensor in learned.items()}
    tensors |= {f"moments.{name}": tensor for name, tensor in moments.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in course.best.items()}
    if course.allowed is not None:
        tensors["allowed"] = course.allowed.to(torch.float16)
    value = {
        "training": training,
        "step": course.step,
        "losses": course.losses,
        "history": course.history,
        "best_epoch": course.best_epoch,
        "limits": [course.limits.rows, course.limits.slots],
    }
    return encode_tensors(tensors, {"raymerge.router": json.dumps(value)})


def decode_course(
    data: bytes, training: Mapping[str, Any]
) -> tuple[Course, Mapping[str, Tensor], Mapping[str, Tensor]]:
    """A training as `encode_course` wrote it, with what learns and its moments.

    Raises ModelError if it is broken, or of another training.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        value = json.loads(header["__metadata__"]["raymerge.router"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ModelError(f"checkpoint of a router: cannot be read.\n{error}\nRemove it to train anew.") from error
    there, here = value["training"], json.loads(json.dumps(training))
    if there != here:
        differing = ", ".join(key for key in here if there.get(key) != here[key])
        raise ModelError(
            f"checkpoint of a router: is of another training; what differs: {differing}.\n"
            "Go on with the same personas, experts, settings and base, or remove the checkpoint to train anew."
        )
    parts: dict[str, dict[str, Tensor]] = {"learned": {}, "moments": {}, "best": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part in parts:
            parts[part][name] = tensor
    allowed = tensors["allowed"].bool() if "allowed" in tensors else None
    course = Course(
        value["step"], value["losses"], value["history"], value["best_epoch"], parts["best"], allowed,
        Limits(*value["limits"]),
    )  # fmt: skip
    return course, parts["learned"], parts["moments"]
