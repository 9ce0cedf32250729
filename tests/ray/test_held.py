"""A pool that stays up for several threads, on a real Ray, with workers that are really killed."""

from __future__ import annotations

import io
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from raymerge.errors import AdapterError, ModelError, PoolError
from raymerge.runtime.events import Item
from raymerge.runtime.held import HeldWorkers
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.progress import Progress
from tests.ray.conftest import wait_for_end

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


class Teller:
    """Tells which process it is, and how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def tell(self, payload: Any) -> dict[str, Any]:
        self.calls += 1
        return {"pid": os.getpid(), "calls": self.calls, "payload": payload}

    def spoil(self, payload: Any) -> None:
        raise AdapterError(f"{payload}: holds NaN")

    def block(self, folder: str) -> dict[str, Any]:
        """Tell the process id and block until the gate opens."""
        Path(folder, "pids").write_text(str(os.getpid()))
        Path(folder, "gate").read_text()
        return self.tell(folder)


class Unloadable:
    def __init__(self) -> None:
        raise ModelError("models/base: no such model\nGive a path.")


def tellers(count: int = 2) -> list[WorkerKind]:
    return [WorkerKind("m", Teller, count=count, num_cpus=0.5)]


def tells(*ids: str) -> list[Item]:
    return [Item(id, "m", "tell", id) for id in ids]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pids")
    os.mkfifo(tmp_path / "gate")
    return tmp_path


def test_workers_are_made_once_and_serve_many_threads():
    with HeldWorkers(tellers()) as workers, ThreadPoolExecutor(4) as threads:
        batches = [[f"{name}{i}" for i in range(25)] for name in "abcdefgh"]
        answers = list(threads.map(lambda ids: workers.carry_out(tells(*ids)), batches))
        again = workers.carry_out(tells(*batches[0]))
    assert [[o.item_id for o in some] for some in answers] == batches
    results = [o.result for some in (*answers, again) for o in some]
    assert [r and r["payload"] for r in results] == [id for ids in (*batches, batches[0]) for id in ids]
    last: dict[int, int] = {}
    for result in results:
        assert result is not None
        last[result["pid"]] = max(result["calls"], last.get(result["pid"], 0))
    assert 1 <= len(last) <= 2
    assert sum(last.values()) == 225
    for pid in last:
        wait_for_end(pid)


def test_a_killed_worker_is_replaced_for_all_callers(folder: Path):
    stream = io.StringIO()
    with HeldWorkers(tellers(1), progress=Progress("test", stream=stream)) as workers:
        [first] = workers.carry_out(tells("first"))
        with ThreadPoolExecutor(2) as threads:
            blocked = threads.submit(workers.carry_out, [Item("blocked", "m", "block", str(folder))])
            os.kill(int((folder / "pids").read_text()), signal.SIGKILL)
            other = threads.submit(workers.carry_out, tells("a", "b"))
            (folder / "pids").read_text()
            (folder / "gate").write_text("")
            [outcome] = blocked.result(60)
            assert [o.error for o in other.result(60)] == [None, None]
    assert (outcome.error, outcome.attempts) == (None, 2)
    assert first.result is not None
    assert outcome.result is not None
    assert outcome.result["pid"] != first.result["pid"]
    assert "takes the place of" in stream.getvalue()


def test_failures_end_nothing_and_a_name_may_come_again():
    with HeldWorkers(tellers(1)) as workers:
        for calls in (1, 2, 3):
            bad, good = workers.carry_out([Item("bad", "m", "spoil", "ann"), *tells("good")])
            assert (bad.item_id, bad.error) == ("bad", "ann: holds NaN")
            assert good.result is not None
            assert good.result["calls"] == calls


def test_every_caller_learns_that_no_worker_can_be_had():
    with HeldWorkers([WorkerKind("m", Unloadable, num_cpus=0.5)]) as workers:
        with ThreadPoolExecutor(2) as threads:
            waiting = [threads.submit(workers.carry_out, tells(name)) for name in "ab"]
            for future in waiting:
                with pytest.raises(PoolError, match="none can be had\nmodels/base: no such model"):
                    future.result(60)
        with pytest.raises(PoolError, match="none can be had"):
            workers.carry_out(tells("c"))


def test_closing_ends_what_is_open_and_its_worker(folder: Path):
    workers = HeldWorkers(tellers(1))
    with ThreadPoolExecutor(1) as threads:
        open_ = threads.submit(workers.carry_out, [Item("blocked", "m", "block", str(folder))])
        pid = int((folder / "pids").read_text())
        workers.close()
        with pytest.raises(PoolError, match="the pool is closed"):
            open_.result(30)
    wait_for_end(pid)
    with pytest.raises(PoolError, match="the pool is closed"):
        workers.carry_out(tells("late"))


def test_an_idle_pool_wakes_at_once():
    with HeldWorkers(tellers(1)) as workers:
        workers.carry_out(tells("first"))
        times = []
        for number in range(50):
            start = time.perf_counter()
            workers.carry_out(tells(f"i{number}"))
            times.append(time.perf_counter() - start)
    print(f"{1e3 * statistics.median(times):.1f} ms a call and back, of two round trips to the worker")
    assert statistics.median(times) < 0.02


def test_a_held_pool_spends_no_time_on_waiting(folder: Path):
    with HeldWorkers(tellers(1)) as workers, ThreadPoolExecutor(1) as threads:
        workers.carry_out(tells("first"))
        waiting = threads.submit(workers.carry_out, [Item("blocked", "m", "block", str(folder))])
        (folder / "pids").read_text()
        loop = workers._thread
        assert loop is not None
        clock = time.pthread_getcpuclockid(loop.ident or 0)
        start = time.clock_gettime(clock)
        with pytest.raises(TimeoutError):
            waiting.result(1.5)
        spent = time.clock_gettime(clock) - start
        (folder / "gate").write_text("")
        waiting.result(30)
    assert spent < 0.03
