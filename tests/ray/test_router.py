"""A model worker that is killed while it trains a router: another goes on, and the bytes are those of nobody killed."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from raymerge.models.base import load_base
from raymerge.runtime import router
from raymerge.runtime.pool import WorkerKind, run_on_ray
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Item
from raymerge.runtime.training_progress import LiveTrainings
from raymerge.runtime.workers import ModelWorker
from tests.runtime import router_items, training_items
from tests.runtime.router_items import STEPS, RouterGate, digests, make_task, write_world
from tests.runtime.training_items import build_gate, kill_at_gate

for module in (sys.modules[__name__], router_items, training_items):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import these files


class GatedWorker(ModelWorker):
    """Blocks in the middle of its first training."""

    def __init__(self, gate: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.gate = gate

    def train_router(self, task: Any) -> dict[str, Any]:
        router.RouterRecorder, RouterGate.folder = RouterGate, self.gate  # type: ignore[misc]
        return super().train_router(task)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_another_worker_goes_on_where_the_killed_one_was(tmp_path: Path, tiny_llama: Path) -> None:
    arguments = {"base_model": str(tiny_llama), "name": "tiny", "dtype": "float32", "device": "cpu"}
    base = load_base(str(tiny_llama))

    def carry_out(name: str, kind: WorkerKind) -> tuple[Any, str]:
        write_world(tmp_path / name, base)
        item = Item("router", "model", "train_router", make_task(tmp_path / name), alone=True)
        stream = io.StringIO()
        live = LiveTrainings(say=lambda text: progress.say(text))
        live.expect([item])
        progress = Progress("router", stream=stream, watch=live.lines)
        [outcome] = run_on_ray([item], [kind], progress=progress)
        assert outcome.error is None, outcome.error
        return outcome, stream.getvalue()

    gate = build_gate(tmp_path / "gate")
    killer = threading.Thread(target=kill_at_gate, args=(tmp_path / "gate",), daemon=True)
    killer.start()
    outcome, shown = carry_out("killed", WorkerKind("model", GatedWorker, {**arguments, "gate": gate}))
    killer.join(30)
    assert outcome.attempts == 2
    assert outcome.result["said"] == [f"goes on from its checkpoint, 6 of {STEPS} steps"]
    assert outcome.result["spared_s"] > 0
    assert "tried again alone" in shown
    whole, _ = carry_out("whole", WorkerKind("model", ModelWorker, arguments))
    assert (whole.attempts, whole.result["said"]) == (1, [])
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not any((tmp_path / "killed" / "router").glob("checkpoint-*"))
