"""Seconds of `import raymerge` and `raymerge --help`, beside those of an empty Python and of `import torch`.

python benchmarks/startup.py --json startup.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python (floor)": [sys.executable, "-c", "pass"],
    "import raymerge": [sys.executable, "-c", "import raymerge"],
    "raymerge --help": [sys.executable, "-m", "raymerge.cli", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def seconds(command: list[str], times: int) -> float:
    """The least of several wall times of a command, which is what it takes when nothing disturbs it."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - started)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {name: round(seconds(command, options.times), 3) for name, command in COMMANDS.items()}
    for name, value in result.items():
        print(f"{name:<16}  {value:.3f} s")
    if options.json:
        told = {"machine": f"{os.cpu_count()} cores", "command": " ".join(sys.argv), "seconds": result}
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
