"""How far a training is: what its worker writes, and what people see of it."""

import io
import json

import pytest

from raymerge import storage
from raymerge.models.training import GroupProgress
from raymerge.runtime.events import Item, ItemDone, ItemsAdded, Outcome, WorkerLost, WorkerReady
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Scheduler
from raymerge.runtime.tasks import TrainGroup, TrainTask
from raymerge.runtime.training_progress import LiveTrainings, ProgressFile, live_line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def at(step: int, steps: int = 10, loss: float = 1.0, validation=None, done: bool = False) -> GroupProgress:
    return GroupProgress(step, steps, step / 5, loss, validation, done)


def item(folder, *names: str, id: str = "train/persona/0003") -> Item:
    groups = tuple(TrainGroup(name, f"{folder}/{name}", (name,)) for name in names)
    task = TrainTask(groups, "persona", "p.jsonl", {}, "{prompt}", "sha256:0", str(folder), str(folder))
    return Item(id, "model", "train", task, alone=True)


def test_pace_and_time_left_are_those_of_the_last_minute(tmp_path):
    clock = Clock()
    file = ProgressFile(str(tmp_path), clock)
    for step in range(1, 6):  # slow
        clock.now += 50
        file.stepped({"a": at(step, 200), "b": at(0, 200, float("nan"))}, tokens=100)
    for step in range(6, 70):  # then a step each second
        clock.now += 1
        file.stepped({"a": at(step, 200), "b": at(0, 200, float("nan"))}, tokens=100)
    assert file.tokens_per_s == pytest.approx(100, rel=0.02)
    assert file.left_s == pytest.approx(200 - 69 + 200, rel=0.02)


def test_an_adapter_that_stopped_early_needs_no_more_time(tmp_path):
    clock = Clock()
    file = ProgressFile(str(tmp_path), clock)
    for step in (1, 2, 3):
        clock.now += 1
        file.stepped({"a": at(step, 9), "b": at(2, 100, done=True)}, tokens=1)
    assert file.left_s == pytest.approx(6)


