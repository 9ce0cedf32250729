"""Every method on five adapters: raymerge against PEFT's combination types, on the same files in one run.

    python benchmarks/methods.py                          22 layers for PEFT's factor-wise types, 3 for its SVD types
    python benchmarks/methods.py --layers 2 --svd-layers 1     a small one; all costs are linear in the layers
    python benchmarks/methods.py --skip-peft              ours alone
    python benchmarks/methods.py --peft-threads 2         PEFT on two threads, ours on one
    python benchmarks/methods.py --memory 200             peak memory of `ties` over 200 adapters, nothing else
    python benchmarks/methods.py --device cuda            ours on a GPU, adapters resident, with the floor

The adapters are those of benchmarks/merging.py: q, k, v and o of a 2048 wide model, rank 16, bfloat16. All is done on
one thread, PEFT's on --peft-threads. Ours reads files and writes files; PEFT starts from adapters in memory, and the
ratio `+load` counts the time in which it loaded them too (that of saving is left out). `same` computes PEFT's numbers
(dialect peft), `delta` the method on deltas, compressed to rank 16 with its error stated, which PEFT's types without an
SVD never do. Ours is the median of three runs before and three after PEFT's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from merging import EXPERTS, RANK, SHAPES, WEIGHTS, load_peft, seconds_of, write_adapters

from raymerge.adapters import LoraAdapter, LoraModule, open_adapter, read_adapter, save_adapter
from raymerge.merging.merge import merge
from raymerge.merging.methods import METHODS

DENSITY = 0.5
FACTOR_WISE = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
BY_SVD = ("svd", "magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd")


def parameters_of(method: str) -> dict[str, float]:
    """One density for all that have one."""
    name = method.removesuffix("_svd")
    return {"density": DENSITY} if name in METHODS and "density" in METHODS[name].defaults else {}


def ours(locations: list[str], target: str, method: str, dialect: str) -> LoraAdapter:
    """Files to files."""
    count = METHODS[method].most or EXPERTS if dialect == "delta" else EXPERTS
    experts = [open_adapter(location) for location in locations[:count]]
    merged = merge(experts, WEIGHTS[:count], method=method, dialect=dialect, rank="keep", **parameters_of(method))
    save_adapter(merged, target)
    return merged


def timed(action: Callable[[], object], runs: int = 3) -> list[float]:
    """Seconds of some runs."""
    return [seconds_of(action) for _ in range(runs)]


def against_peft(
    locations: list[str], layers: int, types: tuple[str, ...], target: str, skip: bool, threads: int
) -> list[dict[str, Any]]:
    """Seconds of each of PEFT's types, of the same numbers by us, and of the method on deltas."""
    start = time.perf_counter()
    model = None if skip else load_peft(locations, layers)
    load = time.perf_counter() - start
    names = [f"e{index}" for index in range(EXPERTS)]
    rows = []
    for kind in types:
        plain = {"svd": "linear"}.get(kind, kind.removesuffix("_svd"))
        actions = {
            "same": lambda kind=kind: ours(locations, target, kind, "peft"),
            "delta": lambda plain=plain: ours(locations, target, plain, "delta"),
        }
        times = {name: [*timed(action, 1), *timed(action)][1:] for name, action in actions.items()}  # first is warm-up
        row: dict[str, Any] = {"type": kind, "layers": layers, "peft load": load}
        if model is not None:
            density = parameters_of(kind).get("density")
            torch.set_num_threads(threads)
            row["peft"] = seconds_of(
                lambda kind=kind, density=density: model.add_weighted_adapter(
                    names, WEIGHTS, kind, combination_type=kind, density=density
                )
            )
            torch.set_num_threads(1)
            model.delete_adapter(kind)
            for name, action in actions.items():
                times[name] += timed(action)
        for name, seconds in times.items():
            row[name] = statistics.median(seconds)
            if "peft" in row:
                row[f"{name} ratio"] = row["peft"] / row[name]
                row[f"{name} ratio with load"] = (row["peft"] + load) / row[name]
        rows.append(row)
    return rows


def each_method(locations: list[str], layers: int, target: str) -> list[dict[str, Any]]:
    """Seconds and error of every method on deltas."""
    rows = []
    for method in METHODS:
        start = time.perf_counter()
        merged = ours(locations, target, method, "delta")
        rows.append(
            {"method": method, "layers": layers, "seconds": time.perf_counter() - start, "error": merged.errors["*"]}
        )
    return rows


