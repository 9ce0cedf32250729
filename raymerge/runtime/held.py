"""Workers that stay up between the items of one caller and the next: a model is loaded once for all of a search."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType

from raymerge.errors import PoolError
from raymerge.runtime.events import Item, Outcome
from raymerge.runtime.inbox import Inbox
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.local import LocalWorkers
from raymerge.runtime.pool import READY_DEADLINE_S, run_on_ray
from raymerge.runtime.progress import Progress


class HeldWorkers:
    """Workers to which any number of threads send items: a context manager. They are made when they are first needed.

    local: in this process, one of each kind; callers then take turns. Else on Ray, which the process has to be
    connected to; see `run_on_ray` for the other arguments.
    """

    def __init__(
        self,
        kinds: Sequence[WorkerKind],
        *,
        local: bool = False,
        ready_deadline_s: float = READY_DEADLINE_S,
        max_attempts: int = 3,
        autoscaling: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or Progress("", quiet=True)
        self._lock = threading.Lock()
        self._open: dict[str, Future[Outcome]] = {}
        self._uses: Counter[str] = Counter()
        self._ended: str | None = None
        self._local = LocalWorkers(kinds, max_attempts=max_attempts) if local else None
        self._turn = threading.Lock()
        self._inbox = Inbox()

        def serve() -> None:
            try:
                run_on_ray(
                    (), kinds, follow=self._settled, progress=self._progress, ready_deadline_s=ready_deadline_s,
                    max_attempts=max_attempts, autoscaling=autoscaling, inbox=self._inbox,
                )  # fmt: skip
                self._end("the pool is closed")
            except BaseException as error:  # every caller gets it, and a thread has nobody else to tell
                self._end(str(error) if isinstance(error, PoolError) else f"the pool broke: {error!r}")

        self._thread = None if local else threading.Thread(target=serve, name="held workers", daemon=True)
        if self._thread is not None:
            self._thread.start()
        else:
            self._progress.__enter__()

    def carry_out(self, items: Sequence[Item]) -> list[Outcome]:
        """Carry items out; blocks until all are settled, and returns what became of each, in their order.

        An id may come again in a later call: it is another item then. Items wait (`after`) for those of their call.
        Raises PoolError when no worker can be had, and from then on.
        """
        with self._lock:
            if self._ended is not None:
                raise PoolError(self._ended)
            new = self._renamed(items)
            settled = [self._open.setdefault(item.id, Future()) for item in new]
        if self._local is None:
            self._inbox.put(new)
        else:
            self._take_turn(self._local, new)
        return [replace(future.result(), item_id=item.id) for item, future in zip(items, settled, strict=True)]

    def close(self) -> None:
        """End the workers. Items that are still open fail their callers with PoolError."""
        if self._thread is not None:
            self._inbox.close(give_up=True)
            self._thread.join()
        elif self._local is not None:
            self._end("the pool is closed")
            self._local = None  # and with it the models
            self._progress.__exit__(None, None, None)

    def __enter__(self) -> HeldWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _renamed(self, items: Sequence[Item]) -> list[Item]:
        """The scheduler knows an item by its id for as long as the workers are up."""
        names: dict[str, str] = {}
        for item in items:
            self._uses[item.id] += 1
            uses = self._uses[item.id]
            names[item.id] = item.id if uses == 1 else f"{item.id} (time {uses})"
        after = [frozenset(names.get(other, other) for other in item.after) for item in items]
        return [replace(item, id=names[item.id], after=blockers) for item, blockers in zip(items, after, strict=True)]

    def _take_turn(self, workers: LocalWorkers, items: Sequence[Item]) -> None:
        with self._turn:
            if self._ended is not None:  # while this call waited: its items have failed
                return
            try:
                workers.carry_out(items, self._settled, self._progress)
            except BaseException as error:
                self._end(str(error) if isinstance(error, PoolError) else f"the pool was interrupted: {error!r}")
                raise

    def _settled(self, outcome: Outcome) -> Sequence[Item]:
        with self._lock:
            future = self._open.pop(outcome.item_id)
        future.set_result(outcome)
        return ()

    def _end(self, why: str) -> None:
        with self._lock:
            self._ended = self._ended or why
            abandoned = list(self._open.values())
            self._open.clear()
        for future in abandoned:
            future.set_exception(PoolError(self._ended))
