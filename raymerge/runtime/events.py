"""What the scheduler is told and what it answers: small frozen records, safe to print and to send."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """The unit of work: call the method `call` of a worker of kind `kind` with `payload`.

    id: unique, names what is made. payload: small and picklable. after: ids of items that must be settled (done or
    failed) before this one starts; it looks itself at what exists by then. alone: for items of minutes: nothing is
    queued behind it on its worker, since a wait would cost more than the driver's round trip.
    """

    id: str
    kind: str
    call: str
    payload: Any = field(default=None, repr=False)
    after: Collection[str] = field(default=frozenset(), repr=False)
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of an item.

    error: None if it was done; else a text whose first line says what and where. attempts: workers it was given to
    that did not die of something else. seconds: in the worker, of the last attempt. host: where that was.
    """

    item_id: str
    result: dict[str, Any] | None
    error: str | None
    attempts: int
    seconds: float
    host: str | None
    traceback: str | None = field(default=None, repr=False)


# Events


@dataclass(frozen=True)
class ItemsAdded:
    """More to do. Items of one batch may wait for each other."""

    items: tuple[Item, ...]

    def __repr__(self) -> str:
        first = ", ".join(item.id for item in self.items[:3])
        return f"ItemsAdded({len(self.items)}: {first}{', ...' if len(self.items) > 3 else ''})"


@dataclass(frozen=True)
class WorkerReady:
    """A started worker is up."""

    worker: str


@dataclass(frozen=True)
class WorkerLost:
    """A worker's process died. began: it had started on the item at the head of its queue, so far as can be known."""

    worker: str
    why: str
    began: bool = True


@dataclass(frozen=True)
class WorkerFailed:
    """A started worker cannot be had: its constructor raised, or it was not up by the deadline."""

    worker: str
    why: str


@dataclass(frozen=True)
class ItemDone:
    """An item returned."""

    worker: str
    item_id: str
    result: dict[str, Any] | None = field(default=None, repr=False)
    seconds: float = 0.0
    host: str | None = None


@dataclass(frozen=True)
class ItemFailed:
    """An item raised an ordinary exception: its worker is alive."""

    worker: str
    item_id: str
    error: str
    seconds: float = 0.0
    host: str | None = None
    traceback: str | None = field(default=None, repr=False)


Event = ItemsAdded | WorkerReady | WorkerLost | WorkerFailed | ItemDone | ItemFailed


# Instructions


@dataclass(frozen=True)
class StartWorker:
    """Start a worker of a kind under this name; answer with WorkerReady, WorkerLost or WorkerFailed."""

    worker: str
    kind: str


@dataclass(frozen=True)
class Submit:
    """Hand an item to a worker, behind what it already has. attempt counts from 1."""

    worker: str
    item: Item
    attempt: int


@dataclass(frozen=True)
class Settle:
    """An item is done, failed or given up: this is final."""

    outcome: Outcome


@dataclass(frozen=True)
class Say:
    """Something a person watching would want to know."""

    text: str


@dataclass(frozen=True)
class Abandon:
    """No worker of this kind can be had though items need one: the job cannot go on."""

    kind: str
    why: str


Instruction = StartWorker | Submit | Settle | Say | Abandon


# What a progress display shows


@dataclass(frozen=True)
class KindState:
    """Items and workers of one kind. running: workers that have something to do; workers: those that are up."""

    kind: str
    done: int
    failed: int
    total: int
    running: int
    workers: int
    starting: int


@dataclass(frozen=True)
class Snapshot:
    """Where a job stands. Totals may grow, as results bring new items. working: ids of items being worked on."""

    kinds: tuple[KindState, ...]
    working: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """Items done, without the failed ones."""
        return sum(k.done for k in self.kinds)

    @property
    def failed(self) -> int:
        """Items failed or given up."""
        return sum(k.failed for k in self.kinds)

    @property
    def total(self) -> int:
        """Items known so far."""
        return sum(k.total for k in self.kinds)
