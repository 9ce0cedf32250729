"""Which worker does what next: a pure state machine. Events in, instructions out; no I/O, no clock, no Ray.

The pool (or the in-process loop) carries the instructions out and reports what happened. The rules:

* Items are dealt in the order they were added, each as soon as all items in its `after` are settled (done or failed).
  Each kind of worker has its own queue, so that one kind never waits for another.
* A worker has at most two items in flight, which hides the driver's round trip. Idle workers are served first, and
  the last items of a queue go to idle workers only, so that none waits behind another while a worker has nothing.
* A lost worker's items return to the front of the queue in the order they were dealt. Only the head, the one that was
  being worked on, is charged an attempt; it is tried again with nothing before or behind it, and nobody overtakes it.
* The head's answer may have been lost with its worker, which then died of the item behind it. So that one, though
  charged nothing, is tried again alone as well: from then on there is no doubt who it is.
* An item that took `max_attempts` workers with it is given up. One that raised an ordinary exception failed at once:
  it would raise again. Where there is only one attempt, no item is queued behind another, and none is in doubt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from raymerge.errors import PoolError
from raymerge.runtime.events import (
    Abandon,
    Event,
    Instruction,
    Item,
    ItemDone,
    ItemFailed,
    ItemsAdded,
    KindState,
    Outcome,
    Say,
    Settle,
    Snapshot,
    StartWorker,
    Submit,
    WorkerFailed,
    WorkerLost,
    WorkerReady,
)
from raymerge.runtime.lanes import IN_FLIGHT, Lane, Worker

__all__ = ["Item", "Outcome", "Scheduler", "TransitionError", "first_line"]

HISTORY = 40


class TransitionError(PoolError):
    """An event that cannot follow on those before it: a fault in the loop around the scheduler, never in an item."""


class Scheduler:
    """Deals items to workers.

    workers: kind of worker -> how many of it to have at most. A worker is started when its kind has work.
    Raises PoolError for items that could never run, TransitionError for events that make no sense.
    """

    def __init__(self, workers: Mapping[str, int], *, max_attempts: int = 3) -> None:
        if max_attempts < 1 or any(count < 1 for count in workers.values()):
            raise PoolError(f"each kind needs a worker, each item an attempt; found {dict(workers)} and {max_attempts}")
        self.max_attempts = max_attempts
        depth = IN_FLIGHT if max_attempts > 1 else 1
        self._lanes = {kind: Lane(kind, count, target=count, depth=depth) for kind, count in workers.items()}
        self._lane_of_worker: dict[str, Lane] = {}
        self._items: dict[str, Item] = {}
        self._order: dict[str, int] = {}
        self._blockers: dict[str, int] = {}  # waiting item -> how many of its `after` are unsettled
        self._dependents: dict[str, list[str]] = {}
        self._charges: dict[str, int] = {}
        self._suspects: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}
        self._history: deque[Event | Instruction] = deque(maxlen=HISTORY)
        self._out: list[Instruction] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            ItemsAdded: self._added,
            WorkerReady: self._worker_ready,
            WorkerLost: self._worker_lost,
            WorkerFailed: self._worker_failed,
            ItemDone: self._item_done,
            ItemFailed: self._item_failed,
        }

    @property
    def finished(self) -> bool:
        """Every item added so far is settled."""
        return len(self._outcomes) == len(self._items)

    def outcomes(self) -> list[Outcome]:
        """What became of the settled items, in the order the items were added."""
        return [self._outcomes[id] for id in self._items if id in self._outcomes]

    def snapshot(self) -> Snapshot:
        """Counts for a progress display, and what is being worked on."""
        states = []
        working: list[str] = []
        for lane in self._lanes.values():
            workers = lane.workers.values()
            running, ready = sum(bool(w.in_flight) for w in workers), sum(w.ready for w in workers)
            starting = len(workers) - ready
            working += [w.in_flight[0] for w in workers if w.in_flight]
            states.append(KindState(lane.kind, lane.done, lane.failed, lane.total, running, ready, starting))
        return Snapshot(tuple(states), tuple(working))

    def handle(self, event: Event) -> list[Instruction]:
        """Take note of an event and return what to do now, in this order."""
        self._history.append(event)
        self._out = []
        self._handlers[type(event)](event)
        for lane in self._lanes.values():
            self._start_workers(lane)
            self._deal(lane)
        self._history.extend(i for i in self._out if not isinstance(i, Say))
        return self._out

    # Events

    def _added(self, event: ItemsAdded) -> None:
        self._refuse_bad(event.items)
        for item in event.items:
            self._items[item.id] = item
            self._order[item.id] = len(self._order)
            self._lanes[item.kind].total += 1
            blockers = [other for other in frozenset(item.after) if other not in self._outcomes]
            for other in blockers:
                self._dependents.setdefault(other, []).append(item.id)
            if blockers:
                self._blockers[item.id] = len(blockers)
            else:
                self._enqueue(item.id)

    def _worker_ready(self, event: WorkerReady) -> None:
        _, worker = self._find(event.worker)
        if worker.ready:
            self._impossible(f"worker {event.worker} is ready for the second time")
        worker.ready = True

    def _worker_lost(self, event: WorkerLost) -> None:
        lane, worker = self._find(event.worker)
        self._remove(event.worker)
        lane.vacated.append(event.worker)
        lane.returned.extendleft(reversed(worker.in_flight))
        self._say(f"worker {event.worker} lost: {first_line(event.why)}")
        if worker.in_flight and event.began:
            self._suspects.update(worker.in_flight)
            self._charge(lane, worker.in_flight[0], event.why)
            return
        lane.fruitless += 1
        if lane.fruitless >= self.max_attempts * lane.count:
            self._retire(lane, event.worker, event.why)

    def _worker_failed(self, event: WorkerFailed) -> None:
        lane, worker = self._find(event.worker)
        if worker.ready:
            self._impossible(f"worker {event.worker} fails to start, and was ready before")
        self._remove(event.worker)
        self._retire(lane, event.worker, event.why)

    def _item_done(self, event: ItemDone) -> None:
        attempt = self._take_back(event.worker, event.item_id)
        self._settle(Outcome(event.item_id, event.result, None, attempt, event.seconds, event.host))

    def _item_failed(self, event: ItemFailed) -> None:
        attempt = self._take_back(event.worker, event.item_id)
        self._say(f"item {event.item_id} failed: {first_line(event.error)}")
        outcome = Outcome(event.item_id, None, event.error, attempt, event.seconds, event.host, event.traceback)
        self._settle(outcome)

    # Items

    def _refuse_bad(self, items: tuple[Item, ...]) -> None:
        new: dict[str, Item] = {}
        for item in items:
            if item.id in self._items or item.id in new:
                raise PoolError(f"item {item.id}: there is one of this name already")
            if item.kind not in self._lanes:
                raise PoolError(f"item {item.id}: no worker kind {item.kind!r}; there are {', '.join(self._lanes)}")
            new[item.id] = item
        for item in items:
            unknown = sorted(other for other in item.after if other not in new and other not in self._items)
            if unknown:
                raise PoolError(f"item {item.id}: waits for {unknown[0]}, which nobody has added")
        _refuse_cycle(new)

    def _enqueue(self, id: str) -> None:
        self._lanes[self._items[id].kind].push(self._order[id], id)

    def _deal(self, lane: Lane) -> None:
        while lane.waiting:
            alone = self._is_alone(lane.head())
            worker = lane.receiver(alone)
            if worker is None:
                return
            id = lane.pop()
            worker.in_flight.append(id)
            worker.closed = alone
            self._out.append(Submit(worker.name, self._items[id], self._charges.get(id, 0) + 1))

    def _is_alone(self, id: str) -> bool:
        return self._items[id].alone or id in self._suspects

    def _charge(self, lane: Lane, id: str, why: str) -> None:
        charges = self._charges[id] = self._charges.get(id, 0) + 1
        if charges < self.max_attempts:
            self._say(f"item {id} was being worked on: attempt {charges} of {self.max_attempts}, tried again alone")
            return
        lane.returned.remove(id)
        self._say(f"item {id} given up: its worker died at each of {charges} attempts")
        error = (
            f"{id}: given up, its worker died at each of {charges} attempts\nLast time: {why}\n"
            "Too little memory is the usual cause; Ray's logs hold the end of the worker."
        )
        self._settle(Outcome(id, None, error, charges, 0.0, None))

    def _take_back(self, name: str, id: str) -> int:
        _, worker = self._find(name)
        if id not in worker.in_flight:
            self._impossible(f"worker {name} reports item {id}, which it does not have")
        worker.in_flight.remove(id)
        worker.closed = worker.closed and bool(worker.in_flight)
        return self._charges.get(id, 0) + 1

    def _settle(self, outcome: Outcome) -> None:
        id = outcome.item_id
        lane = self._lanes[self._items[id].kind]
        self._outcomes[id] = outcome
        self._items[id] = replace(self._items[id], payload=None)  # held workers settle items for days
        lane.fruitless = 0
        if outcome.error is None:
            lane.done += 1
        else:
            lane.failed += 1
        for other in self._dependents.pop(id, []):
            self._blockers[other] -= 1
            if not self._blockers[other]:
                del self._blockers[other]
                self._enqueue(other)
        self._out.append(Settle(outcome))

    # Workers

    def _start_workers(self, lane: Lane) -> None:
        while len(lane.workers) < min(lane.target, lane.unsettled):
            name = f"{lane.kind}-{lane.named}"
            lane.named += 1
            lane.workers[name] = Worker(name)
            self._lane_of_worker[name] = lane
            if lane.vacated:
                self._say(f"worker {name} takes the place of {lane.vacated.popleft()}")
            self._out.append(StartWorker(name, lane.kind))
        if lane.unsettled and not lane.target and not lane.abandoned:
            lane.abandoned = True
            self._out.append(Abandon(lane.kind, lane.last_failure))

    def _retire(self, lane: Lane, name: str, why: str) -> None:
        lane.target -= 1
        lane.last_failure = why
        if name in lane.vacated:
            lane.vacated.remove(name)
        self._say(f"worker {name} cannot be had: {first_line(why)}; {lane.target} of kind {lane.kind} left")

    def _find(self, name: str) -> tuple[Lane, Worker]:
        lane = self._lane_of_worker.get(name)
        if lane is None:
            self._impossible(f"there is no worker {name}")
        return lane, lane.workers[name]

    def _remove(self, name: str) -> None:
        del self._lane_of_worker.pop(name).workers[name]

    # For people and tests

    def _say(self, text: str) -> None:
        self._out.append(Say(text))

    def _impossible(self, text: str) -> NoReturn:
        raise TransitionError("\n  ".join([f"{text}\nBefore it, oldest first:", *map(repr, self._history)]))

    def check(self) -> None:
        """Raise TransitionError unless every item is in exactly one place and nothing stands idle needlessly."""
        places: dict[str, list[str]] = {id: [] for id in self._items}
        for lane in self._lanes.values():
            for id in (*lane.returned, *(id for _, id in lane.queue)):
                places[id].append("queue")
            for worker in lane.workers.values():
                for id in worker.in_flight:
                    places[id].append(worker.name)
        for id in self._blockers:
            places[id].append("waiting")
        for id in self._outcomes:
            places[id].append("settled")
        faults = [f"item {id} is in {where or 'no place'}" for id, where in places.items() if len(where) != 1]
        for id, where in places.items():
            open_ = sum(other not in self._outcomes for other in frozenset(self._items[id].after))
            if open_ != self._blockers.get(id, 0):
                faults.append(f"item {id} is in {where} and {open_} items it waits for are unsettled")
        alone = {id for id in self._items if self._is_alone(id)}
        faults += [fault for lane in self._lanes.values() for fault in lane.faults(alone)]
        faults += [f"item {id} charged {n} times" for id, n in self._charges.items() if n > self.max_attempts]
        if faults:
            self._impossible("; ".join(faults))


def first_line(text: str) -> str:
    """The line of an error that says what and where."""
    return text.splitlines()[0] if text else "no reason given"


def _refuse_cycle(new: Mapping[str, Item]) -> None:
    """Items of one batch that wait for each other in a circle would wait for ever."""
    open_ = {id: {other for other in item.after if other in new} for id, item in new.items()}
    dependents: dict[str, list[str]] = {}
    for id, others in open_.items():
        for other in others:
            dependents.setdefault(other, []).append(id)
    free = [id for id, others in open_.items() if not others]
    while free:
        id = free.pop()
        del open_[id]
        for other in dependents.get(id, []):
            open_[other].discard(id)
            if not open_[other]:
                free.append(other)
    if open_:
        raise PoolError(f"item {next(iter(open_))}: waits in a circle with {len(open_) - 1} others")
