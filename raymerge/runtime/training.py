"""A training item on a model worker: rows in, adapters with markers out."""

from __future__ import annotations

from typing import Any

from raymerge import storage
from raymerge.adapters import LoraAdapter
from raymerge.adapters.formats import adapter_digest
from raymerge.adapters.peft import encode_adapter
from raymerge.errors import PersonaError
from raymerge.manifest import invalidate, is_complete, write_artefact
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.personas import Personas, read_personas, render_prompt
from raymerge.runtime.tasks import TrainGroup, TrainTask


def train_to_folders(task: TrainTask, worker: Any) -> dict[str, Any]:
    """Train a task's adapters unless all are there; if one is missing all are trained, so that bytes stay the same."""
    personas = read_personas(task.personas)
    dtype = worker.dtype_name
    keys = {group.name: _key(task, group, personas, dtype) for group in task.groups}
    missing = [group for group in task.groups if not is_complete(group.folder, keys[group.name])]
    if not missing:
        return {"skipped": True}
    for group in missing:
        invalidate(group.folder)
    base = worker.base
    started = _start(task, worker)
    groups = [
        TrainingGroup(
            group.name,
            tuple(
                (render_prompt(e.asked, task.prompt_format, base.tokenizer), e.response) for e in _rows(personas, group)
            ),
        )
        for group in task.groups
    ]
    failed: dict[str, str] = {}
    wanted = {group.name for group in missing}
    for group, result in zip(task.groups, train(base, groups, _settings(task), start_from=started), strict=True):
        if result.diverged:
            failed[group.name] = f"{group.name}: training diverged: its loss became NaN. Lower the learning rate."
        elif group.name in wanted:
            manifest = {
                "name": group.name,
                "grouping": task.grouping,
                "personas": list(group.personas),
                "training": dict(task.training),
                "base_digest": task.base_digest,
                "losses": [round(loss, 6) for loss in result.losses],
                "tokens": result.tokens,
            }
            write_artefact(group.folder, encode_adapter(result.adapter), manifest, keys[group.name])
    return {"skipped": False, "adapters": len(missing) - len(failed), "failed": failed}


def _start(task: TrainTask, worker: Any) -> LoraAdapter | None:
    start = task.training["start_from"]
    if not start:
        return None
    location = storage.resolve(task.workspace, start)
    return worker.cache.read(start, location, base=worker.base_model or None)  # type: ignore[no-any-return]


def _rows(personas: Personas, group: TrainGroup) -> list[Any]:
    rows = [example for persona in group.personas for example in personas.examples(persona, "train")]
    if not rows:
        raise PersonaError(f"{group.name}: has no training examples.\nAdd rows with split train, or leave it out.")
    return rows


def _key(task: TrainTask, group: TrainGroup, personas: Personas, dtype: str) -> str:
    start = task.training["start_from"]
    return storage.digest_value(
        {
            "rows": [e.content for e in _rows(personas, group)],
            "training": {k: v for k, v in task.training.items() if k != "adapters_per_item"},
            "prompt_format": task.prompt_format,
            "base": task.base_digest,
            "dtype": dtype,
            "start": adapter_digest(storage.resolve(task.workspace, start)) if start else None,
            "name": None if task.training["shared_init"] else group.name,
        }
    )


def _settings(task: TrainTask) -> TrainingSettings:
    known = {k: v for k, v in task.training.items() if k in TrainingSettings.__dataclass_fields__}
    targets = known["target_modules"]
    return TrainingSettings(**{**known, "target_modules": targets if isinstance(targets, str) else tuple(targets)})
