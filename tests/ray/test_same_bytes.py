"""Random drops are drawn by name: the same seed gives the same bytes with one worker, with two, and without Ray."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import yaml

from raymerge.adapters import LoraAdapter, LoraModule, save_adapter
from raymerge.pipelines.merge import merge

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
METHODS = ("dare_ties", "della")


def write_project(folder: Path, workers: int) -> str:
    for number in range(6):
        random = torch.Generator().manual_seed(number)
        modules = {
            f"layers.{i}.q_proj": LoraModule(
                torch.randn(2, 96, generator=random), torch.randn(80, 2, generator=random), 2.0
            )
            for i in range(2)
        }
        save_adapter(LoraAdapter(f"p{number}", modules), str(folder / "adapters" / f"p{number}"))
    recipes = {
        method: {"strategy": "top_k", "k": 3, "method": method, "density": 0.5, "seed": 3, "rank": 2}
        for method in METHODS
    }
    project = {
        "adapters": "adapters/{persona}", "recipes": recipes, "hardware": {"max_merge_workers": workers},
    }  # fmt: skip
    (folder / "raymerge.yaml").write_text(yaml.safe_dump(project))
    return str(folder / "raymerge.yaml")


def merged(folder: Path, workers: int, *, local: bool = False) -> dict[str, str]:
    """Digests of the adapters' files, by their place below `runs`."""
    assert merge(write_project(folder, workers), local=local) == 0
    files = sorted((folder / "runs").rglob("adapters/*/adapter_model.safetensors"))
    assert len(files) == 6 * len(METHODS)
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_the_number_of_workers_changes_no_byte(tmp_path: Path):
    one = merged(tmp_path / "one", 1)
    assert merged(tmp_path / "two", 2) == one
    assert merged(tmp_path / "here", 1, local=True) == one
