"""Carry out items, on Ray or in this process, and say what became of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge import storage
from raymerge.config import Hardware, Project
from raymerge.pipelines.opening import Opened
from raymerge.runtime.pool import WorkerKind, run_local, run_on_ray
from raymerge.runtime.progress import Progress
from raymerge.runtime.scheduler import Item, Outcome
from raymerge.runtime.workers import MergeWorker, ModelWorker


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
    """The workers a project asks for."""
    hardware = project.hardware
    merge = WorkerKind(
        "merge", MergeWorker, {"expert_cache": hardware.expert_cache}, count=hardware.max_merge_workers,
        num_cpus=hardware.cpus_per_merge, num_gpus=hardware.gpus_per_merge,
    )  # fmt: skip
    if base_model is None:
        return [merge]
    arguments = {
        "base_model": base_model,
        "name": project.base_model,
        "dtype": hardware.dtype,
        "expert_cache": hardware.expert_cache,
    }
    model = WorkerKind(
        "model", ModelWorker, arguments, count=hardware.max_model_workers,
        num_cpus=hardware.cpus_per_model, num_gpus=hardware.gpus_per_model,
    )  # fmt: skip
    return [merge, model]


def carry_out(
    opened: Opened,
    items: Sequence[Item],
    *,
    follow: Callable[[Outcome], Sequence[Item]] | None = None,
    local: bool = False,
    title: str,
) -> JobResult:
    """Run items to the end. Each settled item is noted in the timings of its run."""
    hardware: Hardware = opened.project.hardware
    kinds = worker_kinds(opened.project, _base(opened))
    runner = run_local if local else run_on_ray
    options: dict[str, Any] = {} if local else {"ready_deadline_s": hardware.ready_deadline}
    outcomes = runner(
        items, kinds, follow=follow, progress=Progress(title), max_attempts=hardware.max_attempts, **options
    )
    write_timings(opened.project, outcomes)
    return summarise(outcomes)


def _base(opened: Opened) -> str | None:
    base = opened.project.base_model
    return opened.project.path(base) if base is not None else None


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


def finish(result: JobResult, most: int = 20) -> int:
    """Say what a job did and what failed, by name; returns its exit status."""
    for note in result.notes[:most]:
        print(f"note: {note}", file=sys.stderr)
    print(f"{result.done} items done, {result.skipped} of them were there already, {len(result.failed)} failed.")
    for name, why in sorted(result.failed.items())[:most]:
        print(f"failed: {name}: {why.splitlines()[0] if why else 'no reason given'}", file=sys.stderr)
    if len(result.failed) > most:
        print(f"failed: and {len(result.failed) - most} more", file=sys.stderr)
    return result.exit_status


def write_timings(project: Project, outcomes: Iterable[Outcome]) -> None:
    """Append times and hosts to `timings.jsonl` of the run an item belongs to. Never part of a compared file."""
    lines: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.error is not None or (outcome.result or {}).get("skipped"):
            continue
        step, _, rest = outcome.item_id.partition("/")
        in_run = step in ("merge", "evaluate", "validate", "gather")
        folder = project.run_folder(rest.split("/")[0]) if in_run else project.shared_folder()
        record = {"item": outcome.item_id, "seconds": round(outcome.seconds, 3), "host": outcome.host}
        lines.setdefault(storage.join(folder, "timings.jsonl"), []).append(json.dumps(record, sort_keys=True))
    for location, new in lines.items():
        before = storage.read_bytes(location).decode() if storage.exists(location) else ""
        storage.write_bytes(location, (before + "\n".join(new) + "\n").encode())


def read_timings(folder: str) -> dict[str, float]:
    """Seconds of each item of a folder, the last time it was really done."""
    location = storage.join(folder, "timings.jsonl")
    if not storage.exists(location):
        return {}
    records = [json.loads(line) for line in storage.read_bytes(location).decode().splitlines()]
    return {record["item"]: float(record["seconds"]) for record in records}
