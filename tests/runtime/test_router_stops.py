"""A router's training that was stopped ends as if it had not been."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from raymerge.routing.router import read_router
from tests.runtime.router_items import STEPS, digests, make_task, run_stopped, write_world
from tests.runtime.training_items import build_gate, kill_at_gate, make_worker

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def worker(tiny_llama):
    return make_worker(tiny_llama)


@pytest.fixture
def world(tmp_path, worker):
    write_world(tmp_path, worker.base)
    return tmp_path


def test_a_killed_training_ends_in_the_bytes_of_one_that_was_not(tmp_path, worker, tiny_llama):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_world(folder, worker.base)
    worker.train_router(make_task(whole))
    gate = build_gate(tmp_path / "gate")
    code = f"""
from pathlib import Path
from raymerge.runtime import router
from tests.runtime.router_items import RouterGate, make_task
from tests.runtime.training_items import make_worker
router.RouterRecorder, RouterGate.folder = RouterGate, {gate!r}
make_worker({str(tiny_llama)!r}).train_router(make_task(Path({str(killed)!r})))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT):
        kill_at_gate(tmp_path / "gate")
    assert (killed / "router" / "progress.json").exists()
    result = worker.train_router(make_task(killed))
    assert result["said"] == [f"goes on from its checkpoint, 6 of {STEPS} steps"]
    assert result["spared_s"] > 0
    assert digests(killed) == digests(whole)


def test_an_item_at_a_uri_is_carried_out_and_goes_on_there(tmp_path, worker, monkeypatch):
    for name in ("whole", "item"):
        write_world(tmp_path / name, worker.base)
    worker.train_router(make_task(tmp_path / "whole"))
    task = make_task(tmp_path / "item")
    task = replace(task, folder=f"file://{task.folder}", placing=f"file://{task.placing}")
    run_stopped(task, worker, 5, monkeypatch)
    assert worker.train_router(task)["said"] == [f"goes on from its checkpoint, 4 of {STEPS} steps"]
    assert digests(tmp_path / "item") == digests(tmp_path / "whole")


def test_a_checkpoint_of_other_inputs_does_not_count(world, worker, monkeypatch):
    run_stopped(make_task(world), worker, 3, monkeypatch)
    assert worker.train_router(make_task(world, learning_rate=0.2))["said"] == []


def test_a_checkpoint_that_cannot_be_written_ends_no_training(world, worker):
    task = make_task(world)
    Path(task.folder).mkdir()
    Path(task.folder, "checkpoint-0").touch()
    said = worker.train_router(task)["said"]
    assert said[0].startswith("a checkpoint could not be written, training goes on: ")
    read_router(task.folder)