def memory_of_ties(folder: Path, count: int) -> dict[str, Any]:
    """Peak memory of this process while it merges one layer of many adapters by ties, read module by module."""
    write_adapters(folder, 1)
    source = read_adapter(str(folder / "expert_0"))
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        modules = {
            path: LoraModule(m.A, torch.randn(m.B.shape, generator=generator).mul_(0.02).bfloat16(), m.scaling)
            for path, m in source.modules.items()
        }
        save_adapter(LoraAdapter(f"many_{index:04}", modules), str(folder / f"many_{index:04}"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    experts = [open_adapter(str(folder / f"many_{index:04}")) for index in range(count)]
    start = time.perf_counter()
    merge(experts, [1 / count] * count, method="ties", density=0.2, rank=RANK)
    return {
        "adapters": count,
        "seconds of one layer": time.perf_counter() - start,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "peak_mib_before": before,
    }


def on_device(folder: Path, layers: int, device: str) -> list[dict[str, Any]]:
    """Every method on adapters that are on the device already, in bfloat16 and float32, with the bytes' floor."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        experts = []
        for location in write_adapters(folder, layers):
            read = read_adapter(location)
            modules = {
                path: replace(m, A=m.A.to(device, dtype), B=m.B.to(device, dtype)) for path, m in read.modules.items()
            }
            experts.append(LoraAdapter(read.name, modules))
        block = torch.empty(2**28, dtype=torch.uint8, device=device)
        copy = min(device_seconds(lambda block=block: block.clone()) for _ in range(5))
        bandwidth = 2 * block.numel() / copy
        for method in METHODS:
            count = METHODS[method].most or EXPERTS

            def run(method: str = method, count: int = count, experts: list[LoraAdapter] = experts) -> object:
                return merge(experts[:count], WEIGHTS[:count], method=method, rank="keep", **parameters_of(method))

            run()
            floor = sum(e.nbytes for e in experts[:count]) * (1 + 1 / count) / bandwidth
            rows.append({"method": method, "dtype": str(dtype), "seconds": device_seconds(run), "floor": floor})
    return rows


def device_seconds(action: Callable[[], object]) -> float:
    """Seconds of an action, its kernels included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def floor_seconds(layers: int) -> float:
    """The least that entrywise methods take: forming every expert's delta once at this machine's float32 rate."""
    X = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / min(seconds_of(lambda: X @ X) for _ in range(5))
    return layers * sum(2 * EXPERTS * RANK * out * into for out, into in SHAPES.values()) / rate


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    names = ("peft load", "peft", "same", "same ratio", "same ratio with load", "delta", "delta ratio")
    heads = ("PEFT load", "PEFT", "same", "ratio", "+load", "delta", "ratio")
    print(f"{'PEFT type':20}{'layers':>7}" + "".join(f"{head:>10}" for head in heads))
    for row in found["peft"]:
        print(f"{row['type']:20}{row['layers']:7}" + "".join(f"{row.get(name, float('nan')):10.2f}" for name in names))
    print(f"\n{'method on deltas':22}{'layers':>7}{'seconds':>10}{'error':>10}")
    for row in found["methods"]:
        print(f"{row['method']:22}{row['layers']:7}{row['seconds']:10.2f}{row['error']:10.3f}")
    print(f"{'floor, entrywise':22}{found['methods'][0]['layers']:7}{found['floor_seconds']:10.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--svd-layers", type=int, default=3)
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--peft-threads", type=int, default=1)
    parser.add_argument("--memory", type=int, metavar="N")
    parser.add_argument("--device", metavar="cuda")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, 1 thread, torch {torch.__version__}",
        "command": " ".join(["python", *sys.argv]),
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            found["memory"] = memory_of_ties(Path(folder), options.memory)
        elif options.device:
            found["machine"] = torch.cuda.get_device_name()
            found["device"] = on_device(Path(folder), options.layers, options.device)
        else:
            target = str(Path(folder) / "merged")
            few = write_adapters(Path(folder) / "few", options.svd_layers)
            many = write_adapters(Path(folder) / "many", options.layers)
            found["peft"] = against_peft(
                many, options.layers, FACTOR_WISE, target, options.skip_peft, options.peft_threads
            )
            found["peft"] += against_peft(
                few, options.svd_layers, BY_SVD, target, options.skip_peft, options.peft_threads
            )
            found["methods"] = each_method(few, options.svd_layers, target)
            found["floor_seconds"] = floor_seconds(options.svd_layers)
    if "methods" in found:
        show(found)
    for name in ("memory", "device"):
        for row in found.get(name, []) if name == "device" else [found[name]] if name in found else []:
            print(row)
    print(found["machine"], found["command"], sep="\n")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
