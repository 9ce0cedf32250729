"""How far a job is: a bar that lives at the bottom of a terminal, a plain line every few seconds in a job log."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from raymerge.runtime.events import KindState, Snapshot

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

EVERY_S = 5.0
WINDOW_S = 60.0
LOOK_S = 1.0
LIVE_EVERY_S = 15.0
MOST_LIVE = 8


class Pace:
    """Items per second of each worker kind over the last minute, and from it the time left.

    Kinds work side by side, so the slowest decides. A kind that has settled nothing yet adds an unknown amount.
    """

    def __init__(self) -> None:
        self._samples: dict[str, deque[tuple[float, int]]] = {}

    def note(self, snapshot: Snapshot, now: float) -> None:
        """Take note of the counts at a time in seconds."""
        for kind in snapshot.kinds:
            settled = kind.done + kind.failed
            samples = self._samples.setdefault(kind.kind, deque([(now, settled)]))
            if not kind.running and not settled:
                samples[0] = (now, 0)  # waiting for a worker or for other items is not work
            if settled != samples[-1][1]:
                samples.append((now, settled))
            while len(samples) > 2 and samples[1][0] <= now - WINDOW_S:
                samples.popleft()

    def rate(self, kind: str, now: float) -> float | None:
        """Items per second; None until one is settled."""
        samples = self._samples.get(kind)
        if not samples or samples[-1][1] == samples[0][1] or now <= samples[0][0]:
            return None
        return (samples[-1][1] - samples[0][1]) / (now - samples[0][0])

    def total_rate(self, snapshot: Snapshot, now: float) -> float | None:
        """Items per second of the kinds that still have some to do."""
        rates = [rate for kind in snapshot.kinds if _left(kind) and (rate := self.rate(kind.kind, now)) is not None]
        return sum(rates) if rates else None

    def left(self, snapshot: Snapshot, now: float) -> tuple[float, bool] | None:
        """Seconds left at this pace, and whether that is only a lower bound; None if nothing is known."""
        open_ = [kind for kind in snapshot.kinds if _left(kind)]
        rates = {kind.kind: self.rate(kind.kind, now) for kind in open_}
        known = [_left(kind) / rate for kind in open_ if (rate := rates[kind.kind])]
        return (max(known), len(known) < len(open_)) if known else None


def counts_text(snapshot: Snapshot, pace: Pace, now: float) -> str:
    """Done of total, rate, time left, failed: '12/200 6 %, 3.1/s, 1:02 left, 1 failed'."""
    settled, total = snapshot.done + snapshot.failed, snapshot.total
    parts = [f"{settled}/{total} {100 * settled // total if total else 0} %"]
    if (rate := pace.total_rate(snapshot, now)) is not None:
        parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min")
    if (left := pace.left(snapshot, now)) is not None:
        parts.append(f"{'over ' if left[1] else ''}{clock_text(left[0])} left")
    if snapshot.failed:
        parts.append(f"{snapshot.failed} failed")
    return ", ".join(parts)


def kind_text(kind: KindState) -> str:
    """One kind of worker: 'model 3/10 (1 failed), 1 of 2 workers busy, 1 starting'."""
    failed = f" ({kind.failed} failed)" if kind.failed else ""
    starting = f", {kind.starting} starting" if kind.starting else ""
    settled = f"{kind.done + kind.failed}/{kind.total}{failed}"
    return f"{kind.kind} {settled}, {kind.running} of {kind.workers} workers busy{starting}"


def clock_text(seconds: float) -> str:
    """0:05, 12:34, 1:02:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Progress:
    """Shows snapshots of a job: a context manager.

    title: what is being done, in a few words. stream: standard error unless given; a terminal gets a bar, anything
    else a line at most every `every_s` seconds and one at the end. quiet: nothing at all. clock: seconds, monotonic.
    watch: turns the ids of items being worked on into lines on how far each is. A thread asks it every second, since an
    item in this process blocks whoever deals it: the bar shows the lines below, a job log gets them every 15 seconds.
    """

    def __init__(
        self,
        title: str,
        *,
        stream: TextIO | None = None,
        quiet: bool = False,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[Sequence[str]], Sequence[str]] | None = None,
    ) -> None:
        self.title = title
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._every_s = every_s
        self._clock = clock
        self._pace = Pace()
        self._snapshot = Snapshot(())
        self._started = self._spoke = clock()
        self._live: Live | None = None
        self._watch = watch
        self._lines: Sequence[str] = ()
        self._listed: float | None = None
        self._printing = threading.Lock()
        self._ended = threading.Event()
        self._watching: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._started = self._spoke = self._clock()
        if not self._quiet and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            render = lambda: self._bar(console)  # noqa: E731  the bar is drawn by a thread, so that its clock never stops
            self._live = Live(console=console, get_renderable=render, refresh_per_second=4)
            self._live.start()
        if self._watch is not None and not self._quiet:
            self._ended.clear()
            self._watching = threading.Thread(target=self._keep_looking, name="progress", daemon=True)
            self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watching is not None:
            self._ended.set()
            self._watching.join(timeout=10 * LOOK_S)  # it may be reading from far away
            self._watching = None
        if self._live is not None:
            self._lines = ()
            self._live.stop()
            self._live = None
        elif self._snapshot.total:
            self._line(f"{self._status()}; {'stopped' if error else 'finished'}")

    def update(self, snapshot: Snapshot) -> None:
        """Take note of where the job stands. Cheap: called after every event."""
        now = self._clock()
        self._snapshot = snapshot
        self._pace.note(snapshot, now)
        if self._live is None and now - self._spoke >= self._every_s:
            self._spoke = now
            self._line(self._status())

    def look(self) -> None:
        """Ask the watch how far the items being worked on are, and show it."""
        working = self._snapshot.working
        lines = self._watch(working) if self._watch is not None and working else ()
        more = len(lines) - MOST_LIVE
        self._lines = [*lines[:MOST_LIVE], f"and {more} more"] if more > 0 else lines
        now = self._clock()
        if self._live is None and lines and (self._listed is None or now - self._listed >= LIVE_EVERY_S):
            self._listed = now
            for line in self._lines:
                self._line(line)

    def _keep_looking(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def _line(self, text: str) -> None:
        if self._quiet:
            return
        with self._printing:
            print(f"{self.title}: {text}" if self.title else text, file=self._stream, flush=True)

    def _status(self) -> str:
        now = self._clock()
        kinds = "; ".join(kind_text(kind) for kind in self._snapshot.kinds if kind.total)
        return f"{counts_text(self._snapshot, self._pace, now)}, {clock_text(now - self._started)} elapsed; {kinds}"

    def _bar(self, console: Console) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now, snapshot = self._clock(), self._snapshot
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(no_wrap=True, overflow="ellipsis", max_width=24)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(snapshot.total, 1), completed=snapshot.done + snapshot.failed)
        grid.add_row(Text(self.title, style="bold"), bar, Text(counts_text(snapshot, self._pace, now)))
        below = [kind_text(kind) for kind in snapshot.kinds if kind.total]
        below.append(f"{clock_text(now - self._started)} elapsed")
        dim = [Text(f"  {line}", style="dim", no_wrap=True, overflow="ellipsis") for line in below]
        return Group(grid, *dim, *(Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in self._lines))


@contextmanager
def passing_line() -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is looked at and is gone at the end; nothing where nobody watches."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("looking") as status:
        yield status.update


def _left(kind: KindState) -> int:
    return kind.total - kind.done - kind.failed
