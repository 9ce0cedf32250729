"""The trials of a search: which comes next, which is dropped early, which is best; kept across interruptions."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import optuna

from raymerge.config.search import Search
from raymerge.errors import EvaluationError
from raymerge.search.journal import Journal
from raymerge.search.records import Figures, State, Trial
from raymerge.search.samplers import Given, check_sampler, sampler_of

if TYPE_CHECKING:
    from raymerge.search.space import Space

VERSION = 1  # of the journal's events


class Study:
    """An Optuna study whose every event is in a journal: asked, reported, told, failed.

    Opening the folder again enters the events in their order. Trials that were begun and not finished are handed out
    first, with what they reported; with one trial at a time those that follow are what an undisturbed search proposes.
    Trials compete by similarity minus penalty. With several rungs and one objective a trial is dropped after a rung
    unless it is among the best of those that reached it, one in `search.reduction` (ASHA: Li et al. 2020, 1810.05934).

    rungs: nested numbers of personas, ascending, the last is all. folder: of the journal. inputs: digest of what
    decides scores beside the recipe. restart: forget what the folder holds; replaces: where it is of another search.
    first: points to begin with; they are never dropped, so that what wins is at least as good. All methods may be
    called from any thread.

    Raises ProjectError if the sampler cannot search the space, or if the folder holds a search that differs in the
    space, the sampler, the seed, the objectives, the rungs or the inputs; StorageError if it cannot be read or written.
    """

    def __init__(
        self,
        space: Space,
        search: Search,
        rungs: Sequence[int],
        folder: str,
        inputs: str,
        *,
        restart: bool = False,
        replaces: bool = False,
        first: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        check_sampler(space, search)
        self.trials: list[Trial] = []
        self._space, self._search, self._rungs = space, search, tuple(rungs)
        self._grid = space.grid() if search.sampler == "grid" else None
        self._given = list(first) if self._grid is None else self._grid
        self._kept = 0 if self._grid is not None else len(first)
        self._limit = search.trials if self._grid is None else min(search.trials, len(self._grid))
        self._stops = search.stop_early and len(self._rungs) > 1 and len(search.objectives) == 1
        self._lock = threading.RLock()
        self._asked: list[optuna.Trial] = []
        self._dropped: set[int] = set()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it speaks of every study made in memory
        self._study = optuna.create_study(
            directions=["maximize", *["minimize"] * (len(search.objectives) - 1)],
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=search.reduction),
        )
        self._journal = Journal(folder, self._identity(inputs), restart=restart, replaces=replaces)
        beneath = sampler_of(search, 0) if search.sampler == "cmaes" else None
        for event in self._journal.events:
            self._enter(event, beneath)
        running = [trial for trial in self.trials if trial.state == "running"]
        self._pending = deque(trial for trial in running if not self._is_through(trial))
        for trial in running:
            if self._is_through(trial):
                self.tell(trial.number)

    @property
    def finished(self) -> int:
        """How many trials are settled: complete, stopped or failed."""
        with self._lock:
            return sum(trial.state != "running" for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """The complete trial of the highest similarity minus penalty, the first of equal ones."""
        with self._lock:
            complete = [trial for trial in self.trials if trial.state == "complete"]
            return max(complete, key=lambda trial: trial.rungs[-1].competes, default=None)

    def ask(self) -> Trial | None:
        """The next trial to be carried out, or None when as many as there may be are begun."""
        with self._lock:
            if self._pending:
                return self._pending.popleft()
            number = len(self.trials)
            if number >= self._limit:
                return None
            is_given = number < len(self._given)
            trial = self._begin(Given(self._given[number]) if is_given else sampler_of(self._search, number))
            self._journal.note(event="ask", number=number, values=trial.values)
            return trial

    def report(self, number: int, figures: Figures) -> bool:
        """Figures after a rung; whether the trial is to be dropped. A rung reported again changes nothing.

        Raises EvaluationError if a figure is missing or not finite, or if the rung is not the trial's next.
        """
        with self._lock:
            trial = self._trial(number)
            if trial.state != "running":
                return True
            if any(known.personas == figures.personas for known in trial.rungs):
                return number in self._dropped
            self._check(trial, figures)
            drop = self._score(trial, figures)
            if drop:
                self._dropped.add(number)
            self._journal.note(event="report", number=number, figures=asdict(figures), drop=drop)
            return drop

    def tell(self, number: int) -> None:
        """A trial is through: complete, or stopped where it was to be dropped. One that is settled stays as it is.

        Raises EvaluationError if rungs of it are missing.
        """
        with self._lock:
            trial = self._trial(number)
            if trial.state != "running":
                return
            if not self._is_through(trial):
                raise EvaluationError(
                    f"{_name(trial)} cannot be finished: it was scored on {trial.last.personas if trial.last else 0} "
                    f"of {self._rungs[-1]} personas.\nReport the other rungs first."
                )
            self._settle(trial, "stopped" if number in self._dropped else "complete")
            self._journal.note(event="tell", number=number, state=trial.state)

    def fail(self, number: int, error: str) -> None:
        """A trial that cannot be carried out. It counts as a trial; one that is settled stays as it is."""
        with self._lock:
            trial = self._trial(number)
            if trial.state == "running":
                self._settle(trial, "failed", error)
                self._journal.note(event="fail", number=number, error=error)

    def _identity(self, inputs: str) -> dict[str, Any]:
        search = self._search
        return {
            "version": VERSION,
            "recipe": dict(self._space.base),
            **{f"space.{parameter.name}": asdict(parameter) for parameter in self._space.parameters},
            "penalties": dict(self._space.penalties),
            "centred": self._space.centred,
            "sampler": search.sampler,
            "seed": search.seed,
            "objectives": search.objectives,
            "rungs": self._rungs,
            "stop_early": self._stops,
            "reduction": search.reduction if self._stops else None,
            "inputs": inputs,
            "first": self._given if self._grid is None and self._given else None,
        }

    def _enter(self, event: Mapping[str, Any], beneath: optuna.samplers.BaseSampler | None) -> None:
        """What an earlier run noted, as it was decided then: another version of a library loses nothing."""
        if event["event"] == "ask":
            self._begin(Given(event["values"], beneath))
            return
        trial = self._trial(event["number"])
        if event["event"] == "report":
            self._score(trial, Figures(**event["figures"]))
            if event["drop"]:
                self._dropped.add(trial.number)
        elif event["event"] == "tell":
            self._settle(trial, event["state"])
        else:
            self._settle(trial, "failed", event["error"])

    def _begin(self, sampler: optuna.samplers.BaseSampler) -> Trial:
        self._study.sampler = sampler
        asked = self._study.ask()
        trial = Trial(asked.number, self._space.suggest(asked))
        self._asked.append(asked)
        self.trials.append(trial)
        return trial

    def _score(self, trial: Trial, figures: Figures) -> bool:
        rung = len(trial.rungs)
        trial.rungs.append(figures)
        if not self._stops:
            return False
        asked = self._asked[trial.number]
        asked.report(figures.competes, self._search.reduction**rung)  # the pruner's own spacing: a rung for each
        is_poor = bool(asked.should_prune())  # asked of all: it also writes down which rung the others compete with
        return is_poor and rung + 1 < len(self._rungs) and trial.number >= self._kept

    def _settle(self, trial: Trial, state: State, error: str | None = None) -> None:
        trial.state, trial.error = state, error
        if state == "failed":
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        elif state == "stopped" and self._search.sampler != "cmaes":
            self._study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)
        else:  # CMA-ES passes over pruned trials, which with ASHA are most: it learns from the rung they reached
            figures = trial.rungs[-1]
            others = [figures.values[name] for name in self._search.objectives[1:]]
            self._study.tell(trial.number, [figures.competes, *others])

    def _is_through(self, trial: Trial) -> bool:
        return trial.number in self._dropped or len(trial.rungs) == len(self._rungs)

    def _trial(self, number: int) -> Trial:
        if not 0 <= number < len(self.trials):
            raise EvaluationError(f"trial {number}: was never begun.\nThe search has {len(self.trials)} trials.")
        return self.trials[number]

    def _check(self, trial: Trial, figures: Figures) -> None:
        found: dict[str, float] = {**dict.fromkeys(self._search.objectives, math.nan), **figures.values}
        found["penalty"] = figures.penalty
        wrong = {name: value for name, value in found.items() if not math.isfinite(value)}
        if wrong:
            raise EvaluationError(
                f"{_name(trial)}: {', '.join(f'{name} is {value}' for name, value in wrong.items())} "
                f"on {figures.personas} personas.\nExpected finite numbers. Find out what this recipe does to the "
                "answers with `raymerge merge --recipe` and `evaluate`, or leave its values out of `search.space`."
            )
        expected = self._rungs[len(trial.rungs)] if len(trial.rungs) < len(self._rungs) else None
        if figures.personas != expected:
            raise EvaluationError(
                f"{_name(trial)}: figures of {figures.personas} personas came where "
                f"{'no more' if expected is None else f'those of {expected}'} were expected.\n"
                f"Its rungs are {', '.join(map(str, self._rungs))}, one after the other."
            )


def _name(trial: Trial) -> str:
    return f"trial {trial.number} ({', '.join(f'{name}={value}' for name, value in trial.values.items())})"
