"""Five adapters into one: raymerge against PEFT, on the same files in one run.

    python benchmarks/merging.py                     the whole: 22 layers, some minutes (PEFT's svd)
    python benchmarks/merging.py --layers 1          a small one; PEFT's cost is linear in the layers
    python benchmarks/merging.py --json merging.json

The adapters have q, k, v and o of a 2048 wide model with grouped keys (q, o 2048 x 2048; k, v 256 x 2048), rank 16,
bfloat16, independent random factors: the hardest to compress. All is done on one thread, as on a worker. Ours is the
median of runs before, between and after those of PEFT, so that a machine with other work slows both alike.
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
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from raymerge.adapters import LoraAdapter, LoraModule, open_adapter, read_adapter, save_adapter
from raymerge.merging.merge import merge

SHAPES = {"q_proj": (2048, 2048), "k_proj": (256, 2048), "v_proj": (256, 2048), "o_proj": (2048, 2048)}
EXPERTS, RANK = 5, 16
WEIGHTS = [0.3, 0.25, 0.2, 0.15, 0.1]
OURS = "raymerge, files to files"


class Layer(torch.nn.Module):
    """The linear modules of one attention layer; never run."""

    def __init__(self) -> None:
        super().__init__()
        for name, (out, into) in SHAPES.items():
            linear = torch.nn.utils.skip_init(torch.nn.Linear, into, out, bias=False, dtype=torch.bfloat16)
            self.add_module(name, linear)


class Base(torch.nn.Module):
    """A base model with whatever is in memory for weights: merging never looks at them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))


def write_adapters(folder: Path, layers: int) -> list[str]:
    """Make the experts' files."""
    for expert in range(EXPERTS):
        generator = torch.Generator().manual_seed(expert)
        modules = {}
        for layer in range(layers):
            for name, (out, into) in SHAPES.items():
                A = torch.randn(RANK, into, generator=generator) / into**0.5
                B = torch.randn(out, RANK, generator=generator) * 0.02
                modules[f"layers.{layer}.{name}"] = LoraModule(A.bfloat16(), B.bfloat16(), 2.0)
        save_adapter(LoraAdapter(f"expert_{expert}", modules), str(folder / f"expert_{expert}"))
    return [str(folder / f"expert_{expert}") for expert in range(EXPERTS)]


def seconds_of(action: Callable[[], object]) -> float:
    """Seconds an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ours(locations: list[str], target: str) -> LoraAdapter:
    """Files to files."""
    merged = merge([open_adapter(location) for location in locations], WEIGHTS, rank="keep")
    save_adapter(merged, target)
    return merged


def load_peft(locations: list[str], layers: int) -> PeftModel:
    """The five adapters in a PEFT model, in float32 as PEFT holds them."""
    empty = get_peft_model(Base(layers), LoraConfig(r=1, target_modules=["q_proj"]), adapter_name="unused")
    for index, location in enumerate(locations):
        empty.load_adapter(location, adapter_name=f"e{index}", torch_device="cpu")
    return empty


def peft_factors(model: PeftModel, adapter: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """B with the scaling folded in, and A, by module."""
    return {
        name.removeprefix("base_model.model."): (
            layer.lora_B[adapter].weight.data.float() * layer.scaling[adapter],
            layer.lora_A[adapter].weight.data.float(),
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and adapter in layer.lora_A
    }


def truncate_cat(model: PeftModel, names: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's exact `cat`, then the best rank-16 part of each product by torch's truncated SVD."""
    model.add_weighted_adapter(names, WEIGHTS, "cat", combination_type="cat")
    found = {}
    for path, (B, A) in peft_factors(model, "cat").items():
        U, S, V = torch.svd_lowrank(B @ A, q=RANK + 16, niter=8)
        found[path] = (U[:, :RANK] * S[:RANK], V[:, :RANK].T)
    model.delete_adapter("cat")
    return found


