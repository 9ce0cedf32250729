"""200 adapters, `sparse_moe` with k = 5, through Ray, files to files: seconds, floor, and the workers' memory.

    python benchmarks/merge_on_ray.py --json merge_on_ray.json
    python benchmarks/merge_on_ray.py --adapters 20 --layers 4       (a small one)

Adapters are random, of 22 layers x q, k, v, o at hidden size 2048, rank 16, bfloat16: 9 MB each. The floor is the time
to copy the bytes that a merge must read and write through memory, measured in the same run, on as many processes as
there are workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import yaml

from raymerge import storage

SHAPES = {"q_proj": (2048, 2048), "k_proj": (256, 2048), "v_proj": (256, 2048), "o_proj": (2048, 2048)}


def make_inputs(folder: Path, adapters: int, layers: int) -> int:
    """Write random adapters, persona vectors, clusters and a project file; returns the bytes of one adapter."""
    import torch
    from safetensors.torch import save

    config = {
        "peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(SHAPES), "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "base",
    }  # fmt: skip
    names = [f"persona_{i:03d}" for i in range(adapters)]
    for number, name in enumerate(names):
        random = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(layers):
            for module, (out, inner) in SHAPES.items():
                path = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                A = torch.randn(16, inner, generator=random) / inner**0.5
                B = torch.randn(out, 16, generator=random) / 100
                tensors[f"{path}.lora_A.weight"] = A.to(torch.bfloat16)
                tensors[f"{path}.lora_B.weight"] = B.to(torch.bfloat16)
        place = str(folder / "adapters" / name)
        storage.write_bytes(f"{place}/adapter_model.safetensors", save(tensors, {"format": "pt"}))
        storage.write_json(f"{place}/adapter_config.json", config)
    vectors = np.random.default_rng(0).standard_normal((adapters, 32)).astype(np.float32)
    table = pa.table({"persona": names, "vector": list(vectors)})
    storage.write_bytes(str(folder / "vectors.parquet"), storage.encode_parquet(table))
    storage.write_json(str(folder / "clusters.json"), {n: f"cluster_{i % 5:02d}" for i, n in enumerate(names)})
    project = {
        "clusters": {"file": "clusters.json"},
        "recipes": {
            "sparse_moe_k5": {"strategy": "sparse_moe", "k": 5, "embedding": "vectors.parquet", "rank": "keep"},
        },
    }
    (folder / "raymerge.yaml").write_text(yaml.safe_dump(project))
    return (folder / "adapters" / names[0] / "adapter_model.safetensors").stat().st_size


def peak_of_workers(process: subprocess.Popen[bytes], stop_s: float) -> tuple[float, int]:
    """Wait for a process; returns its seconds and the largest resident set of any worker below it, in bytes."""
    started, peak = time.perf_counter(), 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        if time.perf_counter() - started > stop_s:
            process.terminate()
            raise SystemExit(f"not done after {stop_s} s")
        for child in root.children(recursive=True):
            try:
                if "".join(child.cmdline()[:1]).startswith("ray::Host"):
                    peak = max(peak, child.memory_info().rss)
            except psutil.Error:
                continue
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    return time.perf_counter() - started, peak


def floor_seconds(bytes_moved: int, workers: int) -> float:
    """Seconds to copy so many bytes through memory, on one core each of `workers`."""
    block = np.ones(64 * 2**20, dtype=np.uint8)
    target = np.empty_like(block)
    started = time.perf_counter()
    for _ in range(8):
        np.copyto(target, block)
    return (time.perf_counter() - started) / 8 / block.nbytes * bytes_moved / workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="raymerge-benchmark-"))
    try:
        size = make_inputs(folder, options.adapters, options.layers)
        command = [sys.executable, "-m", "raymerge.cli", "merge", str(folder / "raymerge.yaml")]
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "RAY_AUTH_MODE": "token"})
            seconds, peak = peak_of_workers(process, stop_s=1800)
        written = list((folder / "runs/sparse_moe_k5/adapters").glob("*/manifest.json"))
        if process.returncode or len(written) != options.adapters:
            raise SystemExit((folder / "log").read_text())
        moved = size * options.adapters * 6
        result = {
            "machine": f"{os.cpu_count()} cores",
            "command": " ".join(sys.argv),
            "adapters": options.adapters,
            "adapter_bytes": size,
            "seconds": round(seconds, 1),
            "floor_seconds": round(floor_seconds(moved, os.cpu_count() or 1), 1),
            "peak_worker_GiB": round(peak / 2**30, 2),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    width = max(len(key) for key in result)
    for key, value in result.items():
        print(f"{key:<{width}}  {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
