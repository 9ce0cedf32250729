"""The pool on a real Ray, with workers that are really killed.

Nothing here sleeps: an item blocks on a named pipe until the test has done what it wants to do to it.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import raymerge
from raymerge.errors import AdapterError, ModelError, PoolError
from raymerge.runtime.local import run_local
from raymerge.runtime.pool import WorkerKind, run_on_ray
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Item, Outcome
from tests.ray.conftest import wait_for_end

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

ROOT = Path(raymerge.__file__).resolve().parents[1]


class Scribe:
    """Notes in a file what it begins and finishes, so that nothing can be done twice unseen."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _note(self, line: str) -> None:
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, f"{line}\n".encode())
        os.close(log)

    def work(self, name: str) -> dict[str, Any]:
        self._note(f"begin {name}")
        self._note(f"end {name}")
        return {"pid": os.getpid(), "name": name}

    def block_once(self, name: str) -> dict[str, Any]:
        """Tell the process id and block until killed; when tried again, work."""
        self._note(f"begin {name}")
        if not (self.folder / f"{name}.tried").exists():
            (self.folder / f"{name}.tried").touch()
            (self.folder / "pids").write_text(str(os.getpid()))
            (self.folder / "gate").read_text()
        self._note(f"end {name}")
        return {"pid": os.getpid(), "name": name}

    def crash(self, name: str) -> None:
        self._note(f"begin {name}")
        os.kill(os.getpid(), signal.SIGKILL)

    def spoil(self, name: str) -> None:
        raise AdapterError(f"{name}: holds NaN\nRetrain it.")

    def stumble(self, name: str) -> None:
        {}[name]

    def lock(self, name: str) -> dict[str, Any]:
        return {"lock": threading.Lock()}

    def nothing(self, name: str) -> None:
        pass

    def threads(self, name: str) -> dict[str, Any]:
        import torch

        return {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}


class Unloadable:
    def __init__(self) -> None:
        raise ModelError("models/base: no such model\nGive a path.")


