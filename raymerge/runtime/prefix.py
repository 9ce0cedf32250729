"""A prefix item on a model worker: rows in, prefixes in PEFT's form with markers out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raymerge import storage
from raymerge.manifest import invalidate, is_complete, write_artefact
from raymerge.models.prefix import encode_prefix
from raymerge.models.prefix_training import TrainedPrefix, first_prefix, train_prefixes
from raymerge.models.training import TrainingGroup
from raymerge.personas import read_personas, render_prompt
from raymerge.runtime.tasks import PrefixTask, TrainGroup
from raymerge.runtime.training_inputs import TrainingInputs, gather_inputs
from raymerge.runtime.training_progress import ProgressFile

# What a prefix has no use for: it has no rank, begins with nothing, and is trained to the end.
_UNUSED = {
    "rank": 1, "alpha": 1.0, "rslora": False, "dropout": 0.0, "target_modules": "all-linear", "start_from": None,
    "patience": None,
}  # fmt: skip


def train_prefixes_to_folders(task: PrefixTask, worker: Any) -> dict[str, Any]:
    """Train a task's prefixes unless they are there. Those that trained side by side are trained again together if one
    of them is missing, so that bytes stay the same. A prefix is written as soon as those beside it are done.

    The result tells how many were written, which diverged (`failed`), and what people should know (`said`).
    """
    given = replace(task, training={**task.training, **_UNUSED})
    inputs = gather_inputs(given, read_personas(task.personas), worker.dtype_name)
    keys = {name: storage.digest_value([own.key, task.tokens]) for name, own in inputs.groups.items()}
    missing = {g.name: g for g in task.groups if not is_complete(g.folder, keys[g.name])}
    progress = ProgressFile(task.folder)
    progress.remove()  # that of a worker that was killed
    if not missing:
        _clear(task, progress)
        return {"skipped": True}
    for group in missing.values():
        invalidate(group.folder)
    base = worker.base
    groups = [
        TrainingGroup(
            name, [(render_prompt(e.asked, task.prompt_format, base.tokenizer), e.response) for e in own.rows]
        )
        for name, own in inputs.groups.items()
    ]
    config, first = first_prefix(base, task.tokens, inputs.settings.seed)
    failed: dict[str, str] = {}
    for trained in train_prefixes(
        base, groups, first, inputs.settings, missing, stepped=progress.stepped, said=progress.say
    ):
        name = trained.prefix.name
        if name not in missing:
            continue
        if trained.diverged:
            failed[name] = f"{name}: training diverged: it became NaN. Lower the learning rate."
        else:
            manifest = _manifest(task, missing[name], inputs, trained)
            write_artefact(missing[name].folder, encode_prefix(trained.prefix, config), manifest, keys[name])
    _clear(task, progress)
    return {"skipped": False, "adapters": len(missing) - len(failed), "failed": failed, "said": progress.said}


def _clear(task: PrefixTask, progress: ProgressFile) -> None:
    """Nothing of a finished item stays but its prefixes."""
    progress.remove()
    if not storage.list_names(task.folder):
        storage.remove(task.folder)


def _manifest(task: PrefixTask, group: TrainGroup, inputs: TrainingInputs, trained: TrainedPrefix) -> Mapping[str, Any]:
    return {
        "name": group.name,
        "grouping": "prefix",
        "personas": list(group.personas),
        "training": {key: value for key, value in inputs.training.items() if key not in _UNUSED},
        "virtual_tokens": task.tokens,
        "base_digest": task.base_digest,
        "losses": [round(loss, 6) for loss in trained.losses],
        "validation": [],
        "best_step": None,
        "steps": len(trained.losses),
        "tokens": trained.tokens,
        "epochs_chosen": None if inputs.choice is None else inputs.choice.as_record(),
    }
