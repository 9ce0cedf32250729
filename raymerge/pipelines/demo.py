"""`raymerge demo`: a world of personas made from a seed, and everything raymerge does with it."""

from __future__ import annotations

import os
from typing import Any

import yaml

from raymerge import storage
from raymerge.pipelines.run import run
from raymerge.world import make_world, pretrain

PROJECT = "raymerge.yaml"


def demo(out: str, *, quick: bool, relatedness: float | None, seed: int, local: bool = False) -> int:
    """Make the world (unless it is there), then `raymerge run` on it. Returns the exit status.

    out: folder for everything. relatedness: 0 (neighbours share nothing) to 1; None is the world's default.
    """
    folder = storage.resolve(os.getcwd(), out)
    storage.check_writable(folder)
    figures = make_world(folder, relatedness=relatedness, seed=seed, quick=quick)
    pretrain(folder, seed=seed, quick=quick)
    location = storage.join(folder, PROJECT)
    storage.write_bytes(location, project_file(quick, clusters=int(figures["clusters"])))
    return run(location, local=local)


def project_file(quick: bool, clusters: int) -> bytes:
    """The demo's project file. Its settings were chosen on the validation examples of the world of seed 0."""
    neighbours = {"temperature": 0.1, "self_weight": 0}
    k = 5 if quick else 15
    recipes: dict[str, dict[str, Any]] = {
        "base": {"strategy": "base"},
        "own": {"strategy": "own"},
        "unified": {"strategy": "unified"},
        "cluster_trained": {"strategy": "cluster_trained"},
        "simple_average": {"strategy": "simple_average"},
        "cluster_average": {"strategy": "cluster_average"},
        f"top_k{k}": {"strategy": "top_k", "k": k, **neighbours},
        f"sparse_moe_k{k}": {"strategy": "sparse_moe", "k": k, **neighbours},
        "soft": {"strategy": "soft", **neighbours},
        "hierarchical": {"strategy": "hierarchical", **neighbours},
        f"random_k{k}": {"strategy": "random_k", "of": f"top_k{k}"},
        "random_soft": {"strategy": "random_k", "of": "soft"},
        "random_cluster": {"strategy": "random_cluster", "of": f"sparse_moe_k{k}"},
        "shuffled": {"strategy": "shuffled", "of": f"sparse_moe_k{k}"},
        "oracle": {"strategy": "top_k", "k": k, **neighbours, "embedding": "traits.parquet"},
    }
    project = {
        "workspace": ".",
        "base_model": "base",
        "personas": "personas.jsonl",
        "clusters": {"count": clusters, "seed": 0},
        "training": {
            "rank": 8,
            "alpha": 16,
            "epochs": {"persona": 8, "cluster": 10 if quick else 5, "unified": 3},
            "learning_rate": {"persona": 4e-3, "cluster": 3e-3 if quick else 2e-3, "unified": 2e-3},
            "batch_size": {"persona": 6, "cluster": 16, "unified": 32},
        },
        "generation": {"prompt_format": "{prompt}", "max_new_tokens": 24},
        "hardware": {"cpus_per_model": 0.5, "cpus_per_merge": 0.5},
        "recipes": recipes,
    }
    return ("# Written by `raymerge demo`.\n" + yaml.safe_dump(project, sort_keys=False)).encode()