class Unpicklable:
    def __reduce__(self) -> Any:
        return eval, ("1 / 0",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pids")
    os.mkfifo(tmp_path / "gate")
    return tmp_path


def scribes(folder: Path, count: int = 2, cpus: float = 0.5, name: str = "m") -> WorkerKind:
    return WorkerKind(name, Scribe, {"folder": str(folder)}, count=count, num_cpus=cpus)


def works(names: str) -> list[Item]:
    return [Item(name, "m", "work", name) for name in names]


def log(folder: Path) -> Counter[str]:
    return Counter((folder / "log").read_text().splitlines())


def when_blocked(folder: Path, act: Callable[[int], None]) -> threading.Thread:
    """In the background: once an item tells its process id and blocks, do something to it."""
    thread = threading.Thread(target=lambda: act(int((folder / "pids").read_text())), daemon=True)
    thread.start()
    return thread


def test_a_killed_worker_loses_nothing_and_repeats_nothing_that_was_finished(folder: Path):
    arrived = {"a": threading.Event(), "b": threading.Event()}

    def kill(pid: int) -> None:
        assert all(event.wait(60) for event in arrived.values())  # else an answer may be lost with the worker
        os.kill(pid, signal.SIGKILL)

    def follow(outcome: Outcome) -> list[Item]:
        arrived.get(outcome.item_id, threading.Event()).set()
        return []

    killer = when_blocked(folder, kill)
    stream = io.StringIO()
    items = [*works("ab"), Item("blocked", "m", "block_once", "blocked"), *works("cdefghij")]
    outcomes = run_on_ray(items, [scribes(folder)], follow=follow, progress=Progress("test", stream=stream))
    killer.join(30)
    assert [o.item_id for o in outcomes] == [i.id for i in items]
    assert [o.error for o in outcomes] == [None] * len(items)
    assert {o.item_id: o.attempts for o in outcomes if o.attempts != 1} == {"blocked": 2}
    counts = log(folder)
    assert all(counts[f"end {item.id}"] == 1 for item in items)
    assert {line: n for line, n in counts.items() if n != 1} == {"begin blocked": 2}
    assert "lost: its worker process has died" in stream.getvalue()
    assert "takes the place of" in stream.getvalue()


def test_an_item_that_always_kills_its_worker_is_given_up_and_the_others_finish(folder: Path):
    stream = io.StringIO()
    items = [Item("killer", "m", "crash", "killer"), *works("abcdef")]
    outcomes = run_on_ray(items, [scribes(folder)], max_attempts=2, progress=Progress("test", stream=stream))
    failed = [o for o in outcomes if o.error is not None]
    assert [o.item_id for o in failed] == ["killer"]
    assert failed[0].error is not None
    assert failed[0].error.startswith("killer: given up, its worker died at each of 2 attempts\nLast time: ")
    assert failed[0].attempts == 2
    assert all(o.attempts == 1 for o in outcomes if o.error is None)
    assert {line: n for line, n in log(folder).items() if n != 1} == {"begin killer": 2}
    assert "item killer given up" in stream.getvalue()


def test_a_worker_that_died_while_idle_charges_nobody(folder: Path):
    def follow(outcome: Outcome) -> list[Item]:
        if outcome.item_id != "first":
            return []
        assert outcome.result is not None
        os.kill(outcome.result["pid"], signal.SIGKILL)
        wait_for_end(outcome.result["pid"])
        return works("ab")

    outcomes = run_on_ray([Item("first", "m", "work", "first")], [scribes(folder, count=1)], follow=follow)
    assert [(o.item_id, o.error, o.attempts) for o in outcomes] == [("first", None, 1), ("a", None, 1), ("b", None, 1)]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C ends this process, also one that began with the signal ignored, as a background job of a shell does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_no_worker(folder: Path):
    pids: list[int] = []
    ended = threading.Event()

    def interrupt(pid: int) -> None:
        pids.append(pid)
        while not ended.is_set():  # as a person does: one that arrives while Ray cleans up is lost
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(20)

    when_blocked(folder, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_on_ray([Item("blocked", "m", "block_once", "blocked")], [scribes(folder)])
    finally:
        ended.set()
    wait_for_end(pids[0])


def test_an_error_while_planning_on_leaves_no_worker(folder: Path):
    pids: list[int] = []

    def follow(outcome: Outcome) -> list[Item]:
        assert outcome.result is not None
        pids.append(outcome.result["pid"])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_on_ray(works("a"), [scribes(folder)], follow=follow)
    wait_for_end(pids[0])


def test_outcomes_are_those_of_a_run_in_this_process(folder: Path):
    items = [
        *works("ab"), Item("c", "m", "spoil", "c"), Item("d", "m", "stumble", "d", after={"c"}),
        Item("e", "m", "nothing", "e", after={"a", "d"}),
    ]  # fmt: skip

    def follow(outcome: Outcome) -> list[Item]:
        return [Item("late", "m", "nothing", after={"a"})] if outcome.item_id == "e" else []

    def plain(outcomes: list[Outcome]) -> list[Any]:
        return [(o.item_id, o.result and o.result["name"], o.error, o.attempts) for o in outcomes]

    here = run_local(items, [scribes(folder)], follow=follow)
    assert plain(run_on_ray(items, [scribes(folder)], follow=follow)) == plain(here)
    assert here[2].error == "c: holds NaN\nRetrain it."


def test_what_cannot_be_sent_fails_its_item_alone(folder: Path):
    items = [
        Item("there", "m", "work", threading.Lock()), Item("here", "m", "work", Unpicklable()),
        Item("back", "m", "lock", "back"), *works("ab"),
    ]  # fmt: skip
    outcomes = run_on_ray(items, [scribes(folder, count=1)])
    errors = {o.item_id: o.error or "" for o in outcomes}
    assert errors["there"].startswith("there: cannot be sent: TypeError: ")
    assert "ZeroDivisionError" in errors["here"].splitlines()[0]
    assert errors["back"].splitlines()[0].startswith("back: ")
    assert "lock" in errors["back"]
    assert (errors["a"], errors["b"]) == ("", "")


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (2, 2)])
def test_the_threads_of_a_worker_are_its_cpus(folder: Path, cpus: float, threads: int):
    [outcome] = run_on_ray([Item("t", "m", "threads", "t")], [scribes(folder, cpus=cpus, count=1)])
    assert outcome.result == {"torch": threads, "OMP_NUM_THREADS": str(threads)}


