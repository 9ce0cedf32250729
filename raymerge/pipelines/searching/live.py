"""What is shown of a search while it runs: a small table at the bottom of a terminal, a line per trial in a job log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from raymerge.config import Search
from raymerge.evaluation.search_panel import said
from raymerge.runtime.progress import clock_text
from raymerge.search.records import Trial

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live as RichLive

SHOWN = 5  # trials in the table, beside the best


class Live:
    """Told of each trial as it begins, reports and ends; a context manager.

    begun_before: trials that an earlier call of the same search had finished, which count and cost no time now.
    total: trials there are to be, by the search unless given. told: the values of a point as a person reads them.
    clock: seconds, monotonic.
    """

    def __init__(
        self,
        search: Search,
        best: Callable[[], Trial | None],
        *,
        title: str = "search",
        total: int | None = None,
        finished_before: int = 0,
        told: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._search = search
        self._title = title
        self._best = best
        self._total = search.trials if total is None else total
        self._before = finished_before
        self._told = told
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._started = clock()
        self._trials: dict[int, Trial] = {}
        self._ended = 0
        self._live: RichLive | None = None

    def __enter__(self) -> Live:
        self._started = self._clock()
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live as RichLive

            self._live = RichLive(
                console=Console(file=self._stream),
                get_renderable=self.get_renderable,
                refresh_per_second=2,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self.say(f"{self.status()}; {'stopped' if error else 'finished'}")

    def begun(self, trial: Trial) -> None:
        """A trial was handed out."""
        self._trials[trial.number] = trial

    def reported(self, trial: Trial) -> None:
        """A trial was scored on a part of the personas."""
        self._trials[trial.number] = trial

    def finished(self, trial: Trial) -> None:
        """A trial ended: complete, stopped or failed."""
        self._trials[trial.number] = trial
        self._ended += 1
        if self._live is None:
            self.say(f"{trial_text(trial, self._told(trial.values))}; {self.status()}")

    def say(self, text: str) -> None:
        """A line of its own: a worker that was lost, an item that is tried again."""
        if self._live is not None:
            self._live.console.print(f"{self._title}: {text}", markup=False, highlight=False)
        else:
            print(f"{self._title}: {text}", file=self._stream, flush=True)

    def status(self) -> str:
        """Finished of all, best so far, rate, time left: '12/60 trials, best 71.3 (trial 9), 240/h, 12:00 left'."""
        ended = self._before + self._ended
        parts = [f"{ended}/{self._total} trials"]
        best = self._best()
        if best is not None and best.last is not None:
            parts.append(f"best {best.last.values['similarity']:.1f} (trial {best.number})")
        elapsed = self._clock() - self._started
        if self._ended and elapsed > 0:
            rate = self._ended / elapsed
            parts.append(f"{3600 * rate:.0f}/h")
            left = max(0, self._total - ended) / rate
            if self._search.minutes is not None:
                left = min(left, max(0.0, 60 * self._search.minutes - elapsed))
            parts.append(f"{clock_text(left)} left")
        return ", ".join(parts)

    def get_renderable(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2), expand=True)
        for width in (5, 13, 8):
            table.add_column(justify="right", no_wrap=True, min_width=width)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)  # what is left
        table.add_row("trial", "similarity", "personas", "recipe", style="dim")
        best = self._best()
        recent = sorted(self._trials.values(), key=lambda trial: trial.number)[-SHOWN:]
        rows = [*([best] if best is not None and best.number not in {t.number for t in recent} else []), *recent]
        for trial in rows:
            is_best = best is not None and trial.number == best.number
            table.add_row(
                str(trial.number), *figures_text(trial), said(self._told(trial.values)), style="bold" if is_best else ""
            )
        return Group(Text(f"{self._title}: {self.status()}", style="bold", no_wrap=True, overflow="ellipsis"), table)


def figures_text(trial: Trial) -> tuple[str, str]:
    """Similarity and the personas that it is a mean over; what became of it where it is not complete."""
    if trial.last is None:
        return ("failed" if trial.state == "failed" else "", "")
    note = {"stopped": " stopped", "failed": " failed"}.get(trial.state, "")
    return f"{trial.last.values['similarity']:.2f}{note}", str(trial.last.personas)


def trial_text(trial: Trial, values: Mapping[str, Any]) -> str:
    """A trial in a line: 'trial 12: 71.28 over 200 personas: strategy top_k, k 14, scale 1.31'. values: as told."""
    if trial.state == "failed" or trial.last is None:
        return f"trial {trial.number} failed: {(trial.error or 'no reason given').splitlines()[0]}"
    similarity, personas = figures_text(trial)
    return f"trial {trial.number}: {similarity} over {personas} personas: {said(values)}"
