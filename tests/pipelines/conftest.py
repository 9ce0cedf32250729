"""Small projects on disk: adapters of a tiny base model, with and without examples."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from raymerge.adapters import LoraAdapter, LoraModule, save_adapter

SHAPES = {f"model.layers.{i}.self_attn.{m}": (32 if m in "q_proj o_proj" else 16, 32) for i in range(2) for m in
          ("q_proj", "k_proj", "v_proj", "o_proj")}  # fmt: skip
NAMES = tuple(f"p{i}" for i in range(6))


def make_adapter(name: str, seed: int, rank: int = 2, **more) -> LoraAdapter:
    random = torch.Generator().manual_seed(seed)
    modules = {
        path: LoraModule(torch.randn(rank, i, generator=random) / 6, torch.randn(o, rank, generator=random) / 6, 2.0)
        for path, (o, i) in SHAPES.items()
    }
    return LoraAdapter(name, modules, base_model="tiny", task_type="CAUSAL_LM", **more)


def write_project(folder: Path, **keys) -> str:
    location = folder / "raymerge.yaml"
    location.write_text(yaml.safe_dump({"workspace": ".", **keys}))
    return str(location)


@pytest.fixture
def adapters(tmp_path) -> Path:
    """Six adapters in two families: p0 to p2 alike, p3 to p5 alike."""
    for number, name in enumerate(NAMES):
        family, own = make_adapter("family", number // 3), make_adapter("own", 10 + number)
        mixed = {
            path: LoraModule(torch.cat([m.A, 0.5 * own.modules[path].A]), torch.cat([m.B, own.modules[path].B], 1), 2.0)
            for path, m in family.modules.items()
        }
        adapter = LoraAdapter(name, mixed, base_model="tiny", task_type="CAUSAL_LM")
        save_adapter(adapter, str(tmp_path / "adapters" / name))
    return tmp_path


@pytest.fixture
def project(adapters, tiny_llama) -> str:
    """The six adapters with a base model and examples of all splits."""
    (adapters / "base").symlink_to(tiny_llama)
    lines = [
        {"persona": name, "prompt": f"w{i} w{j}?", "response": f"w{j + 1} w{i + 2}.", "split": split}
        for i, name in enumerate(NAMES)
        for j, split in enumerate(["train", "train", "validation", "test", "test"])
    ]
    (adapters / "personas.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (adapters / "clusters.json").write_text(json.dumps({n: f"cluster_{i // 3:02d}" for i, n in enumerate(NAMES)}))
    return write_project(
        adapters,
        base_model="base",
        personas="personas.jsonl",
        clusters={"file": "clusters.json"},
        generation={"max_new_tokens": 4},
        evaluation={"personas_per_item": 4, "batch_size": 4},
        training={"epochs": 1, "rank": 2, "batch_size": 2},
        recipes={
            "exact": {"strategy": "cluster_average", "rank": "exact", "scale": 1.5},
            "small": {"strategy": "cluster_average", "rank": 1},
            "own": {"strategy": "own"},
            "base": {"strategy": "base"},
        },
    )
