"""A search on a real Ray with Ray Tune, and with processes that are really killed.

Nothing here sleeps but the evaluations of one measurement: an item blocks on a named pipe until the test has done what
it wants to do to it.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import raymerge
from raymerge.config.search import Search
from raymerge.errors import ModelError, PoolError, RecipeError, StorageError
from raymerge.runtime.broker import CarryOut
from raymerge.runtime.events import Item
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.tune import search_here, search_on_ray
from raymerge.search.records import Figures, Trial
from raymerge.search.space import Space, parse_space
from raymerge.search.study import Study

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file

ROOT = Path(raymerge.__file__).resolve().parents[1]
RUNGS = (5, 15, 45)
SPACE = {"temperature": {"min": 0.02, "max": 1, "log": True}, "scale": {"min": 0.5, "max": 3, "log": True}}


class Scale:
    """Scores a point; before that it may sleep, or block once."""

    def score(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(asked["sleep_s"])
        off = math.log(asked["scale"] / 1.3) ** 2 + (asked["temperature"] - 0.3) ** 2
        return {"similarity": 70 - 10 * off + 1 / asked["personas"], "pid": os.getpid()}

    def block(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Tell the process id and block until the gate opens; when tried again, score."""
        folder = Path(asked["folder"])
        try:
            (folder / "tried").touch(exist_ok=False)
        except FileExistsError:
            return self.score(asked)
        (folder / "pids").write_text(str(os.getpid()))
        (folder / "gate").read_text()
        return self.score(asked)


class Unloadable:
    def __init__(self) -> None:
        raise ModelError("models/base: no such model\nGive a path.")


@dataclass(frozen=True)
class Scores:
    """Scores by one item for each rung, and notes each in a file. blocks: at a rung, the first that gets there."""

    folder: str
    rungs: Sequence[int] = RUNGS
    blocks: int | None = None
    sleep_s: float = 0.0

    def score(self, values: Mapping[str, Any], rung: int, carry_out: CarryOut) -> Figures:
        asked = {**values, "personas": self.rungs[rung], "folder": self.folder, "sleep_s": self.sleep_s}
        item = Item(f"{values} {rung}", "model", "block" if rung == self.blocks else "score", asked)
        [outcome] = carry_out([item])
        assert outcome.result is not None, outcome.error
        with open(f"{self.folder}/log", "a") as log:  # one write, so that lines of threads do not mix
            log.write(f"{sorted(values.items())} {rung}\n")
        return Figures(self.rungs[rung], {"similarity": outcome.result["similarity"]}, seconds=outcome.result["pid"])


@dataclass(frozen=True)
class Fails(Scores):
    """Raises for points of a small scale; gives those of a large one a score that is no number."""

    error: type[Exception] = RecipeError

    def score(self, values: Mapping[str, Any], rung: int, carry_out: CarryOut) -> Figures:
        if values["scale"] < 1:
            raise self.error("scale: too small\nGive more.")
        if values["scale"] > 2:
            return Figures(self.rungs[rung], {"similarity": math.nan})
        return super().score(values, rung, carry_out)


@dataclass
class Seen:
    """What a watch was told. at: when trials ended, seconds."""

    begins: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    reports: int = 0
    said: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)

    def begun(self, trial: Trial) -> None:
        self.begins.append(trial.number)

    def reported(self, trial: Trial) -> None:
        self.reports += 1

    def finished(self, trial: Trial) -> None:
        self.ends.append(trial.number)
        self.at.append(time.perf_counter())

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pids")
    os.mkfifo(tmp_path / "gate")
    return tmp_path


def wanted(**settings: Any) -> Search:
    return Search(**{"space": SPACE, "trials": 10, "sampler": "random", **settings})


def space() -> Space:
    counted = {f"p{i}": 60 for i in range(RUNGS[-1])}
    return parse_space(wanted(), {}, "raymerge.yaml", validation=counted, centred=True)


def opened(folder: Path, search: Search, rungs: Sequence[int] = RUNGS) -> Study:
    return Study(space(), search, rungs, str(folder / "study"), "sha256:0")


def kinds(count: int = 1) -> list[WorkerKind]:
    return [WorkerKind("model", Scale, count=count, num_cpus=0.5)]


def run(study: Study, scorer: Scores, concurrency: int | None = 2, count: int = 1, **settings: Any) -> Seen:
    seen = Seen()
    settings = {"may_go_on": lambda: True, "watch": seen, **settings}
    search_on_ray(study, scorer, settings.pop("workers", kinds(count)), concurrency=concurrency, **settings)
    return seen


