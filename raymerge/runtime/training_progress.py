"""How far a training item is: a small file that its worker writes, and the lines that the driver makes of it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from raymerge import storage
from raymerge.errors import StorageError
from raymerge.evaluation.wording import short
from raymerge.runtime.events import Item, Outcome
from raymerge.runtime.progress import clock_text
from raymerge.runtime.tasks import PrefixTask, RouterTask, TrainTask

if TYPE_CHECKING:
    from raymerge.models.training import GroupProgress

NAME = "progress.json"
EVERY_S = 2.0
EVERY_S_AT_URI = 5.0
WINDOW_S = 60.0


Watched = TrainTask | PrefixTask | RouterTask


class ProgressFile:
    """The worker's side. clock: seconds, monotonic.

    The file holds `groups` (name -> step, steps, loss, validation, done), `tokens_per_s`, `left_s` (null until two
    steps are known) and `said`. What cannot be written is written with the next: it is worth no training.
    """

    def __init__(self, folder: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._location = storage.join(folder, NAME)
        self._every_s = EVERY_S_AT_URI if storage.is_uri(folder) else EVERY_S
        self._clock = clock
        self._written: float | None = None
        self._samples: deque[tuple[float, int, int]] = deque()
        self._tokens = 0
        self._groups: dict[str, dict[str, Any]] = {}
        self._left_steps = 0
        self.said: list[str] = []

    def stepped(self, progress: Mapping[str, GroupProgress], tokens: int) -> None:
        """Take note of a joint step."""
        now = self._clock()
        self._tokens += tokens
        self._samples.append((now, sum(p.step for p in progress.values()), self._tokens))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()
        self._left_steps = sum(p.steps - p.step for p in progress.values() if not p.done)
        if self._written is None or now - self._written >= self._every_s:
            self._groups = {name: _as_record(p) for name, p in progress.items()}
            self._write(now)

    def say(self, text: str) -> None:
        """Note what people should know."""
        self.said.append(text)
        self._write(self._clock())

    @property
    def tokens_per_s(self) -> float | None:
        """Non-padding tokens per second over the last minute; None until two steps are known."""
        return self._rate(2)

    @property
    def left_s(self) -> float | None:
        """Seconds left at the pace of the last minute; None until two steps are known."""
        rate = self._rate(1)
        return self._left_steps / rate if rate else None

    def remove(self) -> None:
        """The item is done: nobody needs to know how far it is."""
        storage.remove(self._location)

    def _rate(self, column: int) -> float | None:
        if len(self._samples) < 2 or self._samples[-1][0] <= self._samples[0][0]:
            return None
        first, last = self._samples[0], self._samples[-1]
        return (last[column] - first[column]) / (last[0] - first[0])

    def _write(self, now: float) -> None:
        value = {
            "groups": self._groups,
            "tokens_per_s": self.tokens_per_s,
            "left_s": self.left_s,
            "said": self.said,
        }
        self._written = now
        with suppress(OSError):
            storage.write_json(self._location, value)


def _as_record(progress: GroupProgress) -> dict[str, Any]:
    return {
        "step": progress.step,
        "steps": progress.steps,
        "loss": progress.loss if math.isfinite(progress.loss) else None,
        "validation": progress.validation,
        "done": progress.done,
    }


class LiveTrainings:
    """The driver's side: lines on the trainings that are going on, and what their engine said, each text once.

    say: is told such a text. clock: seconds, monotonic; a file at a URI is read every few seconds only.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._tasks: dict[str, Watched] = {}
        self._told: set[tuple[str, str]] = set()
        self._read: dict[str, tuple[float, dict[str, Any] | None]] = {}

    def expect(self, items: Iterable[Item]) -> None:
        """Remember where trainings of these items tell how far they are."""
        self._tasks |= {item.id: item.payload for item in items if isinstance(item.payload, Watched)}

    def lines(self, ids: Sequence[str]) -> list[str]:
        """A line for each of these items that is in training."""
        found = []
        for id in ids:
            task = self._tasks.get(id)
            if task is None:
                continue
            known = self._look(task.folder)
            if known is not None:
                self._tell(id, known.get("said", ()))
                found.append(live_line(id, task, known))
        return [line for line in found if line]

    def settle(self, outcome: Outcome) -> None:
        """An item ended, perhaps between two looks: what it said last must not be lost."""
        self._tell(outcome.item_id, (outcome.result or {}).get("said", ()))

    def _tell(self, id: str, said: Sequence[str]) -> None:
        for text in said:
            if (id, text) not in self._told:
                self._told.add((id, text))
                self._say(f"{id}: {text}")

    def _look(self, folder: str) -> dict[str, Any] | None:
        now = self._clock()
        read_at, known = self._read.get(folder, (-math.inf, None))
        if not storage.is_uri(folder) or now - read_at >= EVERY_S_AT_URI:
            known = _read_progress(folder)
            self._read[folder] = (now, known)
        return known


def _read_progress(folder: str) -> dict[str, Any] | None:
    try:
        known = storage.read_json(storage.join(folder, NAME))
    except StorageError:
        return None
    return known if isinstance(known, dict) else None


def live_line(id: str, task: Watched, known: Mapping[str, Any]) -> str | None:
    """'cluster_03: step 120/480, 1:02 left, loss 1.23, 5.2k tokens/s, validation 1.30'; None before the first step.

    Of several adapters: their mean losses, and the share of all their steps. What is asked for first stands first,
    since a narrow terminal cuts the end.
    """
    groups = list(known.get("groups", {}).values())
    if not groups:
        return None
    done, total = sum(g["step"] for g in groups), sum(g["steps"] for g in groups)
    if isinstance(task, RouterTask) or len(task.groups) == 1:
        parts = [f"{short(next(iter(known['groups'])))}: step {done}/{total}"]
    else:
        finished = sum(bool(g["done"]) for g in groups)
        what = "adapters" if isinstance(task, TrainTask) else "prefixes"
        parts = [f"{len(task.groups)} {what} of {id}: {100 * done // max(total, 1)} %"]
        parts += [f"{finished} done"] if finished else []
    if known.get("left_s") is not None:
        parts.append(f"{clock_text(known['left_s'])} left")
    training = [g for g in groups if g["step"] > 0 and not g["done"]] or groups
    digits = 4 if isinstance(task, RouterTask) else 2  # its gains are in the third decimal
    parts += _mean("loss", training, digits)
    if known.get("tokens_per_s") is not None:
        parts.append(f"{_amount(known['tokens_per_s'])} tokens/s")
    parts += _mean("validation", training, digits)
    return ", ".join(parts)


def _mean(what: str, groups: Sequence[Mapping[str, Any]], digits: int) -> list[str]:
    values = [group[what] for group in groups if group[what] is not None]
    return [f"{what} {sum(values) / len(values):.{digits}f}"] if values else []


def _amount(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
