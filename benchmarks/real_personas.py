"""200 real people and a real small Llama: unified first, personas started from it, merged, compared.

    RAYMERGE_TEST_DATA=... python benchmarks/real_personas.py --json real_personas.json
    RAYMERGE_TEST_DATA=... python benchmarks/real_personas.py --personas 20 --out kept/

The data are Ubuntu IRC helpers (24 training, 8 validation and 8 test answers each) and stories260k, a Llama of 260,032
parameters that knows children's stories and no chat: every figure is small, and what counts is whether the comparison
says so. Prints the comparison, writes it as JSON, and keeps the whole project with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

RECIPES = {
    "base": {"strategy": "base"},
    "unified": {"strategy": "unified"},
    "own": {"strategy": "own"},
    "cluster_trained": {"strategy": "cluster_trained"},
    "simple_average": {"strategy": "simple_average"},
    "sparse_moe_k5": {"strategy": "sparse_moe", "k": 5},
    "soft": {"strategy": "soft"},
    "random_k5": {"strategy": "random_k", "of": "sparse_moe_k5"},
    "shuffled": {"strategy": "shuffled", "of": "sparse_moe_k5"},
}


def write_project(folder: Path, data: Path, personas: int) -> Path:
    """A project on the real data: the first so many personas."""
    kept = []
    with open(data / "ubuntu-irc" / "personas.jsonl") as lines:
        for line in lines:
            if json.loads(line)["persona"] < f"persona_{personas:03d}":
                kept.append(line)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "personas.jsonl").write_text("".join(kept))
    project = {
        "workspace": ".",
        "base_model": str(data / "stories260k"),
        "personas": "personas.jsonl",
        "clusters": {"count": 5, "seed": 0},
        "generation": {"prompt_format": "{prompt}\n", "max_new_tokens": 48, "stop": ["<s>", "\n"]},
        "training": {
            "rank": 8,
            "alpha": 16,
            "start_from": "unified",
            "epochs": {"unified": 4, "cluster": 4, "persona": 4},
            "learning_rate": {"unified": 3e-3, "cluster": 3e-3, "persona": 1e-3},
            "batch_size": {"unified": 32, "cluster": 16, "persona": 8},
        },
        "hardware": {"cpus_per_model": 0.5, "cpus_per_merge": 0.5},
        "recipes": RECIPES,
    }
    location = folder / "raymerge.yaml"
    location.write_text(yaml.safe_dump(project, sort_keys=False))
    return location


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=200)
    parser.add_argument("--out", type=Path, help="keep the project here")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = Path(os.environ["RAYMERGE_TEST_DATA"]).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        project = write_project(folder, data, options.personas)
        started = time.perf_counter()
        command = [sys.executable, "-m", "raymerge.cli", "run", str(project)]
        subprocess.run(command, check=True, env={**os.environ, "RAY_AUTH_MODE": "token", "COLUMNS": "80"})
        seconds = round(time.perf_counter() - started, 1)
        comparison = json.loads((folder / "runs" / "comparison.json").read_text())
    print(f"{options.personas} personas, {seconds} s on {os.cpu_count()} cores")
    if options.json:
        told = {"machine": f"{os.cpu_count()} cores", "command": " ".join(sys.argv), "seconds": seconds}
        rows = [{k: v for k, v in row.items() if k != "recipe"} for row in comparison["rows"]]
        options.json.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
