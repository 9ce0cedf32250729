"""What decides the adapters of a training item: rows, settings, the number of epochs, and the keys they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from raymerge import storage
from raymerge.adapters.formats import adapter_digest
from raymerge.config import Training
from raymerge.errors import EvaluationError, PersonaError, StorageError
from raymerge.manifest import is_complete, read_manifest
from raymerge.models.training import TrainingSettings
from raymerge.personas import Example, Personas, Split
from raymerge.runtime.tasks import PrefixTask, TrainGroup, TrainTask

# How an adapter is computed, not what it is.
_NOT_IN_KEY = (
    "adapters_per_item", "checkpoint_every", "tensorboard", "micro_batch", "gradient_checkpointing", "epochs_chosen_by",
)  # fmt: skip
# In every key. Settings that came later are in it where they are not at their default: older adapters stay valid.
_ALWAYS_IN_KEY = (
    "rank", "alpha", "target_modules", "epochs", "learning_rate", "batch_size", "warmup", "weight_decay", "clip",
    "seed", "shared_init", "start_from",
)  # fmt: skip


@dataclass(frozen=True)
class EpochChoice:
    """A number of epochs that validation examples chose. tried: epochs -> mean similarity there. by: what answered
    them, as `config.Training.epochs_chosen_by`."""

    chosen: int
    tried: Mapping[int, float]
    by: str = "own"

    def as_record(self) -> dict[str, Any]:
        """For a manifest."""
        tried = {str(epochs): value for epochs, value in sorted(self.tried.items())}
        return {"chosen": self.chosen, "by": self.by, "tried": tried}


@dataclass(frozen=True)
class GroupInputs:
    """The examples of one adapter, and the key of what they and the settings make."""

    rows: tuple[Example, ...]
    validation: tuple[Example, ...]
    key: str


@dataclass(frozen=True)
class TrainingInputs:
    """training: `TrainTask.training` with one number of epochs. groups: by the name of the adapter, in their order."""

    training: Mapping[str, Any]
    choice: EpochChoice | None
    groups: Mapping[str, GroupInputs]

    @property
    def key(self) -> str:
        """Of all adapters of the item and of how they are computed: what a checkpoint must fit."""
        return storage.digest_value([[[n, group.key] for n, group in self.groups.items()], asdict(self.settings)])

    @property
    def settings(self) -> TrainingSettings:
        """As `train` takes them."""
        known = {k: v for k, v in self.training.items() if k in TrainingSettings.__dataclass_fields__}
        targets = known["target_modules"]
        return TrainingSettings(**{**known, "target_modules": targets if isinstance(targets, str) else tuple(targets)})


def gather_inputs(task: TrainTask | PrefixTask, personas: Personas, dtype: str) -> TrainingInputs:
    """Read what decides a task's adapters.

    dtype: of the base on this worker. Raises PersonaError where examples are missing, EvaluationError where
    nothing says how many epochs are best.
    """
    choice = choose_epochs(task)
    training = dict(task.training) if choice is None else {**task.training, "epochs": choice.chosen}
    named = training["start_from"]
    start = storage.resolve(task.workspace, named) if named and isinstance(task, TrainTask) else None
    common = {
        "training": {key: value for key, value in training.items() if _is_in_key(key, value)},
        "prompt_format": task.prompt_format,
        "base": task.base_digest,
        "dtype": dtype,
        "start": adapter_digest(start) if start else None,
    }
    groups = {group.name: _group_inputs(group, personas, training, common) for group in task.groups}
    return TrainingInputs(training, choice, groups)


def _group_inputs(
    group: TrainGroup, personas: Personas, training: Mapping[str, Any], common: Mapping[str, Any]
) -> GroupInputs:
    rows = examples_of(personas, group, "train")
    parts = {"rows": [e.content for e in rows], **common, "name": None if training["shared_init"] else group.name}
    if training.get("patience") is None:
        return GroupInputs(rows, (), storage.digest_value(parts))
    validation = examples_of(personas, group, "validation")
    parts["validation"] = [e.content for e in validation]
    return GroupInputs(rows, validation, storage.digest_value(parts))


def examples_of(personas: Personas, group: TrainGroup, split: Split) -> tuple[Example, ...]:
    """The examples of a group's personas, one after the other. Raises PersonaError if there are none."""
    examples = tuple(e for persona in group.personas for e in personas.examples(persona, split))
    if not examples:
        if split == "train":
            raise PersonaError(f"{group.name}: has no training examples.\nAdd rows with split train, or leave it out.")
        raise PersonaError(
            f"{group.name}: has no validation examples, and training.patience looks at them.\n"
            "Add rows with split validation, or leave patience out."
        )
    return examples


def choose_epochs(task: TrainTask | PrefixTask) -> EpochChoice | None:
    """The number of epochs with the best mean similarity on validation examples, the smaller of equals; None where the
    task names one number. Trials that failed do not take part. Raises EvaluationError if all of them did."""
    epochs = task.training["epochs"]
    if isinstance(epochs, int):
        return None
    by = str(task.training["epochs_chosen_by"])
    if len(set(epochs)) == 1:
        return EpochChoice(epochs[0], {}, by)
    scored = {
        trial.epochs: summary
        for trial in task.trials
        if trial.epochs in epochs and (summary := _summary(trial.evaluation)) is not None
    }
    whole = {number: summary for number, summary in scored.items() if not summary.get("failed")}
    # a mean over those whom a trial did not fail would be compared with a mean over all
    tried = {number: float(summary["mean"]["similarity"]) for number, summary in (whole or scored).items()}
    if not tried:
        listed = ", ".join(trial.evaluation for trial in task.trials) or "none"
        raise EvaluationError(
            f"training.epochs {list(epochs)}: none of them was tried to the end, so none can be chosen.\n"
            f"Expected an evaluation on validation examples for each; looked at: {listed}.\n"
            "The failures of the trials say why. Or give one number of epochs."
        )
    return EpochChoice(min(tried, key=lambda number: (-tried[number], number)), tried, by)


def _summary(evaluation: str) -> Any:
    """Of a complete evaluation that scored somebody; else None."""
    manifest = read_manifest(evaluation)
    if manifest is None or not is_complete(evaluation, manifest["key"]):
        return None
    try:
        summary = storage.read_json(storage.join(evaluation, "summary.json"))
    except StorageError:
        return None
    mean = summary["mean"]["similarity"]
    return summary if mean is not None and math.isfinite(mean) else None


def _is_in_key(key: str, value: Any) -> bool:
    if key in _NOT_IN_KEY:
        return False
    return key in _ALWAYS_IN_KEY or value != Training.model_fields[key].default
