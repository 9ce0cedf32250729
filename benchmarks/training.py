"""LoRA training: many adapters at once and one alone, against PEFT + transformers.Trainer, and the floor.

    python benchmarks/training.py --json training.json                        all of it: some minutes
    python benchmarks/training.py --adapters 4 --sample 2 --epochs 1 --steps 1 --rounds 1                does it run
    python benchmarks/training.py --device cuda --dtype bfloat16 --base 768x12x16384 --alone 768x12x16384     on a GPU

many     persona adapters on 30 rows of the demo's world each: ours in items of 25 on as many one-threaded processes
         as there are cores; Trainer's one at a time, in as many processes or in one with all threads, and with those
         of its settings that are quickest here. Same rows, steps, rows in a step and optimiser. Ours are all timed, by
         the clock; of Trainer's a sample, before and after ours, and extrapolated by their mean time over processes
         that never wait; tokenising is free for it.
unequal  adapters of 5 to 60 rows, most of them few, against our own training one at a time: of a sample, longest
         first, and extrapolated by steps over processes that never wait.
alone    one adapter, tokens a second of one process. Before that both train on the same rows in the same order from
         the same factors, and their losses and adapters must agree. Trainer has the settings that are quickest in
         short trainings, for its whole time and for its own loop each.

A base is hidden x layers x vocabulary; 128x4 is the demo's, and others are trained alone on rows of 256 tokens. Floor:
the multiplications of two passes through the base (forward, gradient of the inputs) and of the factors, at the speed of
a large product in the same processes. Memory is the peak of a process above that of the loaded base: resident, or
allocated on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from peft_trainer import Choices, candidates
from training_crew import (
    Crew,
    Done,
    Job,
    Place,
    Rows,
    Size,
    by_peft,
    by_us,
    compare_work,
    floor_operations,
    long_rows,
    peak_speed,
    unequal_rows,
    world_rows,
)
from training_table import WIDTH, show_alone, show_many, show_unequal

from raymerge.models.training import TrainingSettings, steps_of

PARTS = ("many", "unequal", "alone")
ITEM = 25  # adapters of an item, as in the demo
Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Where, on how many processes at once, how often, and what an adapter's training is."""

    place: Place
    processes: int
    rounds: int
    sample: int
    settings: TrainingSettings


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    arguments = _arguments()
    place = Place(arguments.device, arguments.dtype, 1)
    processes = arguments.processes if arguments.device == "cpu" else 1
    settings = TrainingSettings(rank=8, alpha=16, epochs=arguments.epochs, batch_size=6, learning_rate=4e-3)
    plan = Plan(place, processes, arguments.rounds, arguments.sample, settings)
    device = "" if arguments.device == "cpu" else f", {torch.cuda.get_device_name()}"
    kind = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    machine = f"{kind}{device}, torch {torch.__version__}"
    command = " ".join(["python", *sys.argv])
    print(f"{textwrap.fill(command, WIDTH)}\n{machine}, {place.dtype}\n")
    results: Found = {}
    if "many" in arguments.parts:
        results["many"] = measure_many(plan, arguments.base, world_rows()[: arguments.adapters])
        show_many(results["many"])
    if "unequal" in arguments.parts:
        results["unequal"] = measure_unequal(plan, arguments.base, unequal_rows(arguments.adapters))
        show_unequal(results["unequal"])
    for size in arguments.alone if "alone" in arguments.parts else ():
        alone = replace(plan, place=replace(place, threads=arguments.threads))
        results[f"alone {size}"] = measure_alone(alone, size, arguments.steps)
        show_alone(results[f"alone {size}"])
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "command": command, "results": results}, file, indent=1, sort_keys=True)


def measure_many(plan: Plan, size: Size, groups: Sequence[tuple[str, Rows]]) -> Found:
    """Seconds of all adapters by us, and by Trainer from a sample of them."""
    single = [Job((group,), plan.settings) for group in groups]
    items = [(item,) for item in _items(plan, groups)]
    ours: list[float] = []
    theirs: list[Done] = []
    with Crew(size, plan.place, plan.processes) as crew:
        crew.each(by_us, Job(tuple(groups[:2]), replace(plan.settings, epochs=1)))
        peft, choices, tried = quickest(plan, size, single)
        sample = [(job, choices) for job in _spread(single, plan.sample, 2 * peft.count)]
        with peft:
            for _ in range(plan.rounds):
                theirs += peft.deal(by_peft, sample[::2])[1]
                seconds, done = crew.deal(by_us, items)
                ours.append(seconds)
                theirs += peft.deal(by_peft, sample[1::2])[1]
            memory = {"ours": crew.peak(), "theirs": peft.peak()}
        floor = _floor(crew, Job(tuple(groups), plan.settings))
    mine = statistics.median(ours)
    each = len(groups) / len(theirs) / peft.count
    whole, loop = sum(d.seconds for d in theirs) * each, sum(d.loop for d in theirs) * each
    return floor | {
        "base": str(size), "adapters": len(groups), "steps": steps_of(len(groups[0][1]), plan.settings),
        "sample": len(sample), "rounds": plan.rounds, "item": len(items[0][0].groups),
        "ours_in": [plan.processes, plan.place.threads], "theirs_in": [peft.count, _threads(plan, peft.count)],
        "theirs": str(choices), "tried_s": tried, "ours_s": mine, "theirs_s": whole, "theirs_loop_s": loop,
        "ratio": whole / mine, "ratio_to_loop": loop / mine, "padding": _padding(done), "memory_mib": memory,
        "ratio_busy": _busy(theirs) / len(theirs) * len(groups) / _busy(done),
    }  # fmt: skip


