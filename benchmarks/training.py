"""LoRA training: many adapters at once and one alone, against PEFT + transformers.Trainer, and the floor.

    python benchmarks/training.py --json training.json                        all of it: some minutes
    python benchmarks/training.py --adapters 4 --sample 2 --epochs 1 --steps 1 --rounds 1                does it run
    python benchmarks/training.py --device cuda --dtype bfloat16 --base 768x12x16384 --alone 768x12x16384     on a GPU

many     persona adapters on 30 rows of the demo's world each: ours in items of 25 on as many one-threaded processes
         as there are cores; Trainer's one at a time, in as many processes or in one with all threads, and with those
         of its settings that are quickest here. Same rows, steps, rows in a step and optimiser. Of Trainer's adapters
         a sample is timed, before and after ours, and multiplied; ours are trained in full.
unequal  adapters of 5 to 60 rows, most of them few, against our own training one at a time (of a sample, by steps).
alone    one adapter, tokens a second of one process. Before that both train on the same rows in the same order from
         the same factors, and their losses and adapters must agree.

A base is hidden x layers x vocabulary; 128x4 is the demo's, and others are trained alone on rows of 256 tokens. Floor
of many: the multiplications of two passes through the base (forward, gradient of the inputs) and of the factors, at the
speed of a large product in the same processes. Memory is the peak of a process above that of the loaded base: resident,
or allocated on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from peft_trainer import Choices
from training_crew import (
    Crew,
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
    arguments = _arguments()
    place = Place(arguments.device, arguments.dtype, 1)
    processes = arguments.processes if arguments.device == "cpu" else 1
    settings = TrainingSettings(rank=8, alpha=16, epochs=arguments.epochs, batch_size=6, learning_rate=4e-3)
    plan = Plan(place, processes, arguments.rounds, arguments.sample, settings)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if arguments.device != "cpu":
        machine += f", {torch.cuda.get_device_name()}"
    machine += f", torch {torch.__version__}"
    command = " ".join(["python", *sys.argv])
    print(f"{command}\n{machine}\n", flush=True)
    results: Found = {}
    if "many" in arguments.parts:
        results["many"] = measure_many(plan, arguments.base, world_rows()[: arguments.adapters])
        show_many(results["many"], arguments.base)
    if "unequal" in arguments.parts:
        results["unequal"] = measure_unequal(plan, arguments.base, unequal_rows(arguments.adapters))
        show_unequal(results["unequal"])
    for size in arguments.alone if "alone" in arguments.parts else ():
        alone = replace(plan, place=replace(place, threads=arguments.threads))
        results[f"alone {size}"] = measure_alone(alone, size, arguments.steps)
        show_alone(results[f"alone {size}"], size, arguments.threads)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "command": command, "results": results}, file, indent=1, sort_keys=True)


def measure_many(plan: Plan, size: Size, groups: Sequence[tuple[str, Rows]]) -> Found:
    """Seconds of all adapters by us, and by Trainer from a sample of them."""
    single = [Job((group,), plan.settings) for group in groups]
    items = _items(plan, groups)
    ours: list[float] = []
    theirs: list[float] = []
    loops: list[float] = []
    timed = 0
    with Crew(size, plan.place, plan.processes) as crew:
        crew.each(by_us, Job(tuple(groups[:2]), replace(plan.settings, epochs=1)))
        peft, choices, tried = quickest(plan, size, single)
        sample = [(job, choices) for job in _spread(single, plan.sample)]
        with peft:
            for _ in range(plan.rounds):
                for part in (sample[::2], sample[1::2]):
                    if len(theirs) % 2:
                        seconds, done = crew.deal(by_us, [(item,) for item in items])
                        ours.append(seconds)
                    if part:
                        seconds, results = peft.deal(by_peft, part)
                        theirs.append(seconds)
                        loops.append(seconds * sum(r.loop for r in results) / sum(r.seconds for r in results))
                        timed += len(part)
            their_peak = peft.peak()
        speed = sum(crew.each(peak_speed))
        operations = crew.each(floor_operations, Job(tuple(groups), plan.settings))[0]
        mine, peak = statistics.median(ours), crew.peak()
    whole, loop = (sum(seconds) * len(groups) / timed for seconds in (theirs, loops))
    return {
        "adapters": len(groups), "sample": len(sample), "steps": steps_of(len(groups[0][1]), plan.settings),
        "theirs": f"{peft.count} x {plan.processes // peft.count} threads, {_said(choices)}", "tried_s": tried,
        "ours_s": mine, "theirs_s": whole, "theirs_loop_s": loop, "floor_s": operations / speed,
        "ratio": whole / mine, "ratio_to_loop": loop / mine, "speed": speed, "padding": _padding(done),
        "processes": plan.processes, "memory_mib": {"ours": peak, "theirs": their_peak},
    }  # fmt: skip


def quickest(plan: Plan, size: Size, jobs: Sequence[Job]) -> tuple[Crew, Choices, dict[str, float]]:
    """The processes and settings in which Trainer is quickest, and the seconds of a short training in all tried."""
    places = {plan.processes: plan.place, 1: replace(plan.place, threads=max(plan.processes, plan.place.threads))}
    crews = {count: Crew(size, place, count) for count, place in places.items()}
    short = [Job(job.groups, replace(job.settings, epochs=min(2, job.settings.epochs))) for job in jobs]
    tried: dict[tuple[int, Choices], float] = {}
    for count, crew in crews.items():
        crew.each(by_peft, short[0], Choices())
        for choices in candidates(plan.place) if not tried else [min(tried, key=lambda way: tried[way])[1]]:
            part = [(job, choices) for job in short[:count]]
            tried[count, choices] = min(crew.deal(by_peft, part)[0] / len(part) for _ in range(2))
    count, choices = min(tried, key=lambda way: tried[way])
    for other, crew in crews.items():
        if other != count:
            crew.close()
    named = {f"{c} x {plan.processes // c} threads, {_said(way)}": seconds for (c, way), seconds in tried.items()}
    return crews[count], choices, named


def candidates(place: Place) -> list[Choices]:
    """Trainer's settings that leave the task as it is."""
    if place.device == "cpu":
        return [Choices(), Choices(fused=False), Choices(by_length=True)]
    kinds = [Choices()]
    if place.dtype != "float32":
        kinds += [Choices(autocast=True), Choices(plain_factors=True)]
    return [replace(kind, by_length=by_length) for kind in kinds for by_length in (False, True)]


