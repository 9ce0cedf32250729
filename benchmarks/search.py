"""What `raymerge search` costs and gains: five figures on a demo world, all of one run.

    python benchmarks/search.py --world demo --out search_benchmark --json search.json
    python benchmarks/search.py --only overhead workers                              # on a quick world it makes itself
    python benchmarks/search.py --world demo --trials 4 --personas 20 --seeds 2      # does it run

overhead  seconds of a trial on Ray besides generation and scoring: with all scores known (`--restart`), and with items
          that return at once; beside them the study alone, without Ray (floor)
tpe       best validation similarity after --trials trials of TPE, less that of random ones, over --seeds seeds
evolve    trials an hour against the way of mergekit-evolve (search_evolve.py): the same candidates, personas, examples
          and cores, one thread for each of --workers workers; the scores of both have to agree
workers   trials an hour of two model workers against one, and the same where an evaluation is a sleep
winner    the winner's similarity on test examples beside the recipes that were set by hand

Rates are taken when all workers are up and busy: trials that end after the first --workers + 1 did, by the time since.
The world is copied into --out and nothing is written elsewhere. Scores stay known there, so that a figure which asks
for the same again (`--only tpe`) goes on where it was; figures that are times begin with nothing known.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import search_evolve as evolve
from search_world import Bench, Clock

from raymerge.pipelines.opening import open_project
from raymerge.runtime.kinds import WorkerKind
from raymerge.runtime.scheduler import Item
from raymerge.runtime.tune import search_here
from raymerge.search.records import Figures
from raymerge.search.results import read_summary

AT_ONCE_ITEMS = 60  # trials whose items return at once
SLEEP_S = 0.5
FIXED = {"strategy": "top_k", "self_weight": 0, "scale": 1.5, "rank": "exact"}  # what mergekit computes too


class Sleeper:
    """A worker whose work is to wait."""

    def rest(self, seconds: float) -> dict[str, Any]:
        """Take so long."""
        if seconds:
            time.sleep(seconds)
        return {}


@dataclass(frozen=True)
class SleepScorer:
    """Scores a point by an item that takes so many seconds."""

    seconds: float
    rungs: tuple[int, ...] = (1,)

    def score(self, values: Mapping[str, Any], rung: int, carry_out: Callable[[Sequence[Item]], Any]) -> Figures:
        carry_out([Item(uuid.uuid4().hex, "model", "rest", self.seconds)])
        return Figures(1, {"similarity": -abs(float(values["temperature"]) - 0.1)})


def overhead(bench: Bench) -> dict[str, Any]:
    """Seconds of a trial besides generation and scoring."""
    trials = max(6, bench.arguments.trials // 3)
    scorer, kinds = bench.scorer("overhead", bench.workers)
    found: dict[str, Any] = {"trials": trials}
    for name in ("nothing known", "all known"):  # one at a time, since only then the second proposes the same
        study = bench.study(scorer, trials=trials)
        clock = bench.run(study, scorer, kinds, concurrency=1)
        found[f"seconds a trial, {name}"] = clock.seconds_each(1)
        found[f"answers generated, {name}"] = sum(f.answers for trial in study.trials for f in trial.rungs)
    at_once = SleepScorer(0)
    for name, concurrency in (("one at a time", 1), ("several at once", None)):
        study = bench.study(at_once, scorer, trials=AT_ONCE_ITEMS)
        clock = bench.run(study, at_once, [WorkerKind("model", Sleeper, count=bench.workers)], concurrency)
        found[f"seconds a trial, items at once, {name}"] = clock.seconds_each(bench.workers + 1)
        found[f"seconds to start and end, items at once, {name}"] = clock.ended[0] - clock.began
    clock, study = Clock(), bench.study(at_once, scorer, trials=AT_ONCE_ITEMS)
    search_here(study, at_once, [WorkerKind("model", Sleeper)], may_go_on=lambda: True, watch=clock)
    found["seconds a trial, floor: the study without Ray"] = clock.seconds_each(1)
    return {**found, "asked": "below 0.3 with all known and with items at once"}


def tpe(bench: Bench) -> dict[str, Any]:
    """TPE against random, by the best validation similarity after equally many trials."""
    from scipy import stats

    scorer, kinds = bench.scorer("kept", bench.workers)
    best: dict[str, list[float]] = {"tpe": [], "random": []}
    for seed in range(bench.arguments.seeds):
        for sampler, reached in best.items():
            study = bench.study(scorer, trials=bench.arguments.trials, sampler=sampler, seed=seed)
            bench.run(study, scorer, kinds)
            assert study.best is not None
            reached.append(study.best.rungs[-1].values["similarity"])
        print(f"  seed {seed}: " + ", ".join(f"{name} {reached[-1]:.2f}" for name, reached in best.items()), flush=True)
    gains = [one - other for one, other in zip(best["tpe"], best["random"], strict=True)]
    error = stats.sem(gains) if len(gains) > 1 else float("nan")
    half = float(error * stats.t.ppf(0.975, len(gains) - 1)) if len(gains) > 1 else float("nan")
    mean = statistics.mean(gains)
    return {
        "trials": bench.arguments.trials,
        "best of tpe, by seed": best["tpe"],
        "best of random, by seed": best["random"],
        "tpe less random, mean": mean,
        "its 95 % interval over seeds": [mean - half, mean + half],
        "asked": "at least as good",
    }


def against_evolve(bench: Bench) -> dict[str, Any]:
    """Trials an hour against mergekit-evolve's way."""
    count = bench.arguments.candidates
    space = {"k": {"min": 2, "max": 12, "log": True}, "temperature": {"min": 0.02, "max": 1.0, "log": True}}
    settings: dict[str, Any] = {"sampler": "random", "stop_early": False, "trials": count + bench.workers + 1}
    each, busy, trials = {}, {}, []
    for rank in ("exact", "energy 0.95"):  # as a mixture; and compressed in memory, as adapters are published
        recipe = {**FIXED, "rank": "exact" if rank == "exact" else {"energy": 0.95, "max": 64}}
        scorer, kinds = bench.scorer(f"evolve {rank}", bench.workers, recipe=recipe, space=space, **settings)
        study = bench.study(scorer)
        each[rank] = bench.run(study, scorer, kinds).seconds_each(bench.workers + 1)
        busy[rank] = statistics.mean(trial.rungs[-1].seconds for trial in study.trials)
        if rank == "exact":
            trials, exact = study.trials[:count], scorer
    early = {
        **settings,
        "stop_early": True,
        "trials": bench.arguments.trials,
    }  # most trials end after a part of the personas
    scorer, kinds = bench.scorer("evolve early", bench.workers, recipe=FIXED, space=space, **early)
    each["exact, poor trials stopped early"] = bench.run(bench.study(scorer), scorer, kinds).seconds_each(
        bench.workers + 1
    )
    asked = evolve.asked_of(exact, str(bench.scratch))
    candidates = [evolve.experts_of(exact, exact.space.recipe(trial.values)) for trial in trials]
    tried = evolve.try_candidates(asked, candidates, bench.workers)
    theirs = (max(one.ended for one in tried) - min(one.began for one in tried)) / count
    ours = [trial.rungs[-1].values["similarity"] for trial in trials]
    apart = max(abs(one.similarity - own) for one, own in zip(tried, ours, strict=True))
    if apart > 1:  # padding and batches may turn near ties
        sys.exit(f"evolve: the same candidates differ by {apart:.2f} points: another thing was computed")
    asks = sum(len(rows) for rows in asked.prompts.values())
    return {
        "library": f"{asked.by}, {bench.workers} processes of one thread",
        "candidates": f"{count}: top_k, linear, {len(asked.prompts)} personas, {asks} examples, "
        f"{asked.new_tokens} new tokens, at most {asked.batch_size} rows a batch",
        "largest difference in similarity, points": apart,
        "trials an hour, evolve's way": 3600 / theirs,
        **{f"trials an hour, ours, {rank}": 3600 / seconds for rank, seconds in each.items()},
        **{f"ratio, {rank}": theirs / seconds for rank, seconds in each.items()},
        "evolve's seconds for a candidate on one core": {
            stage: statistics.mean(one.stages[stage] for one in tried) for stage in evolve.STAGES
        },
        "seconds of our workers for a candidate": busy,
        "asked": "a ratio of 10; candidate by candidate both score answers alike, which bounds it",
    }


