"""The loop around the scheduler: workers are actors of Ray, events are what becomes of their calls.

Ray retries nothing (max_restarts=0, max_task_retries=0): the scheduler decides what is tried again, and a lost worker
is replaced by a new actor. Ray itself is imported when a pool is run.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge.runtime.connection import connected
from raymerge.runtime.events import (
    Event,
    Item,
    ItemFailed,
    ItemsAdded,
    Outcome,
    StartWorker,
    Submit,
    WorkerFailed,
    WorkerLost,
    WorkerReady,
)
from raymerge.runtime.host import THREAD_VARIABLES, Host, describe
from raymerge.runtime.inbox import Inbox
from raymerge.runtime.kinds import WorkerKind, WorkerPlan, plan_autoscaling, plan_workers
from raymerge.runtime.local import Follow, answered, attend, run_local
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Scheduler, first_line

__all__ = ["WorkerKind", "plan_workers", "run_local", "run_on_ray"]

READY_DEADLINE_S = 600.0
TICK_S = 1.0


def run_on_ray(
    items: Sequence[Item],
    kinds: Sequence[WorkerKind],
    *,
    follow: Follow | None = None,
    progress: Progress | None = None,
    ready_deadline_s: float = READY_DEADLINE_S,
    max_attempts: int = 3,
    autoscaling: bool = False,
    inbox: Inbox | None = None,
) -> list[Outcome]:
    """Carry out items on workers of Ray; returns what became of each, in the order they were added.

    follow: called with each outcome as it is settled; the items it returns are added. ready_deadline_s: how long a
    worker may take from being asked for to being up. autoscaling: machines may still be added within that time, so all
    workers that a kind counts are asked for, whatever is there now. inbox: more items come from there, until it is
    closed; workers stay up meanwhile.
    Raises PoolError if the Ray cluster lacks what a worker takes, or if no worker of a kind comes up; whatever is
    raised, KeyboardInterrupt included, no worker is left.
    """
    if inbox is None:
        inbox = Inbox()
        inbox.close()
    with connected() as ray, progress or Progress("", quiet=True) as shown:
        plan = plan_here(ray, kinds, autoscaling=autoscaling)
        for note in plan.notes:
            shown.say(note)
        scheduler = Scheduler(plan.counts, max_attempts=max_attempts)
        workers = Workers(ray, kinds, plan, ready_deadline_s, inbox.wake)
        try:
            events: deque[Event] = deque([ItemsAdded(tuple(items))])
            while events or not scheduler.finished or not inbox.done:
                if not events:
                    events.extend(workers.wait())
                    if more := inbox.take():
                        events.append(ItemsAdded(more))
                while events:
                    for instruction in scheduler.handle(events.popleft()):
                        match instruction:
                            case StartWorker(worker, kind):
                                workers.start(worker, kind)
                            case Submit():
                                events.extend(workers.submit(instruction))
                            case _:
                                events.extend(attend(instruction, follow, shown))
                shown.update(scheduler.snapshot())
        finally:
            workers.kill_all()
    return scheduler.outcomes()


def plan_here(ray: Any, kinds: Sequence[WorkerKind], *, autoscaling: bool) -> WorkerPlan:
    """The workers of each kind that the Ray cluster has room for. Raises PoolError."""
    if autoscaling:
        return plan_autoscaling(kinds)
    return plan_workers(kinds, [node["Resources"] for node in ray.nodes() if node["Alive"]])


@dataclass(frozen=True)
class _Call:
    """A call in flight. submit: the item it carries out; None if it only asks whether the worker is there."""

    ref: Any
    submit: Submit | None


@dataclass
class _Actor:
    """A worker: its handle, its calls in the order they were made, and when it has to be up (seconds, monotonic).

    held_back: items to be sent when the worker has said that it is there.
    """

    handle: Any
    kind: str
    calls: deque[_Call] = field(default_factory=deque)
    held_back: list[Submit] = field(default_factory=list)
    deadline: float | None = None


class Workers:
    """The actors of one run. Starts, feeds, watches and kills them; decides nothing.

    wake: set by each answer, and by whoever else wants `wait` to return.
    """

    def __init__(
        self, ray: Any, kinds: Sequence[WorkerKind], plan: WorkerPlan, ready_deadline_s: float, wake: threading.Event
    ) -> None:
        self._ray = ray
        self._kinds = {kind.name: kind for kind in kinds}
        self._plan = plan
        self._ready_deadline_s = ready_deadline_s
        self._wake = wake
        self._actors: dict[str, _Actor] = {}
        self._remote_host = ray.remote(Host)

    def start(self, name: str, kind: str) -> None:
        """Ask Ray for a worker. `wait` tells when it is up, or that it cannot be had."""
        asked, needs = self._kinds[kind], self._plan.needs[kind]
        threads = dict.fromkeys(THREAD_VARIABLES, str(asked.thread_count))
        handle = self._remote_host.options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0, max_task_retries=0,
            runtime_env={"env_vars": threads},
        ).remote(asked.factory, asked.arguments_on(needs.gpus), asked.thread_count)  # fmt: skip
        actor = _Actor(handle, kind, deadline=time.monotonic() + self._ready_deadline_s)
        self._note(actor, handle.ready.remote())
        self._actors[name] = actor

    def submit(self, submit: Submit) -> list[Event]:
        """Hand an item to a worker, behind what it has. An item that cannot be sent has failed."""
        actor = self._actors.get(submit.worker)
        if actor is None:  # found dead together with what led to this; the scheduler is about to learn it
            return []
        if not actor.calls:
            # An idle worker may have died unnoticed. Asked first, it cannot make the item pay for that.
            self._note(actor, actor.handle.pid.remote())
        if actor.calls[0].submit is None:
            actor.held_back.append(submit)
            return []
        return self._send(actor, submit)

    def _send(self, actor: _Actor, submit: Submit) -> list[Event]:
        try:
            ref = actor.handle.run.remote(submit.item.call, submit.item.payload)
        except Exception as error:
            return [ItemFailed(submit.worker, submit.item.id, f"{submit.item.id}: cannot be sent: {describe(error)}")]
        self._note(actor, ref, submit)
        return []

    def _note(self, actor: _Actor, ref: Any, submit: Submit | None = None) -> None:
        actor.calls.append(_Call(ref, submit))
        ref.future().add_done_callback(lambda _: self._wake.set())

    def wait(self) -> list[Event]:
        """Block until something happened, or for about a second; returns what happened."""
        self._wake.wait(self._patience())
        self._wake.clear()
        first = {actor.calls[0].ref: name for name, actor in self._actors.items() if actor.calls}
        refs = list(first)
        ready = self._ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0] if refs else []
        if ready:  # the call behind one of these may have been answered too
            self._wake.set()
        events: list[Event] = [event for ref in ready for event in self._answer(first[ref])]
        return events + self._overdue()

    def kill_all(self) -> None:
        """End every worker."""
        for name in list(self._actors):
            self._kill(name)

    def _answer(self, name: str) -> list[Event]:
        """The event, if any, that the answer to a worker's first call is."""
        actor = self._actors[name]
        call = actor.calls[0]
        try:
            answer = self._ray.get(call.ref)
        except self._ray.exceptions.RayTaskError as error:
            # The call itself could not be made in the worker, or its result not be sent back; the worker is alive.
            actor.calls.popleft()
            text = _without_colour(str(error))
            if call.submit is not None:
                return [ItemFailed(name, call.submit.item.id, f"{call.submit.item.id}: {_last_line(text)}\n{text}")]
            self._kill(name)
            return [WorkerFailed(name, text)]
        except self._ray.exceptions.RayError as error:
            self._kill(name)
            if getattr(error, "actor_init_failed", False):
                text = _without_colour(str(error))
                return [WorkerFailed(name, f"it could not be constructed: {_last_line(text)}\n{text}")]
            return [WorkerLost(name, _cause(str(error)), began=call.submit is not None)]
        actor.calls.popleft()
        if call.submit is not None:
            return [answered(call.submit, answer)]
        if actor.deadline is None:
            held_back, actor.held_back = actor.held_back, []
            return [event for submit in held_back for event in self._send(actor, submit)]
        actor.deadline = None
        if answer.error is None:
            return [WorkerReady(name)]
        self._kill(name)
        return [WorkerFailed(name, answer.error)]

    def _patience(self) -> float:
        deadlines = [actor.deadline for actor in self._actors.values() if actor.deadline is not None]
        return max(0.0, min([TICK_S, *(deadline - time.monotonic() for deadline in deadlines)]))

    def _overdue(self) -> list[Event]:
        now = time.monotonic()
        late = [name for name, actor in self._actors.items() if actor.deadline is not None and actor.deadline <= now]
        events: list[Event] = []
        for name in late:
            kind = self._actors[name].kind
            self._kill(name)
            events.append(WorkerFailed(name, self._overdue_text(kind)))
        return events

    def _overdue_text(self, kind: str) -> str:
        there, free = self._ray.cluster_resources(), self._ray.available_resources()
        amounts = [f"{free.get(what, 0):g} of {there.get(what, 0):g} {what}" for what in ("CPU", "GPU")]
        return (
            f"not up after {self._ready_deadline_s:g} s\n"
            f"Asked for: {self._plan.needs[kind]} on one machine. Free on the Ray cluster: {', '.join(amounts)}.\n"
            "Another job may hold the rest, or the worker takes longer to load: raise hardware.ready_deadline then."
        )

    def _kill(self, name: str) -> None:
        # Also a worker that Ray calls lost: it may be unreachable and still at work.
        self._ray.kill(self._actors.pop(name).handle, no_restart=True)


def _without_colour(text: str) -> str:
    return text.replace("\x1b[36m", "").replace("\x1b[39m", "")


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _cause(text: str) -> str:
    """The sentence of Ray's report that says how a worker ended."""
    told = [line.strip() for line in text.splitlines() if "died" in line or "dead" in line or "unavailable" in line]
    said = told[-1] if told else first_line(text)
    return said.partition(" Some common causes")[0].removeprefix("The actor is dead because ")
