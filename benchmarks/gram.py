"""Similarities of all pairs of 200 adapters: the Gram matrix of their deltas, from files, beside its floor.

    python benchmarks/gram.py                              the whole: 1.8 GB of files in a temporary folder, two minutes
    python benchmarks/gram.py --adapters 200 --layers 2    a small one; the seconds are linear in the layers
    python benchmarks/gram.py --json gram.json

The adapters have q, k, v and o of a 2048 wide model with grouped keys (q, o 2048 x 2048; k, v 256 x 2048), rank 16,
bfloat16; each four have a part in common (cosine 0.8). All is done on two threads. Reading the files is part of the
seconds; they were just written, so that they come from memory rather than from a disk.

The floor is half of all products of rows (the matrix is symmetric) at the rate at which this machine multiplies one
large block. Cosines are compared with those in float64, of as many layers as --check says.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Threads that spin while they wait make products thirty times slower as soon as another program holds a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

from raymerge.adapters import LoraAdapter, LoraModule, open_adapter, save_adapter
from raymerge.adapters.adapter import StoredModules
from raymerge.merging.gram import Precision, gram, similarities

SHAPES = {"q_proj": (2048, 2048), "k_proj": (256, 2048), "v_proj": (256, 2048), "o_proj": (2048, 2048)}
RANK, FAMILY = 16, 4
TARGETS: dict[Precision, tuple[float, float]] = {"bfloat16": (20, 1e-4), "float32": (35, 1e-4)}


def write_adapters(folder: Path, count: int, layers: int) -> list[str]:
    """Make the files."""
    for number in range(count):
        own = torch.Generator().manual_seed(number)
        family = torch.Generator().manual_seed(10**6 + number // FAMILY)
        modules = {}
        for layer in range(layers):
            for name, (out, into) in SHAPES.items():
                A = torch.randn(RANK, into, generator=family) + 0.35 * torch.randn(RANK, into, generator=own)
                B = torch.randn(out, RANK, generator=family) + 0.35 * torch.randn(out, RANK, generator=own)
                path = f"layers.{layer}.{name}"
                modules[path] = LoraModule((A / into**0.5).bfloat16(), (0.02 * B).bfloat16(), 2.0)
        save_adapter(LoraAdapter(f"adapter_{number}", modules), str(folder / f"adapter_{number}"))
    return [str(folder / f"adapter_{number}") for number in range(count)]


def seconds_of(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds an action takes, and what it returns."""
    start = time.perf_counter()
    found = action()
    return time.perf_counter() - start, found


def cosines(locations: list[str], precision: Precision) -> torch.Tensor:
    """From files to similarities."""
    return similarities(gram([open_adapter(location) for location in locations], precision))


def read(locations: list[str]) -> None:
    """Read all modules and do nothing with them."""
    for adapter in [open_adapter(location) for location in locations]:
        for path in adapter.headers:
            adapter.modules[path]


class Part(StoredModules):
    """Some modules of an adapter, still in its file."""

    def __init__(self, modules: StoredModules, prefixes: tuple[str, ...]) -> None:
        self._modules = modules
        self.headers = {path: header for path, header in modules.headers.items() if path.startswith(prefixes)}

    def __getitem__(self, path: str) -> LoraModule:
        return self._modules[path]


def worst_errors(locations: list[str], layers: int) -> dict[str, float]:
    """The largest difference of a cosine to that in float64, by precision, over the first layers."""
    prefixes = tuple(f"layers.{layer}." for layer in range(layers))
    opened = [open_adapter(location) for location in locations]
    some = [replace(adapter, modules=Part(adapter.modules, prefixes)) for adapter in opened]
    exact = similarities(gram(some))
    return {p: float((similarities(gram(some, p)) - exact).abs().max()) for p in TARGETS}


def rate(precision: Precision) -> float:
    """Operations a second in one large product, the fastest that this machine does."""
    X = torch.randn(2048, 2048).to(getattr(torch, precision))
    stored = X.to_mkldnn() if precision == "float32" and torch.backends.mkldnn.is_available() else X
    return 2 * 2048**3 / min(seconds_of(lambda: torch.nn.functional.linear(stored, X))[0] for _ in range(7))


def floor_seconds(count: int, layers: int, precision: Precision) -> float:
    """The least that half of all products of rows take."""
    return layers * sum((count * RANK) ** 2 * (out + into) for out, into in SHAPES.values()) / rate(precision)


def measure(count: int, layers: int, check: int) -> dict[str, Any]:
    """Run everything."""
    with tempfile.TemporaryDirectory() as folder:
        locations = write_adapters(Path(folder), count, layers)
        seconds: dict[str, float] = {}
        for precision in TARGETS:
            cosines(locations[:8], precision)  # libraries choose their kernels
            seconds[precision], _ = seconds_of(lambda p=precision: cosines(locations, p))  # type: ignore[misc]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        reading, _ = seconds_of(lambda: read(locations))
        errors = worst_errors(locations, check)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    return {
        "adapters": count,
        "layers": layers,
        "file_gigabytes": size / 1e9,
        "seconds": seconds,
        "floor_seconds": {precision: floor_seconds(count, layers, precision) for precision in TARGETS},
        "of which reading": reading,
        "largest cosine error": errors,
        "layers compared with float64": check,
        "peak_mib": peak,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--check", type=int, default=2, help="layers whose cosines are compared with float64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.adapters, options.layers, min(options.check, options.layers))
    print(f"{options.adapters} adapters of {options.layers} layers x q, k, v, o, rank {RANK}, bfloat16: all pairs")
    print(f"  {'products in':12} {'seconds':>8} {'target':>7} {'floor':>7} {'largest cosine error':>21}")
    for precision, (target, allowed) in TARGETS.items():
        print(
            f"  {precision:12} {found['seconds'][precision]:8.2f} {target:7} {found['floor_seconds'][precision]:7.2f}"
            f" {found['largest cosine error'][precision]:12.1e} (<= {allowed:g})"
        )
    for name in ("of which reading", "file_gigabytes", "layers compared with float64", "peak_mib"):
        print(f"  {name}: {found[name]:.4g}")
    for name in ("machine", "command"):
        print(f"  {name}: {found[name]}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
