"""The same items in this process, one after the other: for debugging, and for machines without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from raymerge.errors import PoolError
from raymerge.runtime.events import (
    Abandon,
    Event,
    Instruction,
    Item,
    ItemDone,
    ItemFailed,
    ItemsAdded,
    Outcome,
    Say,
    Settle,
    StartWorker,
    Submit,
    WorkerFailed,
    WorkerReady,
)
from raymerge.runtime.host import Answer, Host
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Scheduler

Follow = Callable[[Outcome], Sequence[Item]]


def run_local(
    items: Sequence[Item],
    kinds: Sequence[WorkerKind],
    *,
    follow: Follow | None = None,
    progress: Progress | None = None,
    max_attempts: int = 3,
) -> list[Outcome]:
    """Carry out items here, with one worker of each kind; otherwise as `run_on_ray`.

    An exception fails its item; one that is no ordinary exception, such as KeyboardInterrupt, ends the run.
    """
    workers = LocalWorkers(kinds, max_attempts=max_attempts)
    with progress or Progress("", quiet=True) as shown:
        workers.carry_out(items, follow, shown)
    return workers.outcomes()


class LocalWorkers:
    """The workers of this process, one of each kind, made when there is something for it to do."""

    def __init__(self, kinds: Sequence[WorkerKind], *, max_attempts: int = 3) -> None:
        self._scheduler = Scheduler({kind.name: 1 for kind in kinds}, max_attempts=max_attempts)
        self._kinds = {kind.name: kind for kind in kinds}
        self._hosts: dict[str, Host] = {}
        self.outcomes = self._scheduler.outcomes

    def carry_out(self, items: Sequence[Item], follow: Follow | None, shown: Progress) -> None:
        """Settle items and those that follow on them. After an exception the workers cannot be used again."""
        import torch  # now, so that each worker's thread count holds from its first item on

        submitted: deque[Submit] = deque()
        events: deque[Event] = deque([ItemsAdded(tuple(items))])
        threads_before = torch.get_num_threads()
        try:
            while events or submitted:
                event = events.popleft() if events else _carry_out(submitted.popleft(), self._hosts)
                for instruction in self._scheduler.handle(event):
                    match instruction:
                        case StartWorker(worker, kind):
                            self._hosts[worker], started = _start(worker, self._kinds[kind])
                            events.append(started)
                        case Submit():
                            submitted.append(instruction)
                        case _:
                            events.extend(attend(instruction, follow, shown))
                shown.update(self._scheduler.snapshot())
        finally:
            torch.set_num_threads(threads_before)


def attend(instruction: Instruction, follow: Follow | None, progress: Progress) -> list[Event]:
    """What is the same wherever workers live: plan on, talk, stop. Returns what happened by it."""
    match instruction:
        case Settle(outcome):
            more = tuple(follow(outcome)) if follow is not None else ()
            return [ItemsAdded(more)] if more else []
        case Say(text):
            progress.say(text)
        case Abandon(kind, why):
            raise PoolError(f"workers of kind {kind}: none can be had\n{why}")
    return []


def answered(submit: Submit, answer: Answer) -> Event:
    """The event that an answer to an item is."""
    name, id = submit.worker, submit.item.id
    if answer.error is None:
        return ItemDone(name, id, answer.result, answer.seconds, answer.host)
    return ItemFailed(name, id, answer.error, answer.seconds, answer.host, answer.traceback)


def _start(name: str, kind: WorkerKind) -> tuple[Host, Event]:
    # "auto" where a GPU is asked for, since this machine need not have one.
    host = Host(kind.factory, kind.arguments_on(0 if kind.num_gpus == 0 else "auto"), kind.thread_count)
    error = host.ready().error
    return host, WorkerReady(name) if error is None else WorkerFailed(name, error)


def _carry_out(submit: Submit, hosts: dict[str, Host]) -> Event:
    return answered(submit, hosts[submit.worker].run(submit.item.call, submit.item.payload))
