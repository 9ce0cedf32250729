"""The same items in this process."""

import subprocess
import sys

import pytest
import torch

from raymerge.errors import AdapterError, ModelError, PoolError
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.local import run_local
from raymerge.runtime.scheduler import Item


class Adder:
    """Adds, and breaks where told to."""

    def __init__(self, start: int = 0) -> None:
        self.total = start

    def add(self, number: int) -> dict:
        self.total += number
        return {"total": self.total}

    def spoil(self, name: str) -> None:
        raise AdapterError(f"{name}: holds NaN\nRetrain it.")

    def stumble(self, key: str) -> None:
        {}[key]

    def threads(self, _) -> dict:
        return {"threads": torch.get_num_threads()}

    def interrupt(self, _) -> None:
        raise KeyboardInterrupt


class Unloadable:
    def __init__(self) -> None:
        raise ModelError("models/base: no such model\nGive a path.")


KINDS = [WorkerKind("m", Adder, {"start": 10})]


def test_items_are_carried_out_in_order_and_failures_are_texts():
    items = [
        Item("a", "m", "add", 1), Item("b", "m", "spoil", "persona_3"), Item("c", "m", "stumble", "x"),
        Item("d", "m", "add", 2, after={"b", "c"}), Item("e", "m", "missing", 0),
    ]  # fmt: skip
    a, b, c, d, e = run_local(items, KINDS)
    assert (a.result, d.result) == ({"total": 11}, {"total": 13})
    assert b.error == "persona_3: holds NaN\nRetrain it."
    assert c.error is not None
    assert c.error.startswith("KeyError: 'x' (in stumble, test_local.py:")
    assert c.traceback is not None
    assert "Traceback" in c.traceback
    assert e.error is not None
    assert "has no attribute 'missing'" in e.error
    assert [o.attempts for o in (a, b, c, d, e)] == [1] * 5
    assert a.seconds >= 0
    assert a.host


def test_follow_sees_each_outcome_once_and_adds_items():
    seen = []

    def follow(outcome):
        seen.append(outcome.item_id)
        n = len(outcome.item_id)
        return [Item(outcome.item_id + "x", "m", "add", 1, after={outcome.item_id})] if n < 4 else []

    outcomes = run_local([Item("a", "m", "add", 1), Item("b", "m", "spoil", "b")], KINDS, follow=follow)
    assert sorted(seen) == sorted(o.item_id for o in outcomes) == sorted(x + "x" * n for x in "ab" for n in range(4))


def test_a_worker_that_cannot_be_constructed_ends_the_run_with_its_reason():
    with pytest.raises(PoolError, match="workers of kind m: none can be had\nmodels/base: no such model"):
        run_local([Item("a", "m", "add", 1)], [WorkerKind("m", Unloadable)])


def test_an_interrupt_goes_through_and_threads_are_as_before():
    before = torch.get_num_threads()
    kinds = [WorkerKind("m", Adder, num_cpus=3), WorkerKind("g", Adder, num_cpus=0.5)]
    first, second = run_local([Item("a", "m", "threads"), Item("b", "g", "threads")], kinds)
    assert (first.result, second.result) == ({"threads": 3}, {"threads": 1})
    with pytest.raises(KeyboardInterrupt):
        run_local([Item("a", "m", "interrupt")], kinds)
    assert torch.get_num_threads() == before


def test_nothing_to_do_is_no_outcome():
    assert run_local([], KINDS) == []


def test_running_here_does_not_load_ray_and_planning_does_not_load_torch():
    code = """
import sys
from raymerge.runtime.pool import WorkerKind, run_local, run_on_ray, plan_workers
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Item
assert not {"ray", "torch", "rich"} & set(sys.modules), sorted(sys.modules)
class W:
    def go(self, x): return {"x": x}
[o] = run_local([Item("a", "m", "go", 1)], [WorkerKind("m", W)])
assert o.result == {"x": 1}
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Placed:
    def __init__(self, device: str) -> None:
        self.device = device

    def where(self, _: object) -> dict[str, str]:
        return {"device": self.device}


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), ("auto", "auto"), (1, "auto")])
def test_a_worker_here_takes_a_gpu_unless_none_is_wanted(gpus, device):
    kind = WorkerKind("m", Placed, num_gpus=gpus, device_argument="device")
    [outcome] = run_local([Item("a", "m", "where", None)], [kind])
    assert outcome.result == {"device": device}
