"""Trainings that are killed in the middle: the worker of an item under Ray, and a whole driver with `--local`."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

import raymerge
from raymerge.pipelines.train import train
from raymerge.runtime import training
from raymerge.runtime.pool import WorkerKind, run_on_ray
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Item
from raymerge.runtime.training_progress import LiveTrainings
from raymerge.runtime.workers import ModelWorker
from tests.runtime import training_items
from tests.runtime.training_items import Gate, build_gate, digests, kill_at_gate, make_task, write_personas

for module in (sys.modules[__name__], training_items):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import these files

ROOT = Path(raymerge.__file__).resolve().parents[1]


class GatedWorker(ModelWorker):
    """Blocks in the middle of its first training."""

    def __init__(self, gate: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.gate = gate

    def train(self, task: Any) -> dict[str, Any]:
        training.Recorder, Gate.folder = Gate, self.gate  # type: ignore[misc]
        return super().train(task)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_another_worker_goes_on_where_the_killed_one_was(tmp_path: Path, tiny_llama: Path):
    arguments = {"base_model": str(tiny_llama), "name": "tiny", "dtype": "float32", "device": "cpu"}
    settings = {"patience": 3, "dropout": 0.1}

    def carry_out(name: str, kind: WorkerKind) -> tuple[Any, str]:
        item = Item("train/persona/0000", "model", "train", make_task(tmp_path / name, **settings), alone=True)
        stream = io.StringIO()
        live = LiveTrainings(say=lambda text: progress.say(text))
        live.expect([item])
        progress = Progress("train", stream=stream, watch=live.lines)
        [outcome] = run_on_ray([item], [kind], progress=progress)
        assert outcome.error is None, outcome.error
        return outcome, stream.getvalue()

    gate = build_gate(tmp_path / "gate")
    killer = threading.Thread(target=kill_at_gate, args=(tmp_path / "gate",), daemon=True)
    killer.start()
    outcome, shown = carry_out("killed", WorkerKind("model", GatedWorker, {**arguments, "gate": gate}))
    killer.join(30)
    assert outcome.attempts == 2
    assert outcome.result["adapters"] == 3  # the fourth was written before
    assert outcome.result["said"] == ["goes on from its checkpoint, 22 of 52 steps"]
    assert "tried again alone" in shown
    whole, _ = carry_out("whole", WorkerKind("model", ModelWorker, arguments))
    assert (whole.attempts, whole.result["said"]) == (1, [])
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def write_project(folder: Path, base: Path) -> str:
    folder.mkdir(exist_ok=True)
    write_personas(folder)
    (folder / "clusters.json").write_text(json.dumps({name: f"cluster_0{name > 'b':d}" for name in "abcd"}))
    project = {
        "base_model": str(base),
        "personas": "personas.jsonl",
        "cluster_adapters": "adapters/{cluster}",
        "clusters": {"file": "clusters.json"},
        "training": {"rank": 2, "epochs": 6, "batch_size": 2, "learning_rate": 0.01, "checkpoint_every": 0},
    }
    (folder / "raymerge.yaml").write_text(yaml.safe_dump(project))
    return str(folder / "raymerge.yaml")


@pytest.mark.e2e
def test_the_same_command_goes_on_where_the_killed_driver_was(tmp_path: Path, tiny_llama: Path, capsys):
    project = write_project(tmp_path / "killed", tiny_llama)
    gate = build_gate(tmp_path / "gate")
    code = f"""
from raymerge.pipelines.train import train
from raymerge.runtime import training
from tests.runtime.training_items import Gate
training.Recorder, Gate.folder = Gate, {gate!r}
train({project!r}, group_by="cluster", local=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL):
        kill_at_gate(tmp_path / "gate")
    assert train(project, group_by="cluster", local=True) == 0
    assert re.search(r"train/cluster/cluster_0\d: goes on from its checkpoint, 6 of \d+ steps", capsys.readouterr().err)
    assert train(write_project(tmp_path / "whole", tiny_llama), group_by="cluster", local=True) == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not (tmp_path / "killed" / "runs" / "_shared" / "training" / "cluster" / "cluster_00").exists()