def test_what_the_cluster_lacks_is_said_before_anything_starts(folder: Path):
    kind = WorkerKind("model", Scribe, {"folder": str(folder)}, num_cpus=1, num_gpus=1)
    with pytest.raises(PoolError, match=r"a model worker takes 1 CPU and 1 GPU.*\nThere is, machine by machine: 2 CPU"):
        run_on_ray([Item("a", "model", "work", "a")], [kind])
    assert not (folder / "log").exists()


def test_fewer_workers_than_asked_for_are_said(folder: Path):
    stream = io.StringIO()
    outcomes = run_on_ray(works("abc"), [scribes(folder, count=5, cpus=1)], progress=Progress("t", stream=stream))
    assert len(outcomes) == 3
    assert "5 workers of kind m asked for, 2 started" in stream.getvalue()


def test_a_worker_that_is_not_up_in_time_is_an_error_that_names_the_need(folder: Path):
    @ray.remote(num_cpus=1)
    class Squatter:
        def here(self) -> bool:
            return True

    squatter = Squatter.remote()
    assert ray.get(squatter.here.remote())
    with pytest.raises(PoolError, match=r"not up after 1 s\nAsked for: 2 CPU on one machine. Free .* 1 of 2 CPU"):
        run_on_ray(works("a"), [scribes(folder, count=1, cpus=2)], ready_deadline_s=1)
    ray.kill(squatter)


def test_where_machines_may_come_later_the_deadline_decides(folder: Path):
    kinds = [scribes(folder, count=1), scribes(folder, count=1, cpus=64, name="large")]
    with pytest.raises(PoolError, match="workers of kind large: none can be had\nnot up after 1 s"):
        run_on_ray([Item("b", "large", "work", "b")], kinds, ready_deadline_s=1, autoscaling=True)
    [outcome] = run_on_ray(works("a"), kinds, autoscaling=True)
    assert outcome.error is None


def test_a_worker_that_cannot_be_constructed_is_an_error_with_its_reason(folder: Path):
    with pytest.raises(PoolError, match=r"workers of kind m: none can be had\nmodels/base: no such model"):
        run_on_ray(works("a"), [WorkerKind("m", Unloadable, num_cpus=0.5)])
    with pytest.raises(PoolError, match="it could not be constructed: ZeroDivisionError"):
        run_on_ray(works("a"), [WorkerKind("m", Scribe, {"folder": Unpicklable()}, num_cpus=0.5)])


def test_a_thousand_items_that_do_nothing_cost_little(folder: Path):
    items = [Item(f"i{i}", "m", "nothing", i) for i in range(1000)]
    times: list[float] = []
    outcomes = run_on_ray(items, [scribes(folder)], follow=lambda _: times.append(time.perf_counter()) or ())
    assert len(outcomes) == len(times) == 1000
    each = (times[-1] - times[0]) / 999
    print(f"{1e3 * each:.2f} ms an item")
    assert each < 0.05


SCRIPT = """
    import os, sys
    sys.path.insert(0, {root!r})
    from raymerge.runtime.pool import WorkerKind, run_on_ray
    from raymerge.runtime.scheduler import Item
    from raymerge.runtime.host import Host
    class W:
        def go(self, x):
            import raymerge
            return {{"x": x, "pid": os.getpid()}}
    [o] = run_on_ray([Item("a", "m", "go", 1)], [WorkerKind("m", W, num_cpus=0.5)])
    assert o.result["x"] == 1, o
    import ray
    assert not ray.is_initialized()
    print(o.result["pid"])
"""


@pytest.mark.parametrize("join", [False, True], ids=["own Ray", "RAY_ADDRESS"])
def test_a_program_that_never_heard_of_ray_can_run_a_pool_from_anywhere(tmp_path: Path, join: bool):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT))))
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    if join:
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    wait_for_end(int(done.stdout.split()[-1]))
