"""A training item on a model worker: rows in, adapters with markers out."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raymerge import storage
from raymerge.adapters import LoraAdapter
from raymerge.adapters.peft import encode_adapter
from raymerge.errors import ModelError
from raymerge.evaluation.wording import cut
from raymerge.manifest import invalidate, is_complete, read_manifest, write_artefact
from raymerge.models.training import GroupProgress, Trained, TrainingGroup, learning_rate, train
from raymerge.personas import Example, read_personas, render_prompt
from raymerge.runtime.experts import first_line
from raymerge.runtime.tasks import TrainGroup, TrainTask
from raymerge.runtime.training_checkpoints import Checkpoints
from raymerge.runtime.training_curves import Curves, check_tensorboard, curves_folder
from raymerge.runtime.training_inputs import TrainingInputs, gather_inputs
from raymerge.runtime.training_progress import ProgressFile


def train_to_folders(task: TrainTask, worker: Any) -> dict[str, Any]:
    """Train a task's adapters unless all are there; if one is missing all are trained, so that bytes stay the same.

    Each is written as soon as it is finished. A training that was interrupted goes on from its last checkpoint, unless
    an adapter that was written before it, whose factors it lacks, is gone by now. The result tells how
    many adapters were written, which diverged (`failed`), what people should know (`said`), and the seconds of earlier
    workers that the checkpoint spared this one (`spared_s`).
    """
    inputs = gather_inputs(task, read_personas(task.personas), worker.dtype_name)
    missing = {g.name for g in task.groups if not is_complete(g.folder, inputs.groups[g.name].key)}
    checkpoints = Checkpoints(task.folder, inputs.key)
    if not missing:
        _clear(task, checkpoints)
        return {"skipped": True}
    if _publish_tried(task, inputs):
        _clear(task, checkpoints)
        return {"skipped": False, "adapters": 1}
    if task.training.get("tensorboard"):
        check_tensorboard()
    for group in task.groups:
        if group.name in missing:
            invalidate(group.folder)
    recorder = Recorder(task, inputs, missing, checkpoints)
    try:
        base = worker.base
        groups = [
            TrainingGroup(
                name,
                _rendered(group.rows, task.prompt_format, base.tokenizer),
                _rendered(group.validation, task.prompt_format, base.tokenizer),
            )
            for name, group in inputs.groups.items()
        ]
        train(base, groups, inputs.settings, _start(task, worker), recorder, recorder.take_state())
        recorder.publish()
    except Exception as error:
        ProgressFile(task.folder).remove()  # checkpoints stay: what is tried again goes on from them
        _remove_if_empty(task.folder)
        if isinstance(error, ModelError):
            raise _with_persona(error, inputs) from error
        raise
    finally:
        recorder.close()
    _clear(task, checkpoints)
    return recorder.result()


def _publish_tried(task: TrainTask, inputs: TrainingInputs) -> bool:
    """Whether the trial that was chosen made the very adapter that is wanted: then it is copied.

    Of an item of many adapters none is, since the others would be trained in other company.
    """
    trial = next((t for t in task.trials if inputs.choice is not None and t.epochs == inputs.choice.chosen), None)
    if trial is None or len(task.groups) > 1 or inputs.choice is None:
        return False
    [group] = task.groups
    key, place = inputs.groups[group.name].key, storage.join(trial.adapters, group.name)
    manifest = read_manifest(place)
    if manifest is None or not is_complete(place, key):
        return False
    files = {name: storage.read_bytes(storage.join(place, name)) for name in manifest["files"]}
    kept = {name: value for name, value in manifest.items() if name not in ("files", "key")}
    write_artefact(group.folder, files, {**kept, "epochs_chosen": inputs.choice.as_record()}, key)
    return True


def _with_persona(error: ModelError, inputs: TrainingInputs) -> ModelError:
    """The engine knows rows by their number among those of an adapter; people know them by whose they are."""
    for name, group in inputs.groups.items():
        found = re.match(rf"{re.escape(name)}: (validation: )?row (\d+)\b", str(error))
        if found is not None:
            examples = group.validation if found[1] else group.rows
            example = examples[int(found[2])]
            whose = f" ({example.persona}'s answer to {cut(example.prompt, 60)!r})"
            return ModelError(str(error)[: found.end()] + whose + str(error)[found.end() :])
    return error


def _start(task: TrainTask, worker: Any) -> LoraAdapter | None:
    start = task.training["start_from"]
    if not start:
        return None
    location = storage.resolve(task.workspace, start)
    return worker.cache.read(start, location, base=worker.base_model or None)  # type: ignore[no-any-return]


def _rendered(examples: tuple[Example, ...], prompt_format: str, tokenizer: Any) -> tuple[tuple[str, str], ...]:
    return tuple((render_prompt(e.asked, prompt_format, tokenizer), e.response) for e in examples)


def _clear(task: TrainTask, checkpoints: Checkpoints) -> None:
    """Nothing of a finished item stays but its adapters."""
    checkpoints.clear()
    ProgressFile(task.folder).remove()
    _remove_if_empty(task.folder)


def _remove_if_empty(folder: str) -> None:
    if not storage.list_names(folder):
        storage.remove(folder)


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
