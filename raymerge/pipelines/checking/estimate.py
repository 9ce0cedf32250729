"""What a run would take: its steps with their operations, bytes and hours, and how they fall to the workers.

Counts come from what is missing: adapters that are there are not trained, runs that are scored are not scored again.
Seconds come from earlier items of the same project where there are some (`timings.jsonl`), from a calibration, or from
speeds that are assumed, and then say no more than the order of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.pipelines.job import Timing

# Operations per second where nothing was measured: a thread of a server's CPU in float32, and a GPU of a data centre in
# bfloat16, at the third of its peak that training of adapters reaches with a base of a billion weights or more.
CPU_THREAD, GPU = 4e10, 1e14
READ_S = 5e8  # bytes a second from a disk or a bucket
ITEM_S = 0.05  # seconds that an item takes besides: digests, a marker, the way to the worker

Source = Literal["measured", "calibrated", "assumed"]


@dataclass(frozen=True)
class Step:
    """One step of a run. items: what is dealt to the workers; largest: the share of the largest in the work. there: how
    many results of the step are there already. operations, nbytes: of what is to do; nbytes is at most that much where
    `bound`. encoding: operations of a sentence encoder, besides. fixed_s: seconds that no operation explains.
    measured_s: of all its items, by earlier ones like them.
    """

    name: str
    worker: Literal["model", "merge", "driver"]
    makes: int
    items: int
    there: int
    operations: float
    nbytes: int
    largest: float = 0.0
    bound: bool = False
    encoding: float = 0.0
    fixed_s: float = 0.0
    measured_s: float | None = None

    def seconds(self, speed: float, encoder: float) -> float:
        """Of one worker with so many operations per second, of the model and of the encoder."""
        if self.measured_s is not None:
            return self.measured_s
        return self.operations / speed + self.encoding / encoder + self.fixed_s


@dataclass(frozen=True)
class Speeds:
    """Operations per second of one model worker in training, in answering and with the encoder, and of a merge worker;
    and where the first two come from."""

    train: float
    answer: float
    encode: float
    merge: float = CPU_THREAD
    source: Source = "assumed"

    def of(self, step: Step) -> float:
        """Of the worker that a step takes."""
        if step.worker != "model":
            return self.merge
        return self.train if step.name.startswith("train") else self.answer


@dataclass(frozen=True)
class Estimate:
    """All steps, the workers of each kind, and how fast they are taken to be. device: cpu or gpu, of model workers.
    elsewhere: whether the number of workers is that of this machine, since the Ray cluster's is not known."""

    steps: tuple[Step, ...]
    workers: Mapping[str, int]
    speeds: Speeds
    device: Literal["cpu", "gpu"]
    notes: tuple[str, ...] = ()

    def alone(self, step: Step) -> float:
        """Seconds of a step on one worker."""
        return step.seconds(self.speeds.of(step), self.speeds.encode)

    def elapsed(self, step: Step) -> float:
        """Seconds of a step on all its workers: no less than its largest item takes."""
        workers = max(1, min(self.workers.get(step.worker, 1), step.items))
        return max(self.alone(step) / workers, self.alone(step) * step.largest)

    def source(self, step: Step) -> Source:
        """Where a step's seconds come from."""
        if step.measured_s is not None:
            return "measured"
        return self.speeds.source if step.worker == "model" else "assumed"

    @property
    def total_s(self) -> float:
        """Seconds of all steps one after the other; they overlap in part."""
        return sum(self.elapsed(step) for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """As mappings and lists."""
        return {
            "steps": [
                {
                    "name": step.name,
                    "makes": step.makes,
                    "items": step.items,
                    "there": step.there,
                    "operations": step.operations + step.encoding,
                    "bytes": step.nbytes,
                    "bytes_at_most": step.bound,
                    "worker": step.worker,
                    "worker_seconds": self.alone(step),
                    "seconds": self.elapsed(step),
                    "source": self.source(step),
                }
                for step in self.steps
            ],
            "workers": dict(self.workers),
            "device": self.device,
            "operations_per_second": {"train": self.speeds.train, "answer": self.speeds.answer},
            "seconds": self.total_s,
            "notes": list(self.notes),
        }


def assumed_speeds(device: Literal["cpu", "gpu"], threads: int) -> Speeds:
    """Speeds where nothing was measured."""
    speed = GPU if device == "gpu" else CPU_THREAD * threads
    return Speeds(speed, speed, speed)


def measured_training(timings: Mapping[str, Timing], work: Mapping[str, float], to_do: float) -> float | None:
    """Seconds of `to_do` operations of training at the speed of the trainings noted. work: operations by adapter."""
    noted = [(t, sum(work.get(a, 0.0) for a in t.adapters)) for i, t in timings.items() if i.startswith("train/")]
    seconds = sum(timing.seconds for timing, done in noted if done)
    done = sum(done for _, done in noted)
    return to_do * seconds / done if done and seconds else None


def measured_items(timings: Sequence[Mapping[str, Timing]], prefixes: tuple[str, ...], items: int) -> float | None:
    """Seconds of so many items, each as long as those noted are on average."""
    noted = [t.seconds for one in timings for item, t in one.items() if item.startswith(prefixes)]
    return items * math.fsum(noted) / len(noted) if noted else None
