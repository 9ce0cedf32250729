"""Carry out items, on Ray or in this process, and say what became of them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from raymerge import storage
from raymerge.config import Project
from raymerge.pipelines.opening import Opened, base_location
from raymerge.runtime.pool import WorkerKind, run_local, run_on_ray
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Item, Outcome
from raymerge.runtime.tasks import EmbedTask, PrefixTask, SketchTask, TrainTask, TuneTask
from raymerge.runtime.training_progress import LiveTrainings
from raymerge.runtime.workers import MergeWorker, ModelWorker

FLUSH_S = 2.0
IN_FULL = 5  # failures that are printed with what was expected and what to do; more are often the same again


@dataclass(frozen=True)
class JobResult:
    """What became of a job's items. failed: what failed -> why, in one line each. notes: what one would not expect."""

    done: int
    skipped: int
    failed: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def exit_status(self) -> int:
        """0 when everything was done, 1 when something failed."""
        return 1 if self.failed else 0


def worker_kinds(project: Project, base_model: str | None) -> list[WorkerKind]:
    """The workers a project can have. Without a base model one still embeds texts."""
    hardware = project.hardware
    merge = WorkerKind(
        "merge", MergeWorker, {"expert_cache": hardware.expert_cache}, count=hardware.max_merge_workers,
        num_cpus=hardware.cpus_per_merge,
    )  # fmt: skip
    arguments = {
        "base_model": base_model or "",
        "name": project.base_model or "",
        "dtype": hardware.dtype,
        "quantization": hardware.quantization,
        "gpus": 1 if hardware.gpus_per_model == "auto" else max(1, int(hardware.gpus_per_model)),
        "expert_cache": hardware.expert_cache,
    }
    model = WorkerKind(
        "model", ModelWorker, arguments, count=hardware.max_model_workers,
        num_cpus=hardware.cpus_per_model, num_gpus=hardware.gpus_per_model, device_argument="device",
    )  # fmt: skip
    return [merge, model]


def pool_options(project: Project) -> dict[str, Any]:
    """What a project says of its workers as a whole, as `run_on_ray` takes it."""
    hardware = project.hardware
    return {
        "ready_deadline_s": hardware.ready_deadline, "max_attempts": hardware.max_attempts,
        "autoscaling": hardware.autoscaling,
    }  # fmt: skip


def kinds_used(opened: Opened, items: Iterable[Item]) -> set[str]:
    """The kinds of worker that a job's first items need, and those that may follow on its embeddings.

    A kind that nothing is dealt to would take its share of the machines all the same, or be refused where it does not
    fit. Only merges follow where there are no examples to train and to score on.
    """
    items = list(items)
    used = {item.kind for item in items}
    if any(isinstance(item.payload, EmbedTask | SketchTask | TuneTask) for item in items):
        if opened.recipes or opened.project.training.tries_epochs:
            used.add("merge")
        if opened.personas is not None and opened.project.base_model is not None:
            used.add("model")
    return used


def carry_out(
    opened: Opened,
    items: Sequence[Item],
    *,
    follow: Callable[[Outcome], Sequence[Item]] | None = None,
    local: bool = False,
    title: str,
) -> JobResult:
    """Run items to the end. Each settled item is noted in the timings of its run."""
    if not items:
        return JobResult(0, 0)
    used = kinds_used(opened, items)
    kinds = [kind for kind in worker_kinds(opened.project, base_location(opened.project)) if kind.name in used]
    timings = Timings(opened.project, items)
    live = LiveTrainings(say=lambda text: progress.say(text))
    live.expect(items)
    progress = Progress(title, watch=live.lines)

    def settled(outcome: Outcome) -> Sequence[Item]:
        timings.note(outcome)
        live.settle(outcome)
        new = follow(outcome) if follow is not None else ()
        timings.expect(new)
        live.expect(new)
        return new

    options = pool_options(opened.project)
    try:
        if local:
            outcomes = run_local(items, kinds, follow=settled, progress=progress, max_attempts=options["max_attempts"])
        else:
            outcomes = run_on_ray(items, kinds, follow=settled, progress=progress, **options)
    finally:
        timings.flush()
    return summarise(outcomes)


