"""A training as it stands between two steps, and its form as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from raymerge.adapters.tensors import encode_tensors
from raymerge.errors import ModelError
from raymerge.models.training.rows import Limits


@dataclass
class Course:
    """How one adapter's training has gone so far. group: which it is. best: the best one's factors, packed."""

    group: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    best: Tensor | None = None

    @property
    def best_loss(self) -> float | None:
        """The validation loss of the best one."""
        return next((loss for step, loss in self.validation if step == self.best_step), None)

    @property
    def since_best(self) -> int:
        """Validations after the best one."""
        return sum(1 for step, _ in self.validation if self.best_step is None or step > self.best_step)


@dataclass(frozen=True)
class State:
    """All that decides how a training goes on.

    slots: the adapters in training, with their `factors` and Adam's `first` and `second` moments, packed; those after
    the first `together` wait for a slot again. done: those that are finished, with their factors, None where these are
    kept elsewhere. begun: how many of the queue have had a slot.
    """

    slots: Sequence[tuple[Course, Mapping[str, Tensor]]]
    done: Sequence[tuple[Course, Tensor | None]]
    begun: int
    together: int
    limits: Limits


def encode_state(state: State, training: Mapping[str, Any]) -> bytes:
    """A state as a safetensors file. training: what must be the same where it is read, as JSON values."""
    done = enumerate(factors for _, factors in state.done)
    tensors = {f"done.{number}.factors": factors for number, factors in done if factors is not None}
    for number, (course, packed) in enumerate(state.slots):
        tensors |= {f"slot.{number}.{name}": tensor for name, tensor in packed.items()}
        if course.best is not None:
            tensors[f"slot.{number}.best"] = course.best
    value = {
        "training": training,
        "slots": [_without_best(course) for course, _ in state.slots],
        "done": [_without_best(course) for course, _ in state.done],
        "begun": state.begun,
        "together": state.together,
        "limits": [state.limits.rows, state.limits.slots],
    }
    return encode_tensors(tensors, {"raymerge.training": json.dumps(value)})


def decode_state(data: bytes, training: Mapping[str, Any]) -> State:
    """A state as `encode_state` wrote it. Raises ModelError if it is broken, or of another training."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        value = json.loads(header["__metadata__"]["raymerge.training"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ModelError(f"checkpoint of a training: cannot be read.\n{error}\nRemove it to train anew.") from error
    there, here = value["training"], json.loads(json.dumps(training))
    if there != here:
        differing = ", ".join(key for key in here if there.get(key) != here[key])
        raise ModelError(
            f"checkpoint of a training: is of another one; what differs: {differing}.\n"
            "Go on with the same groups, settings and base, or remove the checkpoint to train anew."
        )
    slots = []
    for number, one in enumerate(value["slots"]):
        course = _course(one, tensors.get(f"slot.{number}.best"))
        slots.append((course, {name: tensors[f"slot.{number}.{name}"] for name in ("factors", "first", "second")}))
    done = [(_course(one, None), tensors.get(f"done.{number}.factors")) for number, one in enumerate(value["done"])]
    return State(slots, done, value["begun"], value["together"], Limits(*value["limits"]))


def _without_best(course: Course) -> dict[str, Any]:
    return {key: value for key, value in vars(course).items() if key != "best"}


def _course(value: Mapping[str, Any], best: Tensor | None) -> Course:
    validation = [(int(step), float(loss)) for step, loss in value["validation"]]
    return Course(**{**value, "validation": validation}, best=best)
