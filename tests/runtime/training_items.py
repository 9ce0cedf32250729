"""A training item of unequal adapters on a tiny base, and ways to stop it in the middle."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
from pathlib import Path
from typing import Any

from raymerge.config import Training
from raymerge.runtime.tasks import TrainGroup, TrainTask
from raymerge.runtime.training_recorder import Recorder
from raymerge.runtime.workers import ModelWorker

ROWS = {"a": 9, "b": 2, "c": 7, "d": 6}
LIMIT_S = 60


def write_personas(folder: Path) -> str:
    lines = [
        {"persona": name, "prompt": f"w{i} w{j}?", "response": f"w{j + 1} w{i + 2} w{j}.", "split": split}
        for i, (name, rows) in enumerate(ROWS.items())
        for split, count in (("train", rows), ("validation", 2))
        for j in range(count)
    ]
    location = folder / "personas.jsonl"
    location.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(location)


def make_task(folder: Path, grouping: str = "persona", **settings: Any) -> TrainTask:
    """Four adapters, or one of all four personas; every step is checkpointed unless said otherwise."""
    folder.mkdir(exist_ok=True)
    given = {"rank": 2, "epochs": 4, "batch_size": 2, "learning_rate": 0.01, "checkpoint_every": 0, **settings}
    training = Training(**given).of("persona").model_dump(mode="json")
    members = {name: (name,) for name in ROWS} if grouping == "persona" else {f"{grouping}_00": tuple(ROWS)}
    groups = tuple(TrainGroup(name, str(folder / "adapters" / name), own) for name, own in members.items())
    place = str(folder / "runs" / "_shared" / "training" / grouping / "0000")
    personas = write_personas(folder)
    return TrainTask(groups, grouping, personas, training, "{prompt}", "sha256:base", str(folder), place)


def make_worker(base: Path | str) -> ModelWorker:
    return ModelWorker(str(base), "tiny", dtype="float32", device="cpu")


def digests(folder: Path) -> dict[str, str]:
    """Of every file of the adapters of an item."""
    files = sorted(p for p in (folder / "adapters").rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Gated:
    """Wants a checkpoint at every third step. At the eighth it tells its process id and blocks until it is killed;
    once it was, whoever goes on passes. To be put before what records."""

    folder = ""
    seen = 0

    def due(self) -> bool:
        return self.seen % 3 == 0

    def stepped(self, progress: Any, tokens: int) -> None:
        super().stepped(progress, tokens)  # type: ignore[misc]
        self.seen += 1
        if self.seen == 8 and not Path(self.folder, "passed").exists():
            Path(self.folder, "passed").touch()
            Path(self.folder, "pid").write_text(str(os.getpid()))
            Path(self.folder, "gate").read_text()


class Gate(Gated, Recorder):
    """Of adapters."""


def build_gate(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    for name in ("pid", "gate"):
        os.mkfifo(folder / name)
    return str(folder)


def kill_at_gate(folder: Path) -> None:
    """Wait until a process stands at the gate, and kill it."""
    handle = os.open(folder / "pid", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([handle], [], [], LIMIT_S)[0], "nobody came to the gate"
        pid = int(os.read(handle, 100))
    finally:
        os.close(handle)
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([process], [], [], LIMIT_S)[0], f"process {pid} did not end"
    os.close(process)
