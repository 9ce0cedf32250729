"""The queue and the workers of one worker kind, as the scheduler keeps them."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

IN_FLIGHT = 2


@dataclass
class Worker:
    """name: unique over all kinds. ready: its constructor returned. in_flight: ids in the order they were
    submitted; the first is worked on.

    closed: the item it has is to be alone, so nothing is queued behind it.
    """

    name: str
    ready: bool = False
    in_flight: list[str] = field(default_factory=list)
    closed: bool = False


@dataclass
class Lane:
    """One worker kind. count: workers asked for; target: of these, the ones that still can be had. depth: items that
    a worker may have in flight.

    returned: items of lost workers, before all others. queue: a heap of (order of adding, id). vacated: lost workers
    whose place is free. fruitless: workers lost in a row with no item to blame. total, done, failed count items.
    """

    kind: str
    count: int
    target: int
    depth: int = IN_FLIGHT
    workers: dict[str, Worker] = field(default_factory=dict)
    returned: deque[str] = field(default_factory=deque)
    queue: list[tuple[int, str]] = field(default_factory=list)
    vacated: deque[str] = field(default_factory=deque)
    named: int = 0
    total: int = 0
    done: int = 0
    failed: int = 0
    fruitless: int = 0
    last_failure: str = ""
    abandoned: bool = False

    @property
    def unsettled(self) -> int:
        """Items neither done nor failed."""
        return self.total - self.done - self.failed

    @property
    def waiting(self) -> int:
        """Items that could be dealt now."""
        return len(self.returned) + len(self.queue)

    def push(self, order: int, id: str) -> None:
        """Queue an item that may start."""
        heapq.heappush(self.queue, (order, id))

    def head(self) -> str:
        """The item to be dealt next."""
        return self.returned[0] if self.returned else self.queue[0][1]

    def pop(self) -> str:
        """Take the item to be dealt next."""
        return self.returned.popleft() if self.returned else heapq.heappop(self.queue)[1]

    def receiver(self, alone: bool) -> Worker | None:
        """The worker to deal the head of the queue to now, if any: the least busy one, the oldest of equals.

        A second item is worth it only while there is enough for every worker, those still starting included.
        """
        limit = 1 if alone or self.waiting <= len(self.workers) else self.depth
        open_ = [w for w in self.workers.values() if w.ready and not w.closed and len(w.in_flight) < limit]
        return min(open_, key=lambda w: len(w.in_flight), default=None)

    def faults(self, alone: set[str]) -> list[str]:
        """What is wrong with this lane, if anything; `alone` are the ids that must be alone on their worker."""
        found = []
        for name, worker in self.workers.items():
            held = worker.in_flight
            if len(held) > (1 if worker.closed else self.depth):
                found.append(f"{name} holds {held}")
            if worker.closed != any(id in alone for id in held):
                found.append(f"{name} is {'closed' if worker.closed else 'open'} with {held}")
            if held and not worker.ready:
                found.append(f"{name} holds {held} and is not ready")
            if worker.ready and not held and self.waiting:
                found.append(f"{name} is idle and {self.head()} waits")
        if not len(self.workers) <= self.target <= self.count:
            found.append(f"{len(self.workers)} workers, {self.target} of {self.count} can be had")
        if self.unsettled and not self.workers and not self.abandoned:
            found.append(f"{self.unsettled} items and no worker")
        return [f"kind {self.kind}: {fault}" for fault in found]