def measure_unequal(plan: Plan, size: Size, groups: Sequence[tuple[str, Rows]]) -> Found:
    """Seconds of adapters of unequal size by us, together and, from a sample, one at a time."""
    by_size = sorted(groups, key=lambda group: len(group[1]))
    alone = replace(plan.settings, together=1)
    sample = [(Job((group,), alone),) for group in _spread(by_size, 2 * plan.sample)]
    together: list[float] = []
    apart: list[float] = []
    with Crew(size, plan.place, plan.processes) as crew:
        crew.each(by_us, Job(tuple(groups[:2]), replace(plan.settings, epochs=1)))
        for _ in range(plan.rounds):
            apart.append(crew.deal(by_us, sample)[0])
            seconds, done = crew.deal(by_us, [(item,) for item in _items(plan, groups)])
            together.append(seconds)
            apart.append(crew.deal(by_us, sample)[0])
    steps = sum(steps_of(len(rows), plan.settings) for _, rows in groups)
    seen = sum(steps_of(len(rows), plan.settings) for (job,) in sample for _, rows in job.groups)
    sizes = [len(rows) for _, rows in by_size]
    mine, single = statistics.median(together), statistics.median(apart) * steps / seen
    return {
        "adapters": len(groups), "rows": [sizes[0], statistics.median(sizes), sizes[-1]], "steps": steps,
        "sample": len(sample), "together_s": mine, "one_at_a_time_s": single, "ratio": single / mine,
        "padding": _padding(done), "processes": plan.processes,
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
        short = Job((("alone", rows[: 2 * settings.batch_size]),), replace(settings, epochs=1))
        peft.each(by_peft, short, Choices())
        tried = {way: peft.each(by_peft, short, way)[0].seconds for way in candidates(plan.place)}
        choices = min(tried, key=lambda way: tried[way])
        ours, theirs = [], []
        for _ in range(max(3, plan.rounds)):
            ours += crew.each(by_us, job)
            theirs += peft.each(by_peft, job, choices)
        memory = {"ours": crew.peak(), "theirs": peft.peak()}
    mine, whole = (statistics.median(done.seconds for done in way) for way in (ours, theirs))
    loop, tokens = statistics.median(done.loop for done in theirs), ours[0].tokens
    return {
        "ours_tokens_per_s": tokens / mine, "theirs_tokens_per_s": tokens / whole,
        "theirs_loop_tokens_per_s": tokens / loop, "ratio": whole / mine, "ratio_to_loop": loop / mine,
        "steps": steps_of(len(rows), settings), "tokens": tokens, "theirs": _said(choices),
        "losses_apart": losses, "adapters_apart": learned, "memory_mib": memory,
    }  # fmt: skip


def _require_same(losses: float, learned: float, dtype: str) -> None:
    most = 1e-4 if dtype == "float32" else 5e-2
    if losses > most:
        sys.exit(
            f"our losses and Trainer's are {losses:.2g} apart ({dtype}; adapters {learned:.2g}): not the same work"
        )


def _items(plan: Plan, groups: Sequence[tuple[str, Rows]]) -> list[Job]:
    size = ITEM if plan.place.device == "cpu" else len(groups)
    return [Job(tuple(groups[at : at + size]), plan.settings) for at in range(0, len(groups), size)]


def _spread(things: Sequence[Any], count: int) -> list[Any]:
    """So many of them, evenly spread."""
    count = min(count, len(things))
    return [things[(2 * number + 1) * len(things) // (2 * count)] for number in range(count)]


def _padding(done: Sequence[Any]) -> float:
    return 1 - sum(d.tokens for d in done) / sum(d.computed for d in done)


def _said(choices: Choices) -> str:
    return ", ".join(name for name, value in asdict(choices).items() if value) or "plain AdamW"


def show_many(found: Mapping[str, Any], size: Size) -> None:
    count = found["adapters"]
    print(f"many: {count} adapters of {found['steps']} steps, base {size}, {found['processes']} processes")
    for name, key in (
        ("ours", "ours_s"), ("PEFT + Trainer, one at a time", "theirs_s"),
        ("  of it trainer.train()'s own loop", "theirs_loop_s"), ("floor: multiplications", "floor_s"),
    ):  # fmt: skip
        print(f"  {name:38s} {found[key]:9.1f} s {found[key] / count * 1000:9.0f} ms an adapter")
    print(f"  Trainer from a sample of {found['sample']}; quickest: {found['theirs']}")
    for name, seconds in found["tried_s"].items():
        print(f"    tried {name:36s} {seconds * 1000:9.0f} ms for a short training")
    print(f"  ratio {found['ratio']:.2f} (2 asked; to its loop alone {found['ratio_to_loop']:.2f})", end="")
    print(f"; ours takes {found['ours_s'] / found['floor_s']:.2f} times the floor; padding {found['padding']:.1%}")
    _show_memory(found)


def show_unequal(found: Mapping[str, Any]) -> None:
    least, median, most = found["rows"]
    print(
        f"unequal: {found['adapters']} adapters of {least} to {most} rows (median {median:g}), {found['steps']} steps"
    )
    print(f"  ours, together                         {found['together_s']:9.1f} s; padding {found['padding']:.1%}")
    print(f"  ours, one at a time                    {found['one_at_a_time_s']:9.1f} s, from {found['sample']} of them")
    print(f"  gain {found['ratio']:.2f}\n", flush=True)


def show_alone(found: Mapping[str, Any], size: Size, threads: int) -> None:
    print(f"alone: one adapter, {found['steps']} steps, {found['tokens']} tokens, base {size}, {threads} threads")
    for name, key in (
        ("ours", "ours_tokens_per_s"), ("PEFT + Trainer", "theirs_tokens_per_s"),
        ("  its loop alone", "theirs_loop_tokens_per_s"),
    ):  # fmt: skip
        print(f"  {name:38s} {found[key]:9.0f} tokens/s")
    print(
        f"  ratio {found['ratio']:.2f} (0.9 asked; to its loop alone {found['ratio_to_loop']:.2f}); {found['theirs']}"
    )
    print(f"  same work: losses apart {found['losses_apart']:.1e}, adapters {found['adapters_apart']:.1e}")
    _show_memory(found)


def _show_memory(found: Mapping[str, Any]) -> None:
    ours, theirs = found["memory_mib"]["ours"], found["memory_mib"]["theirs"]
    print(
        f"  peak above the loaded base, a process: ours {ours:.0f} MiB, PEFT + Trainer {theirs:.0f} MiB\n", flush=True
    )


def _size(text: str) -> Size:
    return Size(*(int(part) for part in text.split("x")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=["many", "unequal", "alone"], choices=["many", "unequal", "alone"]
    )
    parser.add_argument("--base", type=_size, default=Size(128, 4), help="of many and unequal: hidden x layers")
    parser.add_argument("--alone", type=_size, nargs="+", default=[Size(128, 4), Size(512, 8)], help="bases")
    parser.add_argument("--adapters", type=int, default=200, help="at most 200")
    parser.add_argument("--sample", type=int, default=10, help="of Trainer's adapters")
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
