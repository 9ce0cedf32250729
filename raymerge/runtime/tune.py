"""A search carried out: trials from a study, scored on workers that are made once. On Ray by Ray Tune, or here.

A trial of Tune is a light client that takes no CPU. It asks the broker, an actor made before, to score its point rung
by rung; the broker holds the workers, which so lie in no trial's placement group. Tune carries out, the study proposes,
decides and remembers: its journal is what an interrupted search goes on from, and nothing of Tune's.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from raymerge.errors import PoolError
from raymerge.runtime.broker import Answer, Broker, CarryOut, Scorer, Told, answer, asking, gone, interrupted
from raymerge.runtime.connection import connected
from raymerge.runtime.course import Course, Watch
from raymerge.runtime.held import HeldWorkers
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.pool import READY_DEADLINE_S, plan_here
from raymerge.search.records import Trial

if TYPE_CHECKING:
    from raymerge.search.study import Study

__all__ = ["Scorer", "Then", "Watch", "search_here", "search_on_ray"]

Then = Callable[[CarryOut], None]
GRACE_S = 10.0
_SLIVER = 0.001  # of the resource that a machine is: a placement group has to hold something
_QUIET = ("ray.tune", "ray.train", "ray.air")
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # half of what a trial costs beside its scoring
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours serves SIGTERM too
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # of a state that nobody reads
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints whatever it is told
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def search_here(
    study: Study,
    scorer: Scorer,
    kinds: Sequence[WorkerKind],
    *,
    may_go_on: Callable[[], bool],
    watch: Watch,
    then: Then | None = None,
) -> None:
    """As `search_on_ray`, in this process and one trial at a time."""
    course = Course(study, may_go_on, watch)
    with HeldWorkers(kinds, local=True, progress=Told(watch.say)) as workers:
        while course.over is None and (trial := course.begin()) is not None:
            for rung in range(len(trial.rungs), len(scorer.rungs)):
                if course.report(trial, answer(scorer, trial.values, rung, workers.carry_out)):
                    break
            course.end(trial)
        if course.over is not None:
            raise course.over
        if then is not None:
            then(workers.carry_out)


def search_on_ray(
    study: Study,
    scorer: Scorer,
    kinds: Sequence[WorkerKind],
    *,
    concurrency: int | None,
    may_go_on: Callable[[], bool],
    watch: Watch,
    then: Then | None = None,
    ready_deadline_s: float = READY_DEADLINE_S,
    max_attempts: int = 3,
    autoscaling: bool = False,
) -> None:
    """Carry out what the study proposes, until it has no more to propose or `may_go_on` says no.

    concurrency: trials at once; None is one for each worker, and one that is routed meanwhile. then: called in this
    process after the last trial, with what the workers carry out, who are held until it returns. For the other
    arguments see `run_on_ray`. Raises PoolError if the Ray cluster lacks what a worker takes, if no worker comes up, or
    if the broker dies; KeyboardInterrupt and SystemExit after SIGINT and SIGTERM. Whatever is raised, what was scored
    is in the study, no worker is left, and trials that were under way are handed out again by the next search.
    """
    with connected() as ray, _signals() as noted, _quietly(), tempfile.TemporaryDirectory(prefix="raymerge-") as folder:
        plan = plan_here(ray, kinds, autoscaling=autoscaling)
        at_once = concurrency or sum(plan.counts.values()) + 1
        options = {"ready_deadline_s": ready_deadline_s, "max_attempts": max_attempts, "autoscaling": autoscaling}
        broker = _broker(ray, at_once, (scorer, tuple(kinds), options))
        course = Course(study, may_go_on, watch)

        def ended() -> bool:
            if noted:
                ray.kill(broker)  # and with it the workers; trials wait for an answer no longer
            return bool(noted) or course.over is not None

        try:
            _wait_for(ray, broker)
            _tuner(ray, course, broker, len(scorer.rungs), at_once, folder, ended).fit()
            if not ended():
                if then is not None:
                    then(asking(ray, broker, noted, watch.say))
                with suppress(ray.exceptions.RayError):  # all is scored: a slow farewell is no failure
                    ray.get(broker.close.remote(), timeout=GRACE_S)
        finally:
            ray.kill(broker)
    if noted:
        raise interrupted(noted[0])
    if course.over is not None:
        raise course.over


def _broker(ray: Any, at_once: int, arguments: tuple[Any, ...]) -> Any:
    here = ray.get_runtime_context().get_node_id()
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
    options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": strategy}
    return ray.remote(Broker).options(max_concurrency=2 * at_once + 2, **options).remote(*arguments)


def _wait_for(ray: Any, broker: Any) -> None:
    try:
        ray.get(broker.ready.remote())
    except ray.exceptions.RayError as error:
        raise PoolError(f"the process that is to hold the search's workers does not start\n{error}") from error


def _tuner(
    ray: Any, course: Course, broker: Any, rungs: int, at_once: int, folder: str, ended: Callable[[], bool]
) -> Any:
    """Tune, set up to ask the course for everything."""
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler
    from ray.tune.search import Searcher

    running: dict[str, Trial] = {}

    class Asking(_Here, Searcher):  # type: ignore[misc]  # Ray has no types
        def suggest(self, trial_id: str) -> Any:
            trial = course.kept(course.begin, None)
            if trial is None:  # while any are running, one of them may have to be tried again
                return None if running else self.FINISHED
            running[trial_id] = trial
            return {"number": trial.number, "values": dict(trial.values), "rungs": [len(trial.rungs), rungs]}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            trial = running.pop(trial_id)
            course.kept(lambda: course.died(trial) if error else course.end(trial), None)

        def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
            """The study has a journal."""

    class Reporting(_Here, FIFOScheduler):  # type: ignore[misc]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
            now = running[trial.trial_id]
            ends = course.kept(lambda: course.report(now, result["answer"]), True)
            # told now, since asked for more after its last rung a trial would give the same result again
            return str(self.STOP if ends or result["rung"] + 1 == rungs else self.CONTINUE)

    class Starting(_Here, tune.Callback):  # type: ignore[misc]
        def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
            if all(one.status != one.PENDING for one in trials if one is not trial):
                broker.begin.remote()

    class Stopping(_Here, tune.Stopper):  # type: ignore[misc]
        def __call__(self, trial_id: str, result: Any) -> bool:
            return False

        def stop_all(self) -> bool:
            return ended()

    trainable = tune.with_parameters(_ask_broker, broker=broker)
    return tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([{_this_machine(ray): _SLIVER}])),
        tune_config=tune.TuneConfig(
            search_alg=Asking(), scheduler=Reporting(), num_samples=-1, max_concurrent_trials=at_once,
            reuse_actors=True, trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="search", storage_path=folder, callbacks=[Starting()], stop=Stopping(), verbose=0
        ),
    )  # fmt: skip


class _Here:
    """Of this process: where Tune writes it down, which nobody reads, or copies it."""

    def __reduce__(self) -> Any:
        return (object, ())

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def _ask_broker(config: Mapping[str, Any], broker: Any) -> None:
    """A trial of Tune, in a process of its own."""
    import ray
    from ray import tune

    for rung in range(*config["rungs"]):
        try:
            found = ray.get(broker.score.remote(config["number"], config["values"], rung))
        except ray.exceptions.RayActorError as error:
            found = Answer(over=gone(error))
        tune.report({"rung": rung, "answer": found})


def _this_machine(ray: Any) -> str:
    """The resource that the driver's machine alone has: trials lie beside it, whatever else a cluster may grow."""
    here = ray.get_runtime_context().get_node_id()
    [resources] = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
    return next(str(name) for name in resources if name.startswith("node:") and not name.startswith("node:__"))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is noted in the list; a second does what it does by itself."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    ours = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in (*ours, signal.SIGUSR1)}  # Tune takes that one

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        restore()

    for number in ours:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


@contextmanager
def _quietly() -> Iterator[None]:
    """Tune says nothing and writes as little as it can."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    levels = {name: logging.getLogger(name).level for name in _QUIET}
    os.environ.update(_ENVIRONMENT)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