def scored(folder: Path) -> Counter[str]:
    return Counter((folder / "log").read_text().splitlines())


def told(study: Study) -> list[tuple[Any, ...]]:
    """What a study holds, without what differs from run to run."""
    return [
        (t.number, t.values, t.state, [(f.personas, f.values) for f in t.rungs]) for t in study.trials
    ]  # fmt: skip


def processes(title: str) -> list[psutil.Process]:
    """Those of this Ray whose title holds a text."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def eventually(condition: Callable[[], bool], what: str, limit_s: float = 30) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, what


def when_blocked(folder: Path, act: Callable[[int], None]) -> threading.Thread:
    """In the background: once an item tells its process id and blocks, do something."""
    thread = threading.Thread(target=lambda: act(int((folder / "pids").read_text())), daemon=True)
    thread.start()
    return thread


def test_every_trial_is_carried_out_once_and_dropped_where_the_study_says(folder: Path):
    study = opened(folder, wanted(trials=18))
    seen = run(study, Scores(str(folder)), concurrency=3, count=2)
    assert [trial.number for trial in study.trials] == list(range(18))
    assert study.finished == 18
    assert {trial.state for trial in study.trials} == {"complete", "stopped"}
    assert all((trial.state == "complete") == (len(trial.rungs) == 3) for trial in study.trials)
    assert all(count == 1 for count in scored(folder).values())
    assert len(scored(folder)) == sum(len(trial.rungs) for trial in study.trials) == seen.reports
    assert sorted(seen.begins) == sorted(seen.ends) == list(range(18))
    workers = {figures.seconds for trial in study.trials for figures in trial.rungs}
    assert 1 <= len(workers) <= 2  # they are made once
    assert study.best is not None
    assert study.best.state == "complete"


def test_one_trial_at_a_time_is_the_search_in_this_process(tmp_path: Path):
    (there := tmp_path / "there").mkdir()
    (here := tmp_path / "here").mkdir()
    search = wanted(sampler="tpe", trials=14)
    run(on_ray := opened(there, search), Scores(str(there)), concurrency=1)
    search_here(
        study := opened(here, search), Scores(str(here)), kinds(), may_go_on=lambda: True, watch=(seen := Seen())
    )
    assert told(on_ray) == told(study)
    assert seen.begins == seen.ends == list(range(14))
    assert {trial.state for trial in study.trials} == {"complete", "stopped"}


def test_a_trial_whose_process_is_killed_is_tried_again_and_nothing_is_scored_twice(folder: Path):
    study = opened(folder, wanted(trials=6, stop_early=False))

    def kill(pid: int) -> None:
        for process in processes("ray::ImplicitFunc"):
            process.kill()
        (folder / "gate").write_text("")

    killer = when_blocked(folder, kill)
    seen = run(study, Scores(str(folder), blocks=1), concurrency=1)
    killer.join(30)
    assert [trial.state for trial in study.trials] == ["complete"] * 6
    assert set(scored(folder).values()) == {1}
    assert len(scored(folder)) == 18
    assert [text for text in seen.said if "its process died" in text] == [
        "trial 0: its process died, it is tried again"
    ]


def test_a_worker_that_is_killed_is_replaced(folder: Path):
    study = opened(folder, wanted(trials=5, stop_early=False))
    killer = when_blocked(folder, lambda pid: os.kill(pid, signal.SIGKILL))
    seen = run(study, Scores(str(folder), blocks=1))
    killer.join(30)
    assert [trial.state for trial in study.trials] == ["complete"] * 5
    assert set(scored(folder).values()) == {1}
    assert any("takes the place of" in text for text in seen.said)


@pytest.mark.parametrize("how", ["broker", signal.SIGINT, signal.SIGTERM])
def test_what_ends_a_search_loses_nothing_that_was_scored(folder: Path, how: Any):
    search = wanted(trials=6, stop_early=False, sampler="tpe")
    workers: list[int] = []

    def end(pid: int) -> None:
        workers.append(pid)
        if how == "broker":
            [process] = processes("ray::Broker")
            process.kill()
        else:
            os.kill(os.getpid(), how)

    ender = when_blocked(folder, end)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    raised = {"broker": PoolError, signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[how]
    with pytest.raises(raised) as caught:
        run(opened(folder, search), Scores(str(folder), blocks=1), concurrency=1)
    ender.join(30)
    if how == "broker":
        assert str(caught.value).startswith("the process that holds the search's workers died: ")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    eventually(lambda: not processes("ray::Broker") and not processes("ray::ImplicitFunc"), "a process is still there")
    eventually(lambda: not psutil.pid_exists(workers[0]), "the worker is still there")
    cut = opened(folder, search)
    assert [(trial.number, trial.state, len(trial.rungs)) for trial in cut.trials] == [(0, "running", 1)]
    search_here(cut, Scores(str(folder)), kinds(), may_go_on=lambda: True, watch=Seen())
    assert set(scored(folder).values()) == {1}
    (apart := folder / "apart").mkdir()
    search_here(undisturbed := opened(apart, search), Scores(str(apart)), kinds(), may_go_on=lambda: True, watch=Seen())
    assert told(cut) == told(undisturbed)


def asked(folder: Path) -> dict[str, Any]:
    return {"temperature": 0.3, "scale": 1.3, "personas": 5, "folder": str(folder), "sleep_s": 0.0}


def test_who_comes_after_the_trials_has_their_worker_and_one_in_its_place_where_it_is_killed(folder: Path):
    study, pids = opened(folder, wanted(stop_early=False, trials=4)), []

    def then(carry_out: CarryOut) -> None:
        for method in ("score", "block"):
            [outcome] = carry_out([Item("after", "model", method, asked(folder))])
            assert outcome.result is not None, outcome.error
            pids.append(outcome.result["pid"])

    killer = when_blocked(folder, lambda pid: os.kill(pid, signal.SIGKILL))
    seen = run(study, Scores(str(folder)), then=then)
    killer.join(30)
    assert {figures.seconds for trial in study.trials for figures in trial.rungs} == {pids[0]}
    assert pids[1] != pids[0]
    assert any("takes the place of" in text for text in seen.said)
    eventually(lambda: not psutil.pid_exists(pids[1]), "the worker is still there")


@pytest.mark.parametrize("how", ["broker", signal.SIGTERM])
def test_what_ends_a_search_after_its_trials(folder: Path, how: Any):
    def end(pid: int) -> None:
        if how == "broker":
            [process] = processes("ray::Broker")
            process.kill()
        else:
            os.kill(os.getpid(), how)

    def then(carry_out: CarryOut) -> None:
        carry_out([Item("after", "model", "block", asked(folder))])
        raise AssertionError("it went on")

    ender = when_blocked(folder, end)
    study = opened(folder, wanted(stop_early=False, trials=2))
    with pytest.raises(PoolError if how == "broker" else SystemExit) as caught:
        run(study, Scores(str(folder)), then=then)
    ender.join(30)
    if how == "broker":
        assert str(caught.value).startswith("the process that holds the search's workers died: ")
    eventually(lambda: not processes("ray::Broker"), "the broker is still there")
    assert study.finished == 2


@pytest.mark.parametrize("here", [True, False], ids=["here", "on Ray"])
def test_recipes_that_cannot_be_scored_fail_and_count(folder: Path, here: bool):
    study, scorer, seen = opened(folder, wanted(stop_early=False)), Fails(str(folder)), Seen()
    if here:
        search_here(study, scorer, kinds(), may_go_on=lambda: True, watch=seen)
    else:
        seen = run(study, scorer)
    assert study.finished == 10 == len(seen.ends)
    kinds_of_end = set()
    for trial in study.trials:
        scale, error = trial.values["scale"], trial.error or ""
        assert trial.state == ("complete" if 1 <= scale <= 2 else "failed")
        assert (scale < 1, scale > 2) == ("scale: too small" in error, "similarity is nan" in error)
        kinds_of_end.add((scale < 1, scale > 2))
    assert len(kinds_of_end) == 3


@pytest.mark.parametrize("here", [True, False], ids=["here", "on Ray"])
def test_that_no_worker_can_be_had_ends_the_search(folder: Path, here: bool):
    study, workers = opened(folder, wanted()), [WorkerKind("model", Unloadable, num_cpus=0.5)]
    search: Callable[..., None] = search_here if here else partial(search_on_ray, concurrency=2)
    with pytest.raises(PoolError, match="none can be had\nmodels/base: no such model"):
        search(study, Scores(str(folder)), workers, may_go_on=lambda: True, watch=Seen())
    assert study.finished == 0


def test_that_nothing_can_be_stored_ends_the_search(folder: Path):
    study, scorer = opened(folder, wanted()), Fails(str(folder), error=StorageError)
    with pytest.raises(StorageError, match="too small"):
        search_here(study, scorer, kinds(), may_go_on=lambda: True, watch=Seen())
    assert {trial.state for trial in study.trials} <= {"running", "complete", "stopped"}
    assert study.finished < 10


def test_a_search_for_which_there_is_no_room_is_refused_before_it_begins(folder: Path):
    study = opened(folder, wanted())
    with pytest.raises(PoolError, match="a model worker takes 1 CPU and 1 GPU"):
        run(study, Scores(str(folder)), workers=[WorkerKind("model", Scale, num_gpus=1)])
    assert study.trials == []


def test_the_budget_is_asked_before_each_trial_and_those_begun_are_finished(folder: Path):
    study = opened(folder, wanted(stop_early=False))
    run(study, Scores(str(folder)), may_go_on=lambda: len(study.trials) < 4)
    assert [trial.state for trial in study.trials] == ["complete"] * 4
    search_here(study, Scores(str(folder)), kinds(), may_go_on=lambda: True, watch=Seen())
    assert study.finished == 10
    assert set(scored(folder).values()) == {1}


def test_a_trial_costs_little_beside_its_scoring(folder: Path):
    search = wanted(trials=30)
    seen = run(opened(folder, search, (45,)), Scores(str(folder), (45,)), concurrency=1)
    each = (seen.at[-1] - seen.at[4]) / 25
    print(f"{1e3 * each:.0f} ms a trial beside its scoring")
    assert each < 0.3


def test_two_workers_score_faster_than_one_could(folder: Path):
    scorer = Scores(str(folder), (45,), sleep_s=0.4)
    seen = run(opened(folder, wanted(trials=26), (45,)), scorer, concurrency=None, count=2)
    faster = 0.4 * 12 / (seen.at[-2] - seen.at[-14])  # one worker scores 1 / 0.4 s trials a second, at the very most
    print(f"two workers: {faster:.2f} times as fast as one could be")
    assert faster >= 1.6


SCRIPT = """
    import os, sys, tempfile, time
    sys.path.insert(0, {root!r})
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray
    from ray.cluster_utils import Cluster
    from raymerge.config.search import Search
    from raymerge.runtime.events import Item
    from raymerge.runtime.kinds import WorkerKind
    from raymerge.runtime.tune import search_on_ray
    from raymerge.search.records import Figures
    from raymerge.search.space import parse_space
    from raymerge.search.study import Study

    class Where:
        def where(self, folder):
            import ray
            group, here = ray.util.get_current_placement_group(), ray.get_runtime_context().get_node_id()
            open(folder + "/up-" + here, "w").close()
            until = time.monotonic() + 60
            while sum(name.startswith("up-") for name in os.listdir(folder)) < 2 and time.monotonic() < until:
                pass  # the other worker may take long to start
            return {{"node": here, "group": group and group.id.hex(), "gpus": len(ray.get_gpu_ids())}}

    class Asks:
        rungs = (1,)
        def __init__(self, folder): self.folder = folder
        def score(self, values, rung, carry_out):
            outcomes = carry_out([Item(f"{{values}} {{i}}", "model", "where", self.folder) for i in range(4)])
            with open(self.folder + "/log", "a") as log:
                log.write("".join(str(sorted(o.result.items())) + "\\n" for o in outcomes))
            return Figures(1, {{"similarity": values["temperature"]}})

    class Watch:
        def begun(self, trial): pass
        def reported(self, trial): pass
        def finished(self, trial): pass
        def say(self, text): print(text)

    cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 0, "include_dashboard": False}})
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR",
             job_config=ray.job_config.JobConfig(_py_driver_sys_path=[{root!r}]))
    search = Search(space={{"temperature": {{"min": 0.1, "max": 1}}}}, trials=6, sampler="random")
    space = parse_space(search, {{}}, "raymerge.yaml", validation={{"ann": 60, "bob": 60, "cyd": 60}}, centred=True)
    folder = tempfile.mkdtemp(dir={folder!r})
    study = Study(space, search, (1,), folder, "")
    kinds = [WorkerKind("model", Where, count=None, num_cpus=1, num_gpus="auto")]
    search_on_ray(study, Asks(folder), kinds, concurrency=None, may_go_on=lambda: True, watch=Watch())
    assert [trial.state for trial in study.trials] == ["complete"] * 6
    lines = open(folder + "/log").read().splitlines()
    assert len(lines) == 24
    assert len(set(lines)) == 2, set(lines)
    assert all("('gpus', 1), ('group', None)" in line for line in lines), set(lines)
    head = ray.get_runtime_context().get_node_id()
    assert not any(head in line for line in lines)
    ray.shutdown()
    cluster.shutdown()
"""


def test_workers_spread_over_machines_with_gpus_and_lie_in_no_placement_group(tmp_path: Path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT), folder=str(tmp_path))))
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