def quickest(plan: Plan, size: Size, jobs: Sequence[Job]) -> tuple[Crew, Choices, dict[str, float]]:
    """The processes and settings in which Trainer is quickest, and the seconds of a short training in all tried."""
    places = {count: replace(plan.place, threads=_threads(plan, count)) for count in (plan.processes, 1)}
    crews = {count: Crew(size, place, count) for count, place in places.items()}
    short = [Job(job.groups, replace(job.settings, epochs=min(2, job.settings.epochs))) for job in jobs]
    tried: dict[tuple[int, Choices], float] = {}
    for count, crew in crews.items():
        crew.each(by_peft, short[0], Choices())
        ways = candidates(plan.place.device, plan.place.dtype) if not tried else [min(tried, key=tried.__getitem__)[1]]
        seconds: dict[Choices, list[float]] = {way: [] for way in ways}
        for _ in range(3):
            for way in ways:
                seconds[way].append(crew.deal(by_peft, [(job, way) for job in short[:count]])[0] / len(short[:count]))
        tried |= {(count, way): statistics.median(taken) for way, taken in seconds.items()}
    count, choices = min(tried, key=tried.__getitem__)
    for other, crew in crews.items():
        if other != count:
            crew.close()
    named = {f"{c} x {_threads(plan, c)}, {way}": seconds for (c, way), seconds in tried.items()}
    return crews[count], choices, named


def measure_unequal(plan: Plan, size: Size, groups: Sequence[tuple[str, Rows]]) -> Found:
    """Seconds of adapters of unequal size by us, together and, from a sample, one at a time."""
    longest_first = sorted(groups, key=lambda group: -len(group[1]))
    settings = replace(plan.settings, together=1)
    sample = [(Job((group,), settings),) for group in _spread(longest_first, 2 * plan.sample, plan.processes)]
    together: list[float] = []
    apart: list[Done] = []
    with Crew(size, plan.place, plan.processes) as crew:
        crew.each(by_us, Job(tuple(groups[:2]), replace(plan.settings, epochs=1)))
        for _ in range(plan.rounds):
            apart += crew.deal(by_us, sample)[1]
            seconds, done = crew.deal(by_us, [(item,) for item in _items(plan, groups)])
            together.append(seconds)
            apart += crew.deal(by_us, sample)[1]
        floor = _floor(crew, Job(tuple(groups), plan.settings))
    steps = sum(steps_of(len(rows), plan.settings) for _, rows in groups)
    seen = sum(steps_of(len(rows), plan.settings) for (job,) in sample for _, rows in job.groups)
    sizes = [len(rows) for _, rows in longest_first]
    mine = statistics.median(together)
    single = sum(d.seconds for d in apart) / (2 * plan.rounds * seen) * steps / plan.processes
    return floor | {
        "base": str(size), "adapters": len(groups), "rows": [sizes[-1], statistics.median(sizes), sizes[0]],
        "steps": steps, "sample": len(sample), "sample_steps": seen, "rounds": plan.rounds,
        "in": [plan.processes, plan.place.threads], "together_s": mine, "one_at_a_time_s": single,
        "ratio": single / mine, "padding": _padding(done),
        "ratio_busy": _busy(apart) / (2 * plan.rounds * seen) * steps / _busy(done),
    }  # fmt: skip


