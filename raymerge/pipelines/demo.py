"""`raymerge demo`: a world of personas made from a seed, and everything raymerge does with it."""

from __future__ import annotations

import os
from typing import Any

import yaml

from raymerge import storage
from raymerge.pipelines.run import run
from raymerge.world import make_world, pretrain

PROJECT = "raymerge.yaml"
ALL_ROWS = "all_rows.yaml"
NEIGHBOURS: dict[str, Any] = {"temperature": 0.1, "self_weight": 0}
RETRIEVAL: dict[str, Any] = {"examples": 1, "format": "{prompt}{response}</s><s>"}  # the best of those tried


def demo(
    out: str,
    *,
    quick: bool,
    relatedness: float | None,
    seed: int,
    all_rows: bool = False,
    seeds: int = 1,
    local: bool = False,
) -> int:
    """Make the world (unless it is there), then `raymerge run` on it. Returns the exit status.

    out: folder for everything. relatedness: 0 (neighbours share nothing) to 1; None is the world's default. all_rows:
    every baseline and strategy, with epochs and scales chosen on validation examples; its runs lie in `all/`. seeds:
    trainings of everything.
    """
    folder = storage.resolve(os.getcwd(), out)
    storage.check_writable(folder)
    figures = make_world(folder, relatedness=relatedness, seed=seed, quick=quick)
    pretrain(folder, seed=seed, quick=quick)
    location = storage.join(folder, ALL_ROWS if all_rows else PROJECT)
    storage.write_bytes(location, project_file(quick, clusters=int(figures["clusters"]), all_rows=all_rows))
    return run(location, seeds=seeds, local=local)


def project_file(quick: bool, clusters: int, *, all_rows: bool = False) -> bytes:
    """The demo's project file. Its settings were chosen on the validation examples of the world of seed 0."""
    project: dict[str, Any] = {
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
        "search": _search(quick),
        "recipes": _recipes(5 if quick else 15),
    }
    if all_rows:
        project |= {
            "adapters": "all/adapters/{persona}",
            "unified_adapter": "all/unified",
            "cluster_adapters": "all/clusters/{cluster}",
            "output": "all/runs",
            # rows are mostly merges, and an expert of these is trained best where it overfits by itself
            "training": {**project["training"], "epochs": _epochs(quick), "epochs_chosen_by": "neighbours"},
            "recipes": _all_recipes(quick),
        }
    return ("# Written by `raymerge demo`.\n" + yaml.safe_dump(project, sort_keys=False)).encode()


def _search(quick: bool) -> dict[str, Any]:
    """What `raymerge search` tries: the strategies that ask neighbours, and how."""
    return {
        "recipe": {"strategy": "top_k", "rank": "exact"},
        "space": {
            "strategy": ["top_k", "sparse_moe", "soft"],
            "k": {"min": 2, "max": 10 if quick else 40, "log": True},
            "temperature": {"min": 0.02, "max": 1.0, "log": True},
            "self_weight": {"min": 0.0, "max": 0.5},
            "scale": {"min": 0.5, "max": 2.0, "log": True},
            "centred": [True, False],
        },
        **({"smallest": 6} if quick else {}),
    }


def _recipes(k: int) -> dict[str, dict[str, Any]]:
    return {
        "base": {"strategy": "base"},
        "own": {"strategy": "own"},
        "unified": {"strategy": "unified"},
        "cluster_trained": {"strategy": "cluster_trained"},
        "simple_average": {"strategy": "simple_average"},
        "cluster_average": {"strategy": "cluster_average"},
        f"top_k{k}": {"strategy": "top_k", "k": k, **NEIGHBOURS},
        f"sparse_moe_k{k}": {"strategy": "sparse_moe", "k": k, **NEIGHBOURS},
        "soft": {"strategy": "soft", **NEIGHBOURS},
        "hierarchical": {"strategy": "hierarchical", **NEIGHBOURS},
        f"random_k{k}": {"strategy": "random_k", "of": f"top_k{k}"},
        "random_soft": {"strategy": "random_k", "of": "soft"},
        "random_cluster": {"strategy": "random_cluster", "of": f"sparse_moe_k{k}"},
        "shuffled": {"strategy": "shuffled", "of": f"sparse_moe_k{k}"},
        "oracle": {"strategy": "top_k", "k": k, **NEIGHBOURS, "embedding": "traits.parquet"},
    }


def _epochs(quick: bool) -> dict[str, list[int]]:
    """What is tried: up to twice of what the demo trains with, and half of it."""
    return {"persona": [4, 8, 16], "cluster": [5, 10, 20] if quick else [3, 5, 10], "unified": [2, 3, 6]}


def _all_recipes(quick: bool) -> dict[str, dict[str, Any]]:
    """Every row that readers ask for; each that has a scale chooses it from the same grid."""
    k = 5 if quick else 15
    top = {"strategy": "top_k", "k": k, **NEIGHBOURS}
    recipes = {
        **_recipes(k),
        "hybrid": {"strategy": "hybrid"},
        "neighbours_trained": {"strategy": "neighbours_trained", "of": f"top_k{k}", "epochs": [2, 4]},
        "rag+unified": {"strategy": "unified", "retrieval": RETRIEVAL},
        f"rag+top_k{k}": {**top, "retrieval": RETRIEVAL},
    }
    tuned = {
        name: recipe if name == "base" or "of" in recipe else {**recipe, "scale": "tuned"}
        for name, recipe in recipes.items()
    }
    return {
        **tuned,
        "neighbours_trained": {**recipes["neighbours_trained"], "scale": "tuned"},
        "selective": {"strategy": "selective"},
        "prefix": {"strategy": "prefix", "learning_rate": 0.1, "epochs": [16, 48] if quick else [8, 16]},
        "rag": {"strategy": "base", "retrieval": RETRIEVAL},
    }
