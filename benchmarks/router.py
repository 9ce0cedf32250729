"""What `raymerge router` gains and costs: six figures on a demo world.

    python benchmarks/router.py --world demo --out router_benchmark --json router.json
    python benchmarks/router.py --only step parallel                    # on a quick world it makes itself
    python benchmarks/router.py --trials 2 --seeds 1 --held-out 4 --against top_k         # does it run

quality   test similarity of learned_router, mean of --seeds router seeds, against the other rows. Each of those is
          searched with as many trials over its own numbers (temperature, scale, self weight, offsets over the depth,
          and k where it has one), on all validation examples, of which the router's own tuning sees a part
cold      --held-out personas whose adapter and examples nobody has seen: the router, top_k, unified and cluster_trained
          are trained and searched without them; beside these the adapters that were trained on their examples
step      a training step with k = 5 of 200 experts against one with 5 of 5 (router_step.py)
whole     seconds of the router's training
scaling   fewer candidates, and shards of experts that do not fit together: validation loss after training, test
          similarity at the numbers that were tuned with all of them resident, bytes of the experts held at once
parallel  what a second model worker could gain in the router's training: its share of all that makes the row (Amdahl)

Differences are paired over personas, with a bootstrap 95 % interval; whatever does not beat all of its rows is called
not better. The world is copied into --out and nothing is written elsewhere; what is there is not made again, so that
a benchmark that was interrupted goes on. Seconds of training are those of the item, from timings.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import router_cold
from router_world import LEARNED, Learned, RouterBench, Row, headline, mean_of, paired
from search import show

from raymerge import storage
from raymerge.adapters.formats import open_adapter
from raymerge.config.router import Router
from raymerge.models.router_rows import cut_shards
from raymerge.pipelines.job import Timing, read_timings
from raymerge.pipelines.opening import open_project
from raymerge.search.results import read_summary

OFFSETS = {"groups": 3, "max": 0.3, "penalty": 1.0}  # as the router's
SCALED: dict[str, Any] = {"scale": {"min": 0.5, "max": 2.0, "log": True}, "scale_by_layers": OFFSETS}
SIMILAR: dict[str, Any] = {
    "temperature": {"min": 0.02, "max": 1.0, "log": True}, "self_weight": {"min": 0.0, "max": 0.4}, **SCALED
}  # fmt: skip
K = {"min": 2, "max": 40, "log": True}
SPACES: Mapping[str, Mapping[str, Any]] = {
    "top_k": {"k": K, **SIMILAR},
    "sparse_moe": {"k": K, **SIMILAR},
    "soft": SIMILAR,
    "hierarchical": {"top_clusters": {"min": 1, "max": 4}, "k": {"min": 2, "max": 20, "log": True}, **SIMILAR},
    "cluster_trained": SCALED,
    "unified": SCALED,
    "own": SCALED,
}
MERGE_RANK = Router().merge_rank  # of all merges alike
SEARCHED = "searched"
ASKED_S = 180.0


class Figures:
    """The benchmark's figures. Routers and rows that several of them need are made once."""

    def __init__(self, bench: RouterBench, arguments: argparse.Namespace) -> None:
        self.bench, self.arguments = bench, arguments
        self._routers: dict[int, Learned] = {}

    def router(self, seed: int) -> Learned:
        """Trained and tuned."""
        if seed not in self._routers:
            settings = {"trials": self.arguments.trials, "seed": seed}
            self._routers[seed] = self.bench.router(f"seed_{seed}", settings)
        return self._routers[seed]

    def routers(self) -> list[Learned]:
        """One for each seed."""
        return [self.router(seed) for seed in range(self.arguments.seeds)]

    def row(self, name: str) -> Row:
        """Another row at its best."""
        if name == SEARCHED:
            return self.bench.searched(self.arguments.trials)
        return self.bench.tuned(f"best_{name}", self.search_of(name))

    def search_of(self, name: str, *, without: str | None = None) -> dict[str, Any]:
        """The search of a strategy's own numbers, or of all but one."""
        space = {number: values for number, values in SPACES[name].items() if number != without}
        merged = {"centred": True, "rank": MERGE_RANK} if "temperature" in space else {}
        return {"recipe": {"strategy": name, **merged}, "space": space, "trials": self.arguments.trials}

    def quality(self) -> dict[str, Any]:
        """learned_router against the other rows, on test examples."""
        learned = self.routers()
        rows = {name: self.row(name) for name in self.arguments.against}
        mean = mean_of(learned)
        beside = {name: paired(mean, row.by_persona) for name, row in rows.items()}
        by_seed = [one.mean() for one in learned]
        return {
            "headline": headline(LEARNED, beside),
            f"{LEARNED}, mean of {len(learned)} seeds": statistics.mean(by_seed),
            "by seed": by_seed,
            "validation loss by seed, before and after": [
                f"{one.before['validation']:.4f} to {one.after['validation']:.4f}" for one in learned
            ],
            "validation similarity by seed": [one.validation for one in learned],
            "recipes by seed": [json.dumps(one.recipe) for one in learned],
            "beside": {
                name: {
                    "similarity": row.mean(),
                    "learned less it, 95 % interval": beside[name],
                    "the same by seed": [paired(one.by_persona, row.by_persona)[0] for one in learned],
                    "trials": row.trials,
                    "validation similarity": row.validation,
                    "recipe": json.dumps(row.recipe),
                }
                for name, row in sorted(rows.items(), key=lambda one: -one[1].mean())
            },
            "trials of the router": [one.trials for one in learned],
            "asked": "above all of them",
        }

    def cold(self) -> dict[str, Any]:
        """Personas who were left out of everything."""
        others = ("top_k", "unified", "cluster_trained")
        searches = {name: self.search_of(name, without="self_weight") for name in others}
        names, learned, rows = router_cold.rows_of(
            self.bench, searches, self.arguments.held_out, self.arguments.seed, self.arguments.trials
        )
        seen = router_cold.seen(self.bench, names)
        beside = {name: paired(learned.by_persona, row.by_persona, names) for name, row in rows.items()}
        return {
            "headline": headline(f"{LEARNED} of strangers", beside),
            "personas": len(names),
            LEARNED: learned.mean(names),
            "beside": {
                name: {"similarity": row.mean(names), "learned less it, 95 % interval": beside[name]}
                for name, row in rows.items()
            },
            "trained on them too, as in the world's own runs": {
                name: {
                    "similarity": row.mean(names),
                    "learned less it": paired(learned.by_persona, row.by_persona, names),
                }
                for name, row in seen.items()
            },
        }

    def step(self) -> dict[str, Any]:
        """Cost of a step by experts that contribute, and by experts that are there."""
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            script = Path(__file__).with_name("router_step.py")
            subprocess.run([sys.executable, script, "--json", file.name], check=True, stdout=subprocess.DEVNULL)
            found: dict[str, Any] = json.load(file)
        return found

    def whole(self) -> dict[str, Any]:
        """Seconds of the training."""
        learned, threads = self.routers(), open_project(self.bench.location).project.hardware.cpus_per_model
        seconds = [one.seconds for one in learned]
        return {
            "seconds by seed": seconds,
            "rows a second": [self._rows(one) / one.seconds for one in learned],
            "epochs": [len(one.record["history"]) - 1 for one in learned],
            "cores of its worker": max(1, int(threads)),
            "asked": f"{ASKED_S:.0f} s on 2 cores: {'kept' if max(seconds) <= ASKED_S else 'not kept'}",
        }

    def scaling(self) -> dict[str, Any]:
        """Ways to train where not all experts fit."""
        first = self.router(0)
        opened = open_project(self.bench.location)
        adapter = open_adapter(opened.project.adapter_location(opened.adapters[0]), opened.adapters[0])
        each = sum(header.rank * sum(header.shape) * 4 for header in adapter.headers.values())
        everybody = len(opened.adapters)
        few = min(16, everybody // 4)
        room = max(2 * few, everybody // 4)
        ways: dict[str, tuple[int, int | None]] = {
            **{f"{number} candidates": (number, None) for number in (few, 32, 64) if number < everybody},
            f"all {everybody}": (everybody, None),
            f"{few} candidates, room for {room} experts": (few, room),
        }
        found = {}
        for name, (candidates, fits) in ways.items():
            found[name] = self._way(first, everybody, candidates, fits, each)
        return {"bytes of an expert": each, **found}

    def parallel(self) -> dict[str, Any]:
        """Amdahl's bound on more workers for the training."""
        learned = self.router(0)
        project = open_project(str(self.bench.world / "seed_0.yaml")).project
        world = open_project(self.bench.location).project
        before, run = read_timings(world.shared_folder()), read_timings(project.run_folder(LEARNED))
        tuning = read_summary(storage.join(learned.folder, "tuning")).budget
        seconds = {
            "training adapters": _sum(before, "train/", "try/"),
            "embedding": _sum(before, "embed/"),
            "training the router": learned.seconds,
            "tuning": float(tuning["seconds"]),
            "merging": _sum(run, "merge/"),
            "scoring": _sum(run, "evaluate/"),
        }
        share = learned.seconds / sum(seconds.values())
        rest = 1 - share
        return {
            "seconds of workers": seconds,
            "share of the router's training": share,
            "whole faster at most, its training alone on 2 workers": 1 / (rest + share / 2),
            "the same where all else is on 2 workers already": (rest / 2 + share) / (rest / 2 + share / 2),
            "rows a second of one worker": self._rows(learned) / learned.seconds,
        }

    def _way(self, first: Learned, everybody: int, candidates: int, room: int | None, each: int) -> dict[str, Any]:
        """A router trained so, scored on test examples as the first one was tuned. everybody: how many experts there
        are, of `each` bytes."""
        learned, usual = first, int(first.record["shape"]["candidates"])
        if room is not None or candidates != min(usual, everybody):
            name = f"candidates_{candidates}" + ("" if room is None else f"_room_{room}")
            memory = {} if room is None else {"experts_memory": str(room * each)}
            learned = self.bench.trained(name, {"candidates": candidates, **memory}, first.recipe)
        experts = learned.candidates()
        shards = cut_shards(experts, np.arange(len(experts)), room)
        return {
            "validation loss": learned.after["validation"],
            "test similarity": learned.mean(),
            "less the first router's, 95 % interval": paired(learned.by_persona, first.by_persona),
            "shards": len(shards),
            "bytes of experts at once": max(len(shard.experts) for shard in shards) * each,
            "seconds": learned.seconds,
        }

    def _rows(self, learned: Learned) -> float:
        """Rows that its training went over: of all epochs, validation left out."""
        personas = open_project(self.bench.location).need_personas("the benchmark")
        rows = sum(len(personas.examples(name, "train")) for name in personas.names)
        return float(rows * (len(learned.record["history"]) - 1))


def _sum(timings: Mapping[str, Timing], *prefixes: str) -> float:
    return sum(timing.seconds for item, timing in timings.items() if item.startswith(prefixes))


FIGURES: dict[str, Callable[[Figures], dict[str, Any]]] = {
    "quality": Figures.quality, "cold": Figures.cold, "step": Figures.step, "whole": Figures.whole,
    "scaling": Figures.scaling, "parallel": Figures.parallel,
}  # fmt: skip


def main() -> None:
    rows = [*SPACES, SEARCHED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--world", type=Path, metavar="DIR", help="a demo that was run; else a quick one is made")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the copied world and all made on it here")
    parser.add_argument("--trials", type=int, default=24, help="of every row, the router's tuning among them")
    parser.add_argument("--seeds", type=int, default=3, help="of the router")
    parser.add_argument("--against", nargs="+", choices=rows, default=rows, metavar="ROW", help="in quality")
    parser.add_argument("--held-out", type=int, default=20, metavar="N", help="personas in cold")
    parser.add_argument("--seed", type=int, default=0, help="by which they are drawn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"})
    told = {"machine": f"{os.cpu_count()} cores", "command": " ".join(["python", *sys.argv])}
    print("\n".join(told.values()), flush=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        figures = Figures(RouterBench(out.resolve(), arguments.world), arguments)
        for name in arguments.only:
            print(f"\n{name}", flush=True)
            results[name] = FIGURES[name](figures)
            show(results[name])
    if arguments.json:
        arguments.json.write_text(json.dumps({**told, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
