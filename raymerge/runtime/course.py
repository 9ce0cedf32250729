"""What becomes of the trials of a search: between the study and whatever carries them out. No Ray."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from raymerge.errors import EvaluationError, PoolError
from raymerge.runtime.broker import Answer
from raymerge.search.records import Trial

if TYPE_CHECKING:
    from raymerge.search.study import Study

T = TypeVar("T")
MOST_DEATHS = 3  # of a trial's process


class Watch(Protocol):
    """Told of each trial, in the driver. say: what else a person would want to know, such as a worker that was lost."""

    def begun(self, trial: Trial) -> None: ...
    def reported(self, trial: Trial) -> None: ...
    def finished(self, trial: Trial) -> None: ...
    def say(self, text: str) -> None: ...


class Course:
    """Trials from a study, and to it what becomes of them. over: why there are to be no more."""

    def __init__(self, study: Study, may_go_on: Callable[[], bool], watch: Watch) -> None:
        self.over: Exception | None = None
        self._study, self._may_go_on, self._watch = study, may_go_on, watch
        self._deaths: Counter[int] = Counter()
        self._again: deque[Trial] = deque()

    def begin(self) -> Trial | None:
        """The next trial; None if there is none now."""
        if self.over is not None:
            return None
        if self._again:
            return self._again.popleft()
        trial = self._study.ask() if self._may_go_on() else None
        if trial is not None:
            self._watch.begun(trial)
        return trial

    def report(self, trial: Trial, answer: Answer) -> bool:
        """The answer to a trial's question; whether the trial ends here."""
        for text in answer.said:
            self._watch.say(text)
        if answer.over is not None:
            self.over = self.over or answer.over
            return True
        if answer.figures is None:
            self._study.fail(trial.number, answer.error or "no reason given")
            return True
        try:
            drop = self._study.report(trial.number, answer.figures)
        except EvaluationError as error:  # not finite
            self._study.fail(trial.number, str(error))
            return True
        self._watch.reported(trial)
        return drop

    def end(self, trial: Trial) -> None:
        """A trial asks no more. It stays open in the study if that is because all is over."""
        if self.over is None:
            self._study.tell(trial.number)
            self._watch.finished(trial)

    def died(self, trial: Trial) -> None:
        """A trial's process is gone, for which its point is not to blame."""
        self._deaths[trial.number] += 1
        if self._deaths[trial.number] < MOST_DEATHS:
            self._watch.say(f"trial {trial.number}: its process died, it is tried again")
            self._again.append(trial)
            return
        self.over = self.over or PoolError(
            f"trial {trial.number}: its process died {MOST_DEATHS} times\nIt does nothing but wait for the workers: "
            "look for too little memory on this machine. The same search goes on from here."
        )

    def kept(self, act: Callable[[], T], otherwise: T) -> T:
        """Do something on behalf of Tune, which would bury an exception; it is kept for later."""
        try:
            return act()
        except Exception as error:
            self.over = self.over or error
            return otherwise
