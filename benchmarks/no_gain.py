"""Does the verdict invent a gain where there is none? Demo worlds of relatedness 0, one for each seed.

    python benchmarks/no_gain.py --seeds 20 --json no_gain.json      the small worlds, two at a time
    python benchmarks/no_gain.py --seeds 2                           a small one
    python benchmarks/no_gain.py --seeds 20 --full                   200 personas each: hours

In such a world neighbours share nothing, so nobody can gain by asking them. Each seed runs `raymerge demo` whole, in
a process of its own, and its verdict is read. Counted are false wins: verdicts that merging gains. A seed whose
neighbours beat random experts, though not the unified adapter, is marked `credits` and not counted: the verdict there
is that merging does not pay. Exit status 1 if there are more false wins than --most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

AT_ONCE = 2


def run_seed(seed: int, full: bool, kept: Path | None) -> dict[str, Any]:
    """One world: its verdict and the seconds it took. Raises RuntimeError with the output if the demo fails."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / f"seed_{seed}"
        command = [sys.executable, "-m", "raymerge.cli", "demo", "--relatedness", "0", "--seed", str(seed), "--local"]
        command += ["--out", str(folder), *([] if full else ["--quick"])]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"seed {seed}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        text = (folder / "runs" / "comparison.json").read_text()
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"comparison_{seed}.json").write_text(text)
    return {"seed": seed, "seconds": round(time.perf_counter() - begun, 1), "verdict": json.loads(text)["verdict"]}


def is_win(verdict: Mapping[str, Any]) -> bool:
    """Whether a verdict says that merging gains: over the reference, or over the control where there is no other."""
    outcomes = {which: verdict[which]["outcome"] for which in ("reference", "control") if verdict[which]}
    if outcomes.get("control") in ("nothing", "loses"):
        return False
    return outcomes.get("reference", outcomes.get("control")) == "gains"


def interval_of(gain: Mapping[str, Any] | None) -> str:
    """A difference in points with its interval."""
    if gain is None:
        return "-"
    return f"{gain['mean']:+6.2f} ({gain['low']:+6.2f} to {gain['high']:+6.2f})"


def show(found: Mapping[str, Any]) -> None:
    """Print one seed's line."""
    verdict = found["verdict"]
    credited = verdict["control"] is not None and verdict["control"]["outcome"] == "gains"
    mark = "FALSE WIN" if is_win(verdict) else "credits" if credited else ""
    over = f"{interval_of(verdict['control']):28s} {interval_of(verdict['reference']):28s}"
    print(f"{found['seed']:4d} {found['seconds']:6.0f} s  {over} {mark}")
    print(textwrap.fill(verdict["headline"], 100, initial_indent=" " * 15, subsequent_indent=" " * 15), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--full", action="store_true", help="200 personas instead of 24")
    parser.add_argument("--most", type=int, default=1, help="false wins allowed")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the comparisons here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    command = " ".join(["python", *sys.argv])
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{command}\n{machine}\n")
    print(f"seed          {'points over control':28s} {'points over unified':28s}")
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    results = []
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for found in threads.map(lambda seed: run_seed(seed, arguments.full, arguments.keep), seeds):
            show(found)
            results.append(found)
    wins = [found["seed"] for found in results if is_win(found["verdict"])]
    print(f"\n{len(wins)} false wins in {len(results)} worlds without anything to gain ({arguments.most} allowed)")
    if arguments.json:
        told = {"machine": machine, "command": command, "false_wins": wins, "worlds": results}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    sys.exit(int(len(wins) > arguments.most))


if __name__ == "__main__":
    main()