def summarise(outcomes: Iterable[Outcome]) -> JobResult:
    """Count outcomes; failures inside an item that went on without them are failures too."""
    done = skipped = 0
    failed: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            failed[outcome.item_id] = outcome.error
            continue
        result = outcome.result or {}
        done += 1
        skipped += bool(result.get("skipped"))
        for persona, why in result.get("failed", {}).items():
            failed[f"{outcome.item_id}/{persona}"] = why
    return JobResult(done, skipped, failed)


def finish(result: JobResult, most: int = 200) -> int:
    """Say what a job did and what failed, by name; returns its exit status."""
    for note in result.notes[:most]:
        print(f"note: {note}", file=sys.stderr)
    print(f"{result.done} items done, {result.skipped} of them were there already, {len(result.failed)} failed.")
    for number, (name, why) in enumerate(sorted(result.failed.items())[:most]):
        first, *rest = why.splitlines() or ["no reason given"]
        print(f"failed: {name}: {first}", file=sys.stderr)
        for line in rest if number < IN_FULL else ():
            print(f"  {line}", file=sys.stderr)
    if len(result.failed) > most:
        print(f"failed: and {len(result.failed) - most} more", file=sys.stderr)
    return result.exit_status


class Timings:
    """Times and hosts of items, in `timings.jsonl` of the run an item belongs to. Never part of a compared file.

    Written every few seconds, so that a job that is killed loses the last of them alone. Of a training the names of its
    adapters are noted too: so one can tell whether the time of an adapter is among those noted.
    """

    def __init__(self, project: Project, items: Iterable[Item] = (), every_s: float = FLUSH_S) -> None:
        self._project = project
        self._every_s = every_s
        self._written = time.monotonic()
        self._adapters: dict[str, list[str]] = {}
        self._lines: dict[str, list[str]] = {}
        self.expect(items)

    def expect(self, items: Iterable[Item]) -> None:
        """Remember of items to come what their outcomes do not tell."""
        for item in items:
            if isinstance(item.payload, TrainTask | PrefixTask):
                self._adapters[item.id] = [group.name for group in item.payload.groups]

    def note(self, outcome: Outcome) -> None:
        """Note an item that was really done."""
        if outcome.error is None and not (outcome.result or {}).get("skipped"):
            step, _, rest = outcome.item_id.partition("/")
            in_run = step in ("merge", "evaluate", "validate", "tune", "gather")
            folder = self._project.run_folder(rest.split("/")[0]) if in_run else self._project.shared_folder()
            spared = (outcome.result or {}).get("spared_s", 0.0)  # seconds of workers before it, from their checkpoint
            record: dict[str, Any] = {"item": outcome.item_id, "seconds": round(outcome.seconds + spared, 3)}
            record["host"] = outcome.host
            if outcome.item_id in self._adapters:
                record["adapters"] = self._adapters[outcome.item_id]
            line = json.dumps(record, sort_keys=True)
            self._lines.setdefault(storage.join(folder, "timings.jsonl"), []).append(line)
        if time.monotonic() - self._written >= self._every_s:
            with suppress(OSError):  # times are worth no job: what could not be written is tried again with the next
                self.flush()

    def flush(self) -> None:
        """Write what was noted and is not written yet."""
        self._written = time.monotonic()
        for location in list(self._lines):
            before = storage.read_bytes(location).decode() if storage.exists(location) else ""
            storage.write_bytes(location, (before + "\n".join(self._lines[location]) + "\n").encode())
            del self._lines[location]


@dataclass(frozen=True)
class Timing:
    """Seconds an item took the last time it was really done, and the adapters it trained."""

    seconds: float
    adapters: tuple[str, ...] = ()


def read_timings(folder: str) -> dict[str, Timing]:
    """What is noted of each item of a folder."""
    location = storage.join(folder, "timings.jsonl")
    if not storage.exists(location):
        return {}
    records = [json.loads(line) for line in storage.read_bytes(location).decode().splitlines()]
    return {r["item"]: Timing(float(r["seconds"]), tuple(r.get("adapters", ()))) for r in records}