def test_the_file_is_written_every_two_seconds_and_when_something_is_said(tmp_path):
    clock, location = Clock(), tmp_path / "progress.json"
    file = ProgressFile(str(tmp_path), clock)
    file.stepped({"a": at(1, loss=float("nan"))}, 5)
    first = json.loads(location.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert first["groups"] == {"a": {"step": 1, "steps": 10, "loss": None, "validation": None, "done": False}}
    assert (first["tokens_per_s"], first["left_s"], first["said"]) == (None, None, [])
    clock.now += 1.9
    file.stepped({"a": at(2)}, 5)
    assert json.loads(location.read_text()) == first
    clock.now += 0.2
    file.stepped({"a": at(3, validation=1.5)}, 5)
    assert json.loads(location.read_text())["groups"]["a"]["validation"] == 1.5
    file.say("memory ran out")
    assert json.loads(location.read_text())["said"] == ["memory ran out"]
    file.remove()
    assert not location.exists()


def test_a_place_that_cannot_be_written_ends_no_training(tmp_path):
    (tmp_path / "file").touch()
    file = ProgressFile(str(tmp_path / "file" / "below"), Clock())
    file.stepped({"a": at(1)}, 5)
    file.say("x")
    assert file.said == ["x"]


def test_lines_say_what_a_person_wants_to_know(tmp_path):
    one, many = item(tmp_path, "cluster_03"), item(tmp_path, *"abc")
    record = {"step": 120, "steps": 480, "loss": 1.234, "validation": 1.3, "done": False}
    known = {"groups": {"cluster_03": record}, "tokens_per_s": 5210.0, "left_s": 62.0, "said": []}
    line = live_line(one.id, one.payload, known)
    assert line == "cluster_03: step 120/480, 1:02 left, loss 1.23, 5.2k tokens/s, validation 1.30"
    assert len(line) <= 78
    groups = {
        "a": {**record, "step": 100, "steps": 100, "loss": 9.0, "done": True},
        "b": {**record, "step": 20, "steps": 100, "loss": 1.0, "validation": None},
        "c": {**record, "step": 0, "steps": 100, "loss": None, "validation": None},
    }
    line = live_line(many.id, many.payload, {**known, "groups": groups, "tokens_per_s": None})
    assert line == "3 adapters of train/persona/0003: 40 %, 1 done, 1:02 left, loss 1.00"
    assert live_line(one.id, one.payload, {"groups": {}}) is None


def test_what_was_said_is_told_once_also_by_an_item_that_ended_between_two_looks(tmp_path):
    told: list[str] = []
    live = LiveTrainings(told.append, Clock())
    live.expect([item(tmp_path, "a"), Item("merge/x", "merge", "merge")])
    file = ProgressFile(str(tmp_path), Clock())
    assert live.lines(["train/persona/0003", "merge/x"]) == []
    file.stepped({"a": at(1)}, 5)
    file.say("memory ran out: 4 rows at once")
    assert live.lines(["train/persona/0003"]) == ["a: step 1/10, loss 1.00"]
    live.lines(["train/persona/0003"])
    assert told == ["train/persona/0003: memory ran out: 4 rows at once"]
    result = {"said": ["memory ran out: 4 rows at once", "goes on"]}
    live.settle(Outcome("train/persona/0003", result, None, 1, 1.0, "here"))
    live.settle(Outcome("merge/x", None, "failed", 1, 1.0, "here"))
    assert told[1:] == ["train/persona/0003: goes on"]
    (tmp_path / "progress.json").write_text("{")
    assert live.lines(["train/persona/0003"]) == []


def test_a_uri_is_asked_every_few_seconds_only(tmp_path, monkeypatch):
    clock, place, asked = Clock(), f"file://{tmp_path}", []
    live = LiveTrainings(print, clock)
    live.expect([item(place, "a")])
    ProgressFile(place, clock).stepped({"a": at(1)}, 5)
    read = storage.read_json
    monkeypatch.setattr(storage, "read_json", lambda location: asked.append(location) or read(location))
    for _ in range(11):
        assert live.lines(["train/persona/0003"]) == ["a: step 1/10, loss 1.00"]
        clock.now += 1
    assert len(asked) == 3


def test_the_scheduler_tells_what_is_being_worked_on():
    scheduler = Scheduler({"m": 2})
    scheduler.handle(ItemsAdded(tuple(Item(id, "m", "work") for id in "abcde")))
    assert scheduler.snapshot().working == ()
    scheduler.handle(WorkerReady("m-0"))
    assert scheduler.snapshot().working == ("a",)  # b waits behind it
    scheduler.handle(WorkerReady("m-1"))
    assert scheduler.snapshot().working == ("a", "c")
    scheduler.handle(ItemDone("m-0", "a"))
    assert scheduler.snapshot().working == ("b", "c")
    scheduler.handle(WorkerLost("m-1", "killed"))
    assert scheduler.snapshot().working == ("b",)


def test_a_job_log_gets_a_line_for_each_training_at_most_every_fifteen_seconds(tmp_path):
    clock, stream = Clock(), io.StringIO()
    live = LiveTrainings(print, clock)
    live.expect([item(tmp_path, "a")])
    file = ProgressFile(str(tmp_path), clock)
    scheduler = Scheduler({"model": 1})
    scheduler.handle(ItemsAdded((item(tmp_path, "a"),)))
    scheduler.handle(WorkerReady("model-0"))
    progress = Progress("train", stream=stream, every_s=1000, clock=clock, watch=live.lines)
    progress.update(scheduler.snapshot())
    for step in range(1, 41):
        clock.now += 1
        file.stepped({"a": at(step, 40)}, 10)
        progress.look()
    seen = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in seen] == [f"train: a: step {n}/40" for n in (1, 15, 31)]