def workers(bench: Bench) -> dict[str, Any]:
    """Two model workers against one."""
    trials = max(6, bench.arguments.trials // 4)
    each: dict[str, dict[int, float]] = {"scoring": {}, "sleeps": {}}
    for count in (1, 2):
        settings: dict[str, Any] = {"sampler": "random", "stop_early": False, "trials": trials + 3}
        scorer, kinds = bench.scorer(f"workers {count}", count, **settings)
        each["scoring"][count] = bench.run(bench.study(scorer), scorer, kinds).seconds_each(3)
        asleep = SleepScorer(SLEEP_S)
        study = bench.study(asleep, scorer, trials=AT_ONCE_ITEMS)
        sleepers = [WorkerKind("model", Sleeper, count=count)]
        each["sleeps"][count] = bench.run(study, asleep, sleepers).seconds_each(3)
    return {
        **{
            f"trials an hour, {what}, {count} workers": 3600 / seconds
            for what, found in each.items()
            for count, seconds in found.items()
        },
        **{f"ratio, {what}": found[1] / found[2] for what, found in each.items()},
        "asked": f"1.4 for scoring with one thread each on 2 cores, 1.8 for sleeps of {SLEEP_S} s",
    }


def winner(bench: Bench) -> dict[str, Any]:
    """`raymerge search` whole, and its winner beside the world's recipes on test examples."""
    command = [sys.executable, "-m", "raymerge.cli", "search", bench.location, "--restart"]
    began = time.perf_counter()
    subprocess.run([*command, "--trials", str(bench.arguments.trials)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    summary = read_summary(open_project(bench.location).project.search_folder())
    beside = {
        one[
            "name"
        ]: f"{one['similarity']:.2f}; winner {one['difference']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})"
        for one in summary.beside
    }
    return {
        "seconds": seconds,
        "recipe": dict(summary.recipe),
        "validation similarity": summary.similarity,
        "optimism": summary.optimism,
        "test similarity": summary.test,
        "beside": beside,
        "notes": list(summary.notes),
    }


FIGURES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "overhead": overhead, "tpe": tpe, "evolve": against_evolve, "workers": workers, "winner": winner
}  # fmt: skip


def show(found: Mapping[str, Any], indent: str = "  ") -> None:
    for name, value in found.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            show(value, indent + "  ")
            continue
        values = value if isinstance(value, list) else [value]
        texts = [f"{one:.3g}" if isinstance(one, float) and abs(one) < 10 else f"{one:.2f}" if isinstance(one, float)
                 else str(one) for one in values]  # fmt: skip
        print(f"{indent}{name}: {', '.join(texts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--world", type=Path, metavar="DIR", help="a demo that was run; else a quick one is made")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the copied world and its scores here")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5, help="of tpe and random")
    parser.add_argument("--candidates", type=int, default=6, help="that are tried in evolve's way")
    parser.add_argument("--personas", type=int, help="that trials are scored on, all but for winner; else all")
    parser.add_argument("--workers", type=int, default=2, help="model workers, one thread each")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"})
    told = {"machine": f"{os.cpu_count()} cores", "command": " ".join(["python", *sys.argv])}
    print("\n".join(told.values()), flush=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        bench = Bench(out.resolve(), arguments.world, arguments)
        try:
            for name in arguments.only:
                print(f"\n{name}", flush=True)
                results[name] = FIGURES[name](bench)
                show(results[name])
        finally:
            shutil.rmtree(bench.scratch)
    if arguments.json:
        arguments.json.write_text(json.dumps({**told, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
