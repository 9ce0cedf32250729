"""Many adapters trained at once against one frozen base model.

A fixed number of slots each train an adapter, with its own steps, schedule and optimiser state; one that is done makes
room for the next. Nothing couples the adapters of a step: each has its own loss and its own gradient norm, so the
result is what training each alone with the same rows in the same order gives (1e-4 relative in float32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from torch import Tensor, nn

from raymerge import storage
from raymerge.adapters.adapter import LoraAdapter
from raymerge.models.base import BaseModel
from raymerge.models.layers import is_filed_transposed, shape_of
from raymerge.models.stacked import FactorStack
from raymerge.models.training.beginning import Beginnings, check_start, digest_start, targets
from raymerge.models.training.checkpoint import Course, State, decode_state, encode_state
from raymerge.models.training.memory import TooLittleMemoryError, release, slots_that_fit
from raymerge.models.training.optimiser import clip, update
from raymerge.models.training.passes import Passes
from raymerge.models.training.rows import Encoded, Limits, Taken, encode, epoch_order, slots_of
from raymerge.models.training.settings import (
    GroupProgress,
    Trained,
    TrainingGroup,
    TrainingSettings,
    Unwatched,
    Watch,
    check_settings,
    learning_rate,
    steps_of,
)


def train(
    base: BaseModel,
    groups: Sequence[TrainingGroup],
    settings: TrainingSettings,
    start_from: LoraAdapter | None = None,
    watch: Watch | None = None,
    state: bytes | None = None,
) -> list[Trained]:
    """Train one adapter for each group; the results stand in the order of the groups.

    start_from: every adapter begins from a copy of this one, and records its name.
    watch: is told of each step and each adapter that is done, and keeps checkpoints.
    state: a checkpoint to go on from; on one machine the result has the very bytes of a training without interruption.
    It lacks the adapters that were kept elsewhere before (see Watch.finished): these are neither returned nor told.
    Loss: mean cross entropy over an adapter's own answer tokens (the end token included) in the step. Optimiser:
    AdamW (Loshchilov and Hutter 2019) with linear warm-up and cosine decay.
    Raises ModelError if settings are impossible, a group has no rows, a row cannot be learned from, start_from or state
    does not fit, or memory runs out at one row; UnsupportedAdapterError if start_from holds more than deltas of linear
    modules.
    """
    check_settings(groups, settings)
    layers = targets(base, settings.target_modules)
    if start_from is not None:
        check_start(start_from, layers, settings)
    training = _Training(base, groups, settings, layers, start_from, watch or Unwatched(), state)
    del state  # of the size of all that is in training
    return training.run()


class _Training:
    """The adapters in the slots, those that wait, and those that are done.

    paused: those that had to leave their slots for want of memory, with what `pack` makes of them; they come before
    the queue. done: None where the factors were kept elsewhere before this process.
    """

    def __init__(
        self,
        base: BaseModel,
        groups: Sequence[TrainingGroup],
        settings: TrainingSettings,
        layers: Mapping[str, nn.Module],
        start: LoraAdapter | None,
        watch: Watch,
        state: bytes | None,
    ) -> None:
        self.base, self.groups, self.settings, self.layers, self.watch = base, groups, settings, layers, watch
        self.start_name = start.name if start is not None else None
        self.rows = [encode(base, group.rows, settings, group.name) for group in groups]
        self.validation = [_validation(base, group, settings) for group in groups]
        self.identity = {
            "groups": storage.digest_value([[g.name, list(g.rows), list(g.validation)] for g in groups]),
            "settings": asdict(settings),
            "modules": {path: shape_of(layer) for path, layer in layers.items()},
            "dtype": str(base.dtype),
            "start_from": None if start is None else digest_start(start),
        }
        # the longest first, so that what is left at the end is short; the plan alone decides
        self.queue = sorted(range(len(groups)), key=lambda i: -len(self.rows[i]))
        found = None if state is None else decode_state(state, self.identity)
        self.slots: list[Course] = []
        self.paused: list[tuple[Course, Mapping[str, Tensor]]] = list(found.slots) if found else []
        self.done: dict[int, tuple[Course, Tensor | None]] = {}
        if found:
            self.done = {course.group: (course, factors) for course, factors in found.done}
        self.kept = {group for group, (_, factors) in self.done.items() if factors is None}
        self.begun = found.begun if found else 0
        limits = found.limits if found else Limits(settings.micro_batch)
        self.stack = FactorStack(base.model, layers, settings.rank, settings.scaling)
        self.beginnings = Beginnings(self.stack, settings, start)
        self.passes = Passes(base, layers, self.stack, settings, limits, watch.said)
        courses = [course for course, _ in (*self.paused, *self.done.values())]
        self._fill(found.together if found else slots_of(self.rows, settings, base.device.type))
        known = {course.group: course for course in courses}
        self.progress = {
            group.name: self._progress(known.get(number, Course(number))) for number, group in enumerate(groups)
        }

    def run(self) -> list[Trained]:
        """Train until the queue is empty."""
        for group in [group for group in self.done if group not in self.kept]:
            self._tell(group)
        with self.passes.ready():
            while self.slots:
                tokens = self._step()
                self._validate()
                self.watch.stepped(self.progress, tokens)
                self._retire()
                while any(self._is_due(course) for course in self.slots):  # they had to wait for it
                    self._validate()
                    self._retire()
                if self.slots and self.watch.due():
                    self.watch.save(self._state())
        return [self._trained(group) for group in sorted(self.done) if self.done[group][1] is not None]

    def _fill(self, together: int) -> None:
        """Give slots to so many adapters, of those that wait, as memory allows."""
        waiting = len(self.paused) + len(self.queue) - self.begun
        slots = min(together, waiting)
        fit = slots_that_fit(self.stack.allocate, slots, self.watch.said) if slots else 0
        self.together = together if fit == slots else fit
        self.slots = [self._begin(slot) for slot in range(fit)]

    def _halve(self) -> None:
        """Let half of the adapters in training wait, since not even a row of one fits beside the factors of all."""
        count, half = self.stack.held, max(1, len(self.slots) // 2)
        now = f"{half} in training from now on, in more turns"
        self.watch.said(f"memory ran out beside the factors of {count} adapters: {now}")
        self.paused = [*self._packed(), *self.paused]
        self.stack.allocate(0)
        release()
        self._fill(half)
        self.passes.limits = Limits(self.settings.micro_batch)

    def _step(self) -> int:
        """One step of every slot's adapter; tokens of its rows."""
        while True:
            own = list(enumerate(self.slots))
            taken = {slot: Taken(self.rows[course.group], self._ranks(course)) for slot, course in own}
            steps = {slot: (self.groups[course.group].name, course.step) for slot, course in own}
            try:
                losses, tokens = self.passes.losses(taken, steps)
                break
            except TooLittleMemoryError:
                if self.stack.held == 1:
                    raise
            self._halve()
        clip(self.stack.rows, self.settings.clip)
        rates = [learning_rate(course.step, self._steps(course), self.settings) for course in self.slots]
        update(self.stack.rows, [course.step for course in self.slots], rates, self.settings.weight_decay)
        for course, loss in zip(self.slots, losses, strict=True):
            course.step += 1
            course.losses.append(loss)
        return tokens

    def _ranks(self, course: Course) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        epoch, place = divmod(course.step, self._steps_of_epoch(course))
        rows = len(self.rows[course.group])
        return epoch_order(rows, epoch, self.settings.batch_size, self.settings.seed)[place]

    def _steps(self, course: Course) -> int:
        return steps_of(len(self.rows[course.group]), self.settings)

    def _steps_of_epoch(self, course: Course) -> int:
        return math.ceil(len(self.rows[course.group]) / self.settings.batch_size)

    def _validate(self) -> None:
        """The validation losses of adapters at the end of an epoch; a better one than before is kept."""
        while True:
            taken = {}
            for slot, course in enumerate(self.slots):
                rows = self.validation[course.group]
                if rows is not None and self._is_due(course):
                    taken[slot] = Taken(rows, np.arange(len(rows)))
            try:
                losses = self.passes.validation(taken) if taken else {}
                break
            except TooLittleMemoryError:
                if self.stack.held == 1:
                    raise
            self._halve()
        for slot, loss in losses.items():
            course = self.slots[slot]
            best = course.best_loss
            course.validation.append((course.step, loss))
            if math.isfinite(loss) and (best is None or loss < best):
                course.best_step, course.best = course.step, self.stack.pack("factors", slot)
        for course in self.slots:
            self.progress[self.groups[course.group].name] = self._progress(course)

    def _is_due(self, course: Course) -> bool:
        """Whether an epoch has ended that was not validated yet."""
        if self.settings.patience is None or not course.losses or not math.isfinite(course.losses[-1]):
            return False
        looked = course.validation[-1][0] if course.validation else 0
        return course.step % self._steps_of_epoch(course) == 0 and looked < course.step

    def _retire(self) -> None:
        """Adapters that are done leave their slots to those that wait; a slot that nobody waits for is given up."""
        stay = []
        for slot, course in enumerate(self.slots):
            if not self._is_done(course):
                stay.append(slot)
                continue
            factors = self.stack.pack("factors", slot) if course.best is None else course.best
            course.best = None
            self.done[course.group] = (course, factors)
            self._tell(course.group)
            if self.paused or self.begun < len(self.queue):
                self.slots[slot] = self._begin(slot)
                stay.append(slot)
        if len(stay) < len(self.slots):
            self.slots = [self.slots[slot] for slot in stay]
            self.stack.keep(stay)

    def _tell(self, group: int) -> None:
        if self.watch.finished(self._trained(group)):
            self.kept.add(group)

    def _is_done(self, course: Course) -> bool:
        patience = self.settings.patience
        tired = patience is not None and course.since_best >= patience
        return course.step == self._steps(course) or tired or not math.isfinite(course.losses[-1])

    def _begin(self, slot: int) -> Course:
        """Give a slot the next adapter that waits."""
        if self.paused:
            course, packed = self.paused.pop(0)
            self.stack.begin(slot, **packed)
            return course
        group = self.queue[self.begun]
        self.begun += 1
        self.stack.begin(slot, self.beginnings.of(self.groups[group].name))
        return Course(group)

    def _progress(self, course: Course) -> GroupProgress:
        return GroupProgress(
            step=course.step,
            steps=self._steps(course),
            epoch=course.step / self._steps_of_epoch(course),
            loss=course.losses[-1] if course.losses else math.nan,
            validation=course.validation[-1][1] if course.validation else None,
            done=bool(course.losses) and self._is_done(course),
        )

    def _trained(self, group: int) -> Trained:
        course, factors = self.done[group]
        assert factors is not None
        adapter = LoraAdapter(
            name=self.groups[group].name,
            modules=self.stack.modules_of(factors),
            base_model=self.base.location,
            fan_in_fan_out=any(is_filed_transposed(layer) for layer in self.layers.values()),
            task_type="CAUSAL_LM",
            started_from=self.start_name,
        )
        tokens = int(self.rows[group].answers.sum())
        return Trained(adapter, tuple(course.losses), tokens, tuple(course.validation), course.best_step)

    def _packed(self) -> list[tuple[Course, Mapping[str, Tensor]]]:
        """What is in the slots."""
        names = ("factors", "first", "second")
        return [
            (course, {name: self.stack.pack(name, slot) for name in names}) for slot, course in enumerate(self.slots)
        ]

    def _state(self) -> bytes:
        in_training = [*self._packed(), *self.paused]
        done = [(course, None if group in self.kept else factors) for group, (course, factors) in self.done.items()]
        state = State(in_training, done, self.begun, self.together, self.passes.limits)
        return encode_state(state, self.identity)


def _validation(base: BaseModel, group: TrainingGroup, settings: TrainingSettings) -> Encoded | None:
    if settings.patience is None:
        return None
    return encode(base, group.validation, settings, f"{group.name}: validation")