def run_all(locations: list[str], layers: int, target: str) -> tuple[dict[str, float], float, LoraAdapter]:
    """Seconds of each way, MiB at the peak before PEFT's, and our result. PEFT starts from adapters in memory, which is
    in its favour: ours reads and writes files."""
    merged = ours(locations, target)  # warm, as PEFT's is after loading
    times = [seconds_of(lambda: ours(locations, target)) for _ in range(3)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    start = time.perf_counter()
    model = load_peft(locations, layers)
    names = [f"e{index}" for index in range(EXPERTS)]
    found = {"PEFT load": time.perf_counter() - start}
    found["PEFT cat + truncated svd"] = seconds_of(lambda: truncate_cat(model, names))
    times += [seconds_of(lambda: ours(locations, target)) for _ in range(3)]
    found["PEFT svd"] = seconds_of(lambda: model.add_weighted_adapter(names, WEIGHTS, "svd", combination_type="svd"))
    times += [seconds_of(lambda: ours(locations, target)) for _ in range(3)]
    return {OURS: statistics.median(times), **found}, peak, merged


def worst_excess(locations: list[str], count: int) -> float:
    """The largest |S - S_r| / ((1 + 1e-4) optimum + 1e-6 |S|) over some modules, in float32: at most 1 is promised."""
    experts = [read_adapter(location) for location in locations]
    paths = list(experts[0].modules)[:count]
    some = [LoraAdapter(e.name, {p: e.modules[p] for p in paths}) for e in experts]
    merged = merge(some, WEIGHTS, rank="keep", dtype=torch.float32)
    worst = 0.0
    for path in paths:
        S = torch.stack([w * e.modules[path].delta(torch.float64) for e, w in zip(some, WEIGHTS, strict=True)]).sum(0)
        optimum = torch.linalg.vector_norm(torch.linalg.svdvals(S)[RANK:])
        error = torch.linalg.matrix_norm(S - merged.modules[path].delta(torch.float64))
        worst = max(worst, float(error / ((1 + 1e-4) * optimum + 1e-6 * torch.linalg.matrix_norm(S))))
    return worst


def floor_seconds(layers: int) -> float:
    """The least that Gram matrices of both sides take at this machine's float64 rate."""
    X = torch.randn(1024, 1024, dtype=torch.float64)
    rate = 2 * 1024**3 / min(seconds_of(lambda: X @ X) for _ in range(5))
    columns = EXPERTS * RANK
    return layers * sum(2 * columns**2 * (out + into) for out, into in SHAPES.values()) / rate


def measure(layers: int, modules: int) -> dict[str, object]:
    """Run everything. Returns seconds and ratios."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        locations = write_adapters(Path(folder), layers)
        seconds, peak, merged = run_all(locations, layers, str(Path(folder) / "merged"))
        excess = worst_excess(locations, modules)
    return {
        "layers": layers,
        "seconds": seconds,
        "ratios": {name: value / seconds[OURS] for name, value in seconds.items()},
        "floor_seconds": floor_seconds(layers),
        "error": merged.errors["*"],
        "error over promised bound": excess,
        "peak_mib_before_peft": peak,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, 1 thread, torch {torch.__version__}",
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--modules", type=int, default=4, help="on how many the bound is checked by a dense SVD")
    parser.add_argument("--json")
    options = parser.parse_args()
    found = measure(options.layers, options.modules)
    print(f"{EXPERTS} adapters of {options.layers} layers x q, k, v, o, rank {RANK}, bfloat16 -> rank {RANK}")
    ratios = found["ratios"]
    for name, value in found["seconds"].items():  # type: ignore[attr-defined]
        print(f"  {name:28} {value:9.3f} s  x {ratios[name]:8.1f}")  # type: ignore[index]
    print(f"  {'floor (Gram products)':28} {found['floor_seconds']:9.3f} s")
    for name in ("error", "error over promised bound", "peak_mib_before_peft", "machine", "command"):
        print(f"  {name}: {found[name]}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
