"""Scoring the points of a search: what a trial asks, and the actor that answers all of them."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol

from raymerge.errors import PoolError, RaymergeError, StorageError
from raymerge.runtime.events import Item, Outcome
from raymerge.runtime.held import HeldWorkers
from raymerge.runtime.host import describe
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import first_line
from raymerge.search.records import Figures

LOOK_S = 0.2  # how often a process that waits for items looks for signals
START_S = 30.0  # that the first answers wait for the processes of other trials, at most

CarryOut = Callable[[Sequence[Item]], Sequence[Outcome]]


class Scorer(Protocol):
    """Scores points of the space; picklable. rungs: nested numbers of personas, ascending, the last is all."""

    @property
    def rungs(self) -> Sequence[int]:
        """Numbers of personas."""
        ...

    def score(self, values: Mapping[str, Any], rung: int, carry_out: CarryOut) -> Figures:
        """Figures of a point on the first `rungs[rung]` personas, by items that `carry_out` settles.

        Called from several threads. PoolError and StorageError end the search, since no other point would fare better;
        what else is raised fails the trial.
        """
        ...


@dataclass(frozen=True)
class Answer:
    """What came of scoring a rung: figures, or why this point cannot be scored, or why no point can be any more.

    said: what happened to the workers since the last answer.
    """

    figures: Figures | None = None
    error: str | None = None
    over: RaymergeError | None = None
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class Carried:
    """What became of items, or why no worker can carry out any; said: as of an answer."""

    outcomes: tuple[Outcome, ...] = ()
    over: RaymergeError | None = None
    said: tuple[str, ...] = ()


class Told(Progress):
    """Shows nothing, and passes on what would be said."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__("", quiet=True)
        self._tell = tell

    def say(self, text: str) -> None:
        """Pass a line on."""
        self._tell(text)


def answer(scorer: Scorer, values: Mapping[str, Any], rung: int, carry_out: CarryOut) -> Answer:
    """Score a point; what is raised is part of the answer."""
    try:
        return Answer(figures=scorer.score(values, rung, carry_out))
    except (PoolError, StorageError) as error:
        return Answer(over=error)
    except Exception as error:
        return Answer(error=describe(error))


class Broker:
    """Holds the scorer and its workers for all trials. Made once, called by many of them at the same time.

    options: of `HeldWorkers`. What was scored is kept, so that a trial whose process died gets it again, and one that
    asks while its first question is still being worked on waits for the same answer.
    """

    def __init__(self, scorer: Scorer, kinds: Sequence[WorkerKind], options: Mapping[str, Any]) -> None:
        self._said: deque[str] = deque()
        self._scorer = scorer
        self._workers = HeldWorkers(kinds, progress=Told(self._said.append), **options)
        self._lock = threading.Lock()
        self._answers: dict[tuple[int, int], Future[Answer]] = {}
        self._begun = threading.Event()

    def ready(self) -> None:
        """It is up, once this returns."""

    def begin(self) -> None:
        """As many trials are up as there are to be at once: answer them.

        A trial that ended before would leave its process to one whose own is still starting. Tune would then end that
        one and start another, for as long as a trial is shorter than the start of a process.
        """
        self._begun.set()

    def score(self, number: int, values: Mapping[str, Any], rung: int) -> Answer:
        """The answer to a trial's question, by the trial's number and the rung."""
        self._begun.wait(START_S)
        with self._lock:
            is_new = (number, rung) not in self._answers
            promised = self._answers.setdefault((number, rung), Future())
        if is_new:
            promised.set_result(answer(self._scorer, values, rung, self._workers.carry_out))
        return replace(promised.result(), said=self._news())

    def carry_out(self, items: Sequence[Item]) -> Carried:
        """Items of no trial, on the same workers."""
        try:
            return Carried(tuple(self._workers.carry_out(items)), said=self._news())
        except PoolError as error:
            return Carried(over=error, said=self._news())

    def _news(self) -> tuple[str, ...]:
        with self._lock:  # the workers may say more meanwhile, but nobody else takes it
            return tuple(self._said.popleft() for _ in range(len(self._said)))

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


def asking(ray: Any, broker: Any, noted: Sequence[int], say: Callable[[str], None]) -> CarryOut:
    """What carries out items on the workers of a broker, for the process that made it.

    noted: signals, looked at while it waits. Raises what they stand for, and PoolError.
    """

    def carry_out(items: Sequence[Item]) -> Sequence[Outcome]:
        asked = broker.carry_out.remote(tuple(items))
        while not noted and not ray.wait([asked], timeout=LOOK_S)[0]:
            pass
        if noted:
            raise interrupted(noted[0])
        try:
            carried: Carried = ray.get(asked)
        except ray.exceptions.RayActorError as error:
            raise gone(error) from error
        for text in carried.said:
            say(text)
        if carried.over is not None:
            raise carried.over
        return carried.outcomes

    return carry_out


def interrupted(number: int) -> BaseException:
    """What a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def gone(error: Exception) -> PoolError:
    """That the broker died."""
    why = f"the process that holds the search's workers died: {first_line(str(error))}"
    return PoolError(f"{why}\nThe same search goes on from here.")
