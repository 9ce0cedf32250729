"""What workers need, and how many of each kind fit on the machines that are there. Pure: no Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raymerge.errors import PoolError

Resources = Mapping[str, float]
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class WorkerKind:
    """A kind of worker.

    factory: the worker's class, called with `arguments` in the worker's process. count: how many at most; None is as
    many as fit. num_cpus, num_gpus: what one takes of the Ray cluster, fractions allowed; num_gpus "auto" is 1 where
    any machine has a GPU, else 0. threads: of its computations; None is num_cpus, at least 1. Kinds that take turns
    may reserve half a CPU each and compute with one thread: then either keeps all cores busy when the other is idle.
    device_argument: the argument of the factory that says where to compute. It is told what the plan reserves, since a
    worker without a GPU of its own may well see those of others.
    """

    name: str
    factory: Callable[..., object]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    count: int | None = 1
    num_cpus: float = 1
    num_gpus: float | Literal["auto"] = 0
    threads: int | None = None
    device_argument: str | None = None

    @property
    def thread_count(self) -> int:
        """Threads of a worker's computations."""
        return self.threads if self.threads is not None else max(1, int(self.num_cpus))

    def arguments_on(self, gpus: float | Literal["auto"]) -> dict[str, Any]:
        """The factory's arguments for a worker with `gpus`: on cuda with any, on cpu with none, else auto."""
        if self.device_argument is None:
            return dict(self.arguments)
        device = "auto" if gpus == "auto" else "cuda" if gpus > 0 else "cpu"
        return {**self.arguments, self.device_argument: device}


@dataclass(frozen=True)
class Needs:
    """What one worker takes of one machine."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return _amounts(self.cpus, self.gpus)


@dataclass(frozen=True)
class WorkerPlan:
    """How many workers of each kind to start, what each takes, and what a person should know of it."""

    counts: Mapping[str, int]
    needs: Mapping[str, Needs]
    notes: tuple[str, ...]


def plan_workers(kinds: Sequence[WorkerKind], nodes: Sequence[Resources]) -> WorkerPlan:
    """How many workers of each kind fit on the machines: one of each first, then one more of each in turn.

    nodes: what each machine has in all, as Ray reports it ({"CPU": 2.0, "GPU": 1.0, ...}); a worker never spans two.
    Raises PoolError, with what was asked and what is there, if not even one of each kind fits beside the others.
    """
    has_gpu = any(node.get("GPU", 0) >= 1 for node in nodes)
    needs = {kind.name: _needs(kind, has_gpu) for kind in kinds}
    free = [{"CPU": float(node.get("CPU", 0)), "GPU": float(node.get("GPU", 0))} for node in nodes]
    counts = dict.fromkeys(needs, 0)
    for name in sorted(needs, key=lambda name: (-needs[name].gpus, -needs[name].cpus)):  # the large ones fit worst
        if not _place(needs[name], free):
            raise PoolError(_too_small(name, needs, nodes))
        counts[name] = 1
    growing = [kind for kind in kinds if kind.count is None or kind.count > 1]
    while growing:
        for kind in list(growing):
            if not _place(needs[kind.name], free):
                growing.remove(kind)
                continue
            counts[kind.name] += 1
            if counts[kind.name] == kind.count:
                growing.remove(kind)
    notes = tuple(
        f"{kind.count} workers of kind {kind.name} asked for, {counts[kind.name]} started: the Ray cluster has "
        f"{_total(nodes)}, one takes {needs[kind.name]}"
        for kind in kinds
        if kind.count is not None and counts[kind.name] < kind.count
    )
    return WorkerPlan(counts, needs, notes)


def plan_autoscaling(kinds: Sequence[WorkerKind]) -> WorkerPlan:
    """Every worker that is counted, for a Ray cluster that grows with what is asked of it.

    Raises PoolError for a kind that is not counted, or takes GPUs by what is there: what is there says nothing yet.
    """
    for kind in kinds:
        if kind.count is None or kind.num_gpus == "auto":
            key = f"max_{kind.name}_workers" if kind.count is None else f"gpus_per_{kind.name}"
            raise PoolError(
                f"workers of kind {kind.name}: how much an autoscaling Ray cluster grows must be said\n"
                f"Give hardware.{key} as a number in the project file."
            )
    counts = {kind.name: kind.count or 1 for kind in kinds}
    return WorkerPlan(counts, {kind.name: _needs(kind, has_gpu=False) for kind in kinds}, ())


def _needs(kind: WorkerKind, has_gpu: bool) -> Needs:
    gpus = (1.0 if has_gpu else 0.0) if kind.num_gpus == "auto" else float(kind.num_gpus)
    needs = Needs(float(kind.num_cpus), gpus)
    if needs.cpus < 0 or needs.gpus < 0 or (kind.count is not None and kind.count < 1):
        raise PoolError(f"worker kind {kind.name}: cannot have {kind.count} workers with {needs} each")
    if kind.count is None and not needs.cpus and not needs.gpus:
        raise PoolError(f"worker kind {kind.name}: takes nothing, so any number fits; give a count")
    return needs


def _place(needs: Needs, free: list[dict[str, float]]) -> bool:
    """Take `needs` from the machine that has the least GPUs left, then the least CPUs: GPUs stay whole for others."""
    fits = [n for n in free if n["CPU"] + _TOLERANCE >= needs.cpus and n["GPU"] + _TOLERANCE >= needs.gpus]
    if not fits:
        return False
    node = min(fits, key=lambda n: (n["GPU"], n["CPU"]))
    node["CPU"] -= needs.cpus
    node["GPU"] -= needs.gpus
    return True


def _too_small(name: str, needs: Mapping[str, Needs], nodes: Sequence[Resources]) -> str:
    asked = "; ".join(f"a {kind} worker takes {need}" for kind, need in needs.items())
    there = "; ".join(_amounts(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes) or "no machine"
    return (
        f"workers of kind {name}: not even one fits on the Ray cluster\n"
        f"Asked for: {asked}, one of each at least, each on one machine.\n"
        f"There is, machine by machine: {there}.\n"
        "Lower what a worker takes under `hardware` in the project file, add machines, or run with --local.\n"
        "Where machines are added as they are asked for, set hardware.autoscaling."
    )


def _total(nodes: Sequence[Resources]) -> str:
    return _amounts(sum(node.get("CPU", 0) for node in nodes), sum(node.get("GPU", 0) for node in nodes))


def _amounts(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
