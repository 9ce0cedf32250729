"""What a training tells, written down: adapters with markers, checkpoints, how far it is, curves."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raymerge import storage
from raymerge.adapters.peft import encode_adapter
from raymerge.manifest import write_artefact
from raymerge.models.training import GroupProgress, Trained, learning_rate
from raymerge.personas import Example
from raymerge.runtime.experts import first_line
from raymerge.runtime.tasks import TrainGroup, TrainTask
from raymerge.runtime.training_checkpoints import Checkpoints
from raymerge.runtime.training_curves import Curves, curves_folder
from raymerge.runtime.training_inputs import TrainingInputs
from raymerge.runtime.training_progress import ProgressFile


class Recorder:
    """What `train` tells, written down: adapters, checkpoints, how far it is, curves.

    missing: the adapters to be written; the others are there, and only trained again.
    """

    def __init__(
        self,
        task: TrainTask,
        inputs: TrainingInputs,
        missing: set[str],
        checkpoints: Checkpoints,
    ) -> None:
        found = checkpoints.newest()
        lost = [] if found is None else [name for name in found.note.get("kept", ()) if name in missing]
        begun = None if lost else found
        self._state = None if begun is None else begun.state
        note: Mapping[str, Any] = {} if begun is None else begun.note
        self._task = task
        self._inputs = inputs
        self._settings = inputs.settings
        self._missing = missing
        self._checkpoints = checkpoints
        self._steps: dict[str, int] = dict(note.get("steps", {}))
        self._of = int(note.get("of", 0))
        self._validation: dict[str, float | None] = dict(note.get("validation", {}))
        self._spared_s = float(note.get("seconds", 0.0))
        self._kept: set[str] = set(note.get("kept", ()))
        self._finished: list[str] = []
        self._failed: dict[str, str] = {}
        self._started = self._saved = time.monotonic()
        self._progress = ProgressFile(task.folder)
        self._progress.remove()  # that of a worker that was killed
        self._curves = _open_curves(task, missing, resumed=begun is not None)
        if begun is not None:
            self.said(f"goes on from its checkpoint, {sum(self._steps.values())} of {self._of} steps")
        elif lost:
            self.said(f"begins anew: its checkpoint leaves out what was written, and {', '.join(sorted(lost))} is gone")

    def take_state(self) -> bytes | None:
        """What the training goes on from, handed over: it is as large as all that is in training."""
        state, self._state = self._state, None
        return state

    def stepped(self, progress: Mapping[str, GroupProgress], tokens: int) -> None:
        """See models.training.Watch."""
        self._progress.stepped(progress, tokens)
        if self._curves is not None:
            for name in self._missing:
                self._draw(name, progress[name])
        self._steps = {name: p.step for name, p in progress.items()}
        self._validation = {name: p.validation for name, p in progress.items()}
        self._of = sum(p.steps for p in progress.values())

    def finished(self, trained: Trained) -> bool:
        """See models.training.Watch."""
        name = trained.adapter.name
        if trained.diverged:
            self._failed[name] = f"{name}: training diverged: its loss or a factor became NaN. Lower the learning rate."
            return False
        self._finished.append(name)
        if name in self._missing:
            self._publish_or_say()  # before the adapter: whoever goes on draws no curve of one that is there
            [group] = [group for group in self._task.groups if group.name == name]
            write_artefact(group.folder, self._files(group, trained), self._manifest(group, trained), self._key(name))
        self._kept.add(name)
        return True

    def said(self, text: str) -> None:
        """See models.training.Watch."""
        self._progress.say(text)

    def due(self) -> bool:
        """See models.training.Watch."""
        return time.monotonic() - self._saved >= float(self._task.training["checkpoint_every"])

    def save(self, state: bytes) -> None:
        """See models.training.Watch. A checkpoint that cannot be written ends no training."""
        note = {
            "steps": self._steps,
            "of": self._of,
            "validation": self._validation,
            "kept": sorted(self._kept),
            "seconds": self._spared_s + time.monotonic() - self._started,
        }
        try:
            self.publish()
            self._checkpoints.write(state, note)
        except OSError as error:
            self.said(f"a checkpoint could not be written, training goes on: {first_line(error)}")
        self._saved = time.monotonic()

    def _publish_or_say(self) -> None:
        try:
            self.publish()
        except OSError as error:
            self.said(f"curves could not be written, training goes on: {first_line(error)}")

    def publish(self) -> None:
        """Curves so far are there for others to see."""
        if self._curves is not None:
            self._curves.publish()

    def close(self) -> None:
        """Whatever happened, no file stays open."""
        if self._curves is not None:
            self._curves.close()

    def result(self) -> dict[str, Any]:
        """What the driver is told."""
        return {
            "skipped": False,
            "adapters": len(self._missing.intersection(self._finished)),
            "failed": self._failed,
            "said": self._progress.said,
            "spared_s": self._spared_s,
        }

    def _key(self, name: str) -> str:
        return self._inputs.groups[name].key

    def _draw(self, name: str, progress: GroupProgress) -> None:
        if self._curves is None or progress.step <= self._steps.get(name, 0):
            return
        values = {"loss": progress.loss}
        values["learning rate"] = learning_rate(progress.step - 1, progress.steps, self._settings)
        if self._progress.tokens_per_s is not None:
            values["tokens per second"] = self._progress.tokens_per_s
        if progress.validation is not None and progress.validation != self._validation.get(name):
            values["validation loss"] = progress.validation
        self._curves.note(name, progress.step, values)

    def _files(self, group: TrainGroup, trained: Trained) -> dict[str, bytes]:
        files = encode_adapter(trained.adapter)
        if self._task.grouping == "cluster":
            files["cluster_info.json"] = storage.encode_json(cluster_info(group, self._inputs.groups[group.name].rows))
        return files

    def _manifest(self, group: TrainGroup, trained: Trained) -> dict[str, Any]:
        choice = self._inputs.choice
        # where the best was kept and a later step diverged, that step has no loss that JSON could hold
        losses = [round(loss, 6) for loss in trained.losses if math.isfinite(loss)]
        validation = [[step, round(loss, 6)] for step, loss in trained.validation if math.isfinite(loss)]
        return {
            "name": group.name,
            "grouping": self._task.grouping,
            "personas": list(group.personas),
            "training": dict(self._inputs.training),
            "base_digest": self._task.base_digest,
            "losses": losses,
            "validation": validation,
            "best_step": trained.best_step,
            "steps": len(losses),
            "tokens": trained.tokens,
            "epochs_chosen": None if choice is None else choice.as_record(),
        }


def _open_curves(task: TrainTask, missing: set[str], *, resumed: bool) -> Curves | None:
    if not task.training.get("tensorboard"):
        return None
    curves = Curves(curves_folder(task.folder), resumed=resumed)
    for name in () if resumed else missing:
        curves.begin(name)
    return curves


def cluster_info(group: TrainGroup, rows: Sequence[Example]) -> dict[str, Any]:
    """Who a cluster's adapter was trained on, for people who find it: members, and the one with the most examples."""
    counts = Counter(example.persona for example in rows)
    largest = min(counts, key=lambda persona: (-counts[persona], persona))
    return {
        "cluster": group.name,
        "members": list(group.personas),
        "personas": len(group.personas),
        "examples": len(rows),
        "largest": {"persona": largest, "examples": counts[largest]},
    }