def measure_alone(plan: Plan, size: Size, steps: int) -> Found:
    """Tokens a second of one adapter, by us and by Trainer, after a proof that both do the same."""
    settings, rows = plan.settings, world_rows()[0][1]
    if str(size) != "128x4":
        settings = replace(settings, epochs=1, batch_size=4, learning_rate=2e-4)
        rows = long_rows(settings.batch_size * steps)
    job = Job((("alone", rows),), settings)
    with Crew(size, plan.place, 1) as crew, Crew(size, plan.place, 1) as peft:
        losses, learned = crew.each(compare_work, rows, replace(settings, epochs=min(10, max(2, steps))))[0]
        _require_same(losses, learned, plan.place.dtype)
        crew.each(by_us, job)
        part = replace(settings, epochs=min(5, settings.epochs))
        tried = _tried(
            peft,
            Job((("alone", rows[: 2 * settings.batch_size]),), part),
            candidates(plan.place.device, plan.place.dtype),
        )
        best = dict.fromkeys(min(tried, key=lambda way: tried[way][kind]) for kind in (0, 1))
        ours: list[Done] = []
        theirs: dict[Choices, list[Done]] = {way: [] for way in best}
        for _ in range(max(3, plan.rounds)):
            ours += crew.each(by_us, job)
            for way in best:
                theirs[way] += peft.each(by_peft, job, way)
        memory = {"ours": crew.peak(), "theirs": peft.peak()}
        floor = _floor(crew, job)
    mine, tokens = _medians(ours)[0], ours[0].tokens
    medians = {way: _medians(done) for way, done in theirs.items()}
    whole_way, loop_way = (min(medians, key=lambda way: medians[way][kind]) for kind in (0, 1))
    whole, loop = medians[whole_way][0], medians[loop_way][1]
    return floor | {
        "base": str(size), "in": [1, plan.place.threads], "rounds": len(ours), "tokens": tokens,
        "steps": steps_of(len(rows), settings), "tried_s": {str(way): both for way, both in tried.items()},
        "tried_steps": steps_of(2 * settings.batch_size, part), "ours_s": mine, "theirs_s": whole,
        "theirs_loop_s": loop, "theirs": str(whole_way), "theirs_loop": str(loop_way), "ratio": whole / mine,
        "ratio_to_loop": loop / mine, "losses_apart": losses, "adapters_apart": learned, "memory_mib": memory,
    }  # fmt: skip


def _tried(peft: Crew, job: Job, ways: Sequence[Choices]) -> dict[Choices, tuple[float, float]]:
    """Trainer's whole seconds and its loop's in each way: medians of three in turn, after one that is not counted."""
    peft.each(by_peft, job, Choices())
    done: dict[Choices, list[Done]] = {way: [] for way in ways}
    for _ in range(3):
        for way in ways:
            done[way] += peft.each(by_peft, job, way)
    return {way: _medians(seen) for way, seen in done.items()}


def _medians(done: Sequence[Done]) -> tuple[float, float]:
    return statistics.median(d.seconds for d in done), statistics.median(d.loop for d in done)


def _floor(crew: Crew, job: Job) -> Found:
    """Seconds of a job's operations at the speed of a large product in all processes, and whose product it is."""
    operations = crew.each(floor_operations, job)[0]
    speeds, libraries = zip(*crew.each(peak_speed), strict=True)
    return {"floor_s": operations / sum(speeds), "speed": sum(speeds), "library": ", ".join(sorted(set(libraries)))}


def _threads(plan: Plan, count: int) -> int:
    """Threads of each process when so many share the cores."""
    return max(plan.processes // count, plan.place.threads)


def _require_same(losses: float, learned: float, dtype: str) -> None:
    most = 1e-4 if dtype == "float32" else 5e-2
    if losses > most:
        sys.exit(f"not Trainer's work: losses {losses:.2g} apart, adapters {learned:.2g} ({dtype})")


def _items(plan: Plan, groups: Sequence[tuple[str, Rows]]) -> list[Job]:
    size = ITEM if plan.place.device == "cpu" else len(groups)
    return [Job(tuple(groups[at : at + size]), plan.settings) for at in range(0, len(groups), size)]


def _spread(things: Sequence[Any], count: int, multiple: int) -> list[Any]:
    """So many of them or a few more, evenly spread: a multiple of a number, where there are as many."""
    count = min(-(-count // multiple) * multiple, len(things))
    return [things[(2 * number + 1) * len(things) // (2 * count)] for number in range(count)]


def _busy(done: Sequence[Done]) -> float:
    return sum(d.busy for d in done)


def _padding(done: Sequence[Done]) -> float:
    return 1 - sum(d.tokens for d in done) / sum(d.computed for d in done)


def _size(text: str) -> Size:
    return Size(*(int(part) for part in text.split("x")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--base", type=_size, default=Size(128, 4), help="of many and unequal: hidden x layers")
    parser.add_argument("--alone", type=_size, nargs="+", default=[Size(128, 4), Size(512, 8)], help="bases")
    parser.add_argument("--adapters", type=int, default=200, help="at most 200")
    parser.add_argument("--sample", type=int, default=10, help="of Trainer's adapters, rounded up")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="with rows of 256 tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="on the CPU")
    parser.add_argument("--threads", type=int, default=1, help="of one adapter alone")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
