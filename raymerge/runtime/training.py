"""A training item on a model worker: rows in, adapters with markers out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raymerge import storage
from raymerge.adapters import LoraAdapter
from raymerge.errors import ModelError
from raymerge.evaluation.wording import cut
from raymerge.manifest import invalidate, is_complete, read_manifest, write_artefact
from raymerge.models.training import TrainingGroup, train
from raymerge.personas import Example, read_personas, render_prompt
from raymerge.runtime.tasks import TrainTask
from raymerge.runtime.training_checkpoints import Checkpoints
from raymerge.runtime.training_curves import check_tensorboard
from raymerge.runtime.training_inputs import GroupInputs, TrainingInputs, gather_inputs
from raymerge.runtime.training_progress import ProgressFile
from raymerge.runtime.training_recorder import Recorder


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
            raise with_example(error, inputs.groups) from error
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


def with_example(error: ModelError, groups: Mapping[str, GroupInputs]) -> ModelError:
    """The engine knows rows by their number among those of a group; people know them by whose they are."""
    for name, group in groups.items():
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
