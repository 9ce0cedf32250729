"""Workers of this process that stay up between calls, and a search on them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.config.search import Search
from raymerge.errors import AdapterError, ModelError, PoolError
from raymerge.runtime.broker import CarryOut
from raymerge.runtime.events import Item
from raymerge.runtime.held import HeldWorkers
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.local import run_local
from raymerge.runtime.tune import search_here
from raymerge.search.records import Figures, Trial
from raymerge.search.space import parse_space
from raymerge.search.study import Study


class Counter:
    """Counts its calls, so that a second worker would be seen."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.calls = 0

    def count(self, payload: Any) -> dict[str, Any]:
        self.calls += 1
        return {"calls": self.calls, "payload": payload}

    def spoil(self, payload: Any) -> None:
        raise AdapterError(f"{payload}: holds NaN")

    def interrupt(self, payload: Any) -> None:
        if isinstance(payload, threading.Event):
            payload.wait(30)
        raise KeyboardInterrupt


class Unloadable:
    def __init__(self) -> None:
        raise ModelError("models/base: no such model\nGive a path.")


KINDS = [WorkerKind("m", Counter)]


def counts(*ids: str) -> list[Item]:
    return [Item(id, "m", "count", id) for id in ids]


@given(st.lists(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4), max_size=5))
def test_one_worker_serves_all_calls_in_their_order(calls: list[list[str]]):
    before = Counter.made
    with HeldWorkers(KINDS, local=True) as workers:
        outcomes = [workers.carry_out(counts(*ids)) for ids in calls]
    assert [[o.item_id for o in some] for some in outcomes] == calls
    found = [o.result for some in outcomes for o in some]
    assert found == [{"calls": n, "payload": id} for n, id in enumerate((id for ids in calls for id in ids), 1)]
    assert Counter.made - before == bool(found)


def test_an_item_of_an_earlier_name_is_another_item_and_waits_for_those_of_its_own_call():
    items = [Item("a", "m", "count", 1, after={"b"}), Item("b", "m", "count", 2)]
    with HeldWorkers(KINDS, local=True) as workers:
        found = [[o.result and o.result["calls"] for o in workers.carry_out(items)] for _ in range(3)]
    assert found == [[2, 1], [4, 3], [6, 5]]


def test_failures_are_those_of_a_run_and_end_nothing():
    items = [Item("bad", "m", "spoil", "persona_3"), *counts("good")]

    def plain(outcomes: list[Any]) -> list[Any]:
        return [(o.item_id, o.result, o.error, o.attempts) for o in outcomes]

    with HeldWorkers(KINDS, local=True) as workers:
        assert plain(workers.carry_out(items)) == plain(run_local(items, KINDS))
        assert workers.carry_out(counts("next"))[0].result == {"calls": 2, "payload": "next"}


def test_threads_take_turns():
    found: list[int] = []
    with HeldWorkers(KINDS, local=True) as workers:

        def ask(name: str) -> None:
            for outcome in workers.carry_out(counts(*(f"{name}{i}" for i in range(20)))):
                assert outcome.result is not None
                found.append(outcome.result["calls"])

        threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(found) == list(range(1, 81))


def test_what_no_worker_can_be_had_for_is_said_to_every_caller():
    with HeldWorkers([WorkerKind("m", Unloadable)], local=True) as workers:
        for _ in range(2):
            with pytest.raises(PoolError, match="workers of kind m: none can be had\nmodels/base: no such model"):
                workers.carry_out(counts("a"))


def test_after_an_interrupt_or_the_end_nothing_is_begun():
    workers = HeldWorkers(KINDS, local=True)
    with pytest.raises(KeyboardInterrupt):
        workers.carry_out([Item("a", "m", "interrupt")])
    with pytest.raises(PoolError, match="the pool was interrupted"):
        workers.carry_out(counts("b"))
    workers.close()
    with HeldWorkers(KINDS, local=True) as workers:
        pass
    with pytest.raises(PoolError, match="the pool is closed"):
        workers.carry_out(counts("b"))


def test_who_waits_for_a_turn_while_the_pool_breaks_is_told():
    gate = threading.Event()
    with HeldWorkers(KINDS, local=True) as workers, ThreadPoolExecutor(2) as threads:
        breaks = threads.submit(workers.carry_out, [Item("a", "m", "interrupt", gate)])
        waits = threads.submit(workers.carry_out, counts("b", "c"))
        until = time.monotonic() + 30
        while len(workers._open) < 3:
            assert time.monotonic() < until
        gate.set()
        assert isinstance(breaks.exception(30), KeyboardInterrupt)
        with pytest.raises(PoolError, match="the pool was interrupted"):
            waits.result(30)


class Scores:
    """Scores by the worker, which counts. interrupted: the call at which somebody presses Ctrl-C."""

    rungs = (5, 15, 45)

    def __init__(self, interrupted: int | None = None) -> None:
        self.calls = 0
        self.interrupted = interrupted

    def score(self, values: Mapping[str, Any], rung: int, carry_out: CarryOut) -> Figures:
        self.calls += 1
        [outcome] = carry_out([Item("a", "m", "interrupt" if self.calls == self.interrupted else "count", values)])
        assert outcome.error is None
        return Figures(self.rungs[rung], {"similarity": 70 - (values["temperature"] - 0.3) ** 2})


class Silent:
    def begun(self, trial: Trial) -> None: ...
    def reported(self, trial: Trial) -> None: ...
    def finished(self, trial: Trial) -> None: ...
    def say(self, text: str) -> None: ...


def opened(folder: Path) -> Study:
    search = Search(space={"temperature": {"min": 0.02, "max": 1}}, trials=10, sampler="tpe")
    counted = {f"p{i}": 60 for i in range(45)}
    space = parse_space(search, {}, "raymerge.yaml", validation=counted, centred=True)
    return Study(space, search, Scores.rungs, str(folder), "sha256:0")


@pytest.mark.parametrize("call", [1, 2, 7])
def test_a_search_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path, call: int):
    def search(name: str, scorer: Scores) -> Study:
        study = opened(tmp_path / name)
        search_here(study, scorer, KINDS, may_go_on=lambda: True, watch=Silent())
        return study

    whole = search("whole", first := Scores())
    with pytest.raises(KeyboardInterrupt):
        search("cut", Scores(interrupted=call))
    study = search("cut", rest := Scores())
    assert study.trials == whole.trials
    assert study.finished == 10
    assert rest.calls == first.calls - (call - 1)


def test_who_comes_after_the_trials_has_their_workers_and_nobody_comes_where_they_were_cut_short(tmp_path: Path):
    came: list[Any] = []

    def then(carry_out: CarryOut) -> None:
        [outcome] = carry_out(counts("after"))
        came.append(outcome.result)

    scorer = Scores()
    search_here(opened(tmp_path), scorer, KINDS, may_go_on=lambda: True, watch=Silent(), then=then)
    assert [one["calls"] for one in came] == [scorer.calls + 1]  # of one worker
    with pytest.raises(KeyboardInterrupt):
        search_here(
            opened(tmp_path / "cut"), Scores(2), KINDS, may_go_on=lambda: True, watch=Silent(), then=then
        )  # fmt: skip
    assert len(came) == 1


def test_a_search_here_loads_neither_ray_nor_optuna_before_it_begins():
    code = """
import sys
import raymerge.runtime.tune, raymerge.runtime.held
assert not {"ray", "torch", "optuna", "rich"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
