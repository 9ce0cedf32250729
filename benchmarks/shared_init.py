"""Shared against independent initial A: what it changes for merging, on the demo's world.

    python benchmarks/shared_init.py --world made/ --json shared_init.json    200 personas, kept in the folder
    python benchmarks/shared_init.py --quick --world small/                    24 personas

Every persona's own adapter is trained twice, from one A for all and from an A of its own, on the same rows. Each
persona then gets the merge of its 5 most similar (top_k by embedding, match_norm), compressed in three ways. Error is
that of the compression, over all modules, relative in the Frobenius norm; similarity is that of answers to test
questions with the references (MiniLM), x 100, mean over personas. A shared A is a single draw for everybody, so all is
done for several training seeds: the interval of the difference is over personas, and its mean is printed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
from numpy.typing import NDArray

from raymerge.adapters import LoraAdapter
from raymerge.evaluation.metrics import similarity
from raymerge.evaluation.statistics import bootstrap_means, interval
from raymerge.merging.merge import merge
from raymerge.models.base import BaseModel, load_base
from raymerge.models.generation import GenerationSettings, generate
from raymerge.models.multilora import MultiLora
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.personas import Personas, read_personas
from raymerge.routing.embeddings import Encoder, load_encoder, make_embeddings, persona_embeddings
from raymerge.routing.inputs import RoutingInputs
from raymerge.routing.strategies import route
from raymerge.routing.table import RoutingTable
from raymerge.world import make_world, pretrain
from raymerge.world.make import ENCODER

RANKS: dict[str, Any] = {"8": 8, "energy .95, max 64": {"energy": 0.95, "max": 64}, "exact": "exact"}
Adapters = dict[str, LoraAdapter]
KINDS = {"shared": True, "independent": False}


@dataclass(frozen=True)
class Scored:
    """Of each persona: similarity x 100, and of its merge the compression error and the mean rank over modules."""

    similarity: NDArray[np.float64]
    error: NDArray[np.float64]
    rank: NDArray[np.float64]


def world_in(folder: Path, quick: bool) -> tuple[Personas, BaseModel]:
    """The personas and the pre-trained base of a world, made where they are not there."""
    if not (folder / "world.json").exists():
        make_world(str(folder), quick=quick, embedding_model=None)
    base = folder / "base" if (folder / "base" / "config.json").exists() else pretrain(str(folder), quick=quick)
    return read_personas(str(folder / "personas.jsonl")), load_base(str(base))


def train_own(base: BaseModel, personas: Personas, names: list[str], seed: int, *, shared: bool) -> Adapters:
    """Every persona's own adapter, with the demo's settings."""
    settings = TrainingSettings(epochs=8, learning_rate=4e-3, batch_size=6, seed=seed, shared_init=shared)
    groups = [TrainingGroup(name, [(e.prompt, e.response) for e in personas.examples(name, "train")]) for name in names]
    return {trained.adapter.name: trained.adapter for trained in train(base, groups, settings)}


def choose_experts(personas: Personas, names: list[str], encoder: Encoder) -> RoutingTable:
    """Each persona's 5 most similar others."""
    embeddings = make_embeddings(*persona_embeddings(personas, encoder, names=names))
    return route("top_k", {"k": 5}, RoutingInputs(names, names, embeddings))[0]


def score(base: BaseModel, encoder: Encoder, personas: Personas, merged: Adapters) -> Scored:
    """Answers of every persona's adapter to its test questions."""
    names = list(merged)
    examples = [example for name in names for example in personas.examples(name, "test")]
    lora = MultiLora(base.model)
    lora.load(list(merged.values()))
    prompts, owners = [e.prompt for e in examples], [names.index(e.persona) for e in examples]
    answers = generate(base, lora, prompts, owners, GenerationSettings(max_new_tokens=24), batch_size=320)
    lora.detach()
    points = 100 * similarity(encoder, answers, [e.response for e in examples]).astype(np.float64)
    means = np.bincount(owners, points) / np.bincount(owners)
    errors = [adapter.errors.get("*", 0.0) for adapter in merged.values()]
    ranks = [np.mean([m.rank for m in adapter.modules.values()]) for adapter in merged.values()]
    return Scored(means, np.array(errors), np.array(ranks, dtype=np.float64))


def score_kind(
    base: BaseModel, encoder: Encoder, personas: Personas, own: Adapters, table: RoutingTable
) -> dict[str, Scored]:
    """The own adapters, and the merges at each rank."""
    found = {"own, unmerged": score(base, encoder, personas, own)}
    for label, rank in RANKS.items():
        merged = {}
        for name in own:
            row = table.row(name)
            experts = [own[expert] for expert in row]
            merged[name] = merge(experts, list(row.values()), rank=rank, scale="match_norm", name=name)
        found[label] = score(base, encoder, personas, merged)
    return found


def as_json(found: list[dict[str, dict[str, Scored]]]) -> list[dict[str, Any]]:
    """One row for each rank, means over seeds: both kinds, and the difference of similarity with its 95 % interval."""
    rows = []
    for label in found[0]["shared"]:
        row: dict[str, Any] = {"rank": label}
        for kind in KINDS:
            scored = [seed[kind][label] for seed in found]
            row[kind] = {
                "similarity": float(np.mean([one.similarity for one in scored])),
                "error": float(np.mean([one.error for one in scored])),
                "mean_rank": float(np.mean([one.rank for one in scored])),
            }
        by_seed = np.array([s["shared"][label].similarity - s["independent"][label].similarity for s in found])
        difference = by_seed.mean(axis=0)
        low, high = interval(bootstrap_means(difference[:, None]), len(difference))
        row["difference"] = {
            "mean": float(difference.mean()), "low": float(low[0]), "high": float(high[0]),
            "by_seed": by_seed.mean(axis=1).tolist(),
        }  # fmt: skip
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"\n{'':18s} {'shared A':>19s} {'independent A':>19s} similarity, shared - independent")
    print(f"{'merge of 5, rank':18s}" + 2 * f" {'error':>6s} {'rank':>5s} {'simil.':>6s}" + f"{'by seed':>31s}")
    for row in rows:
        cells = "".join(
            f" {row[kind]['error']:6.3f} {row[kind]['mean_rank']:5.1f} {row[kind]['similarity']:6.2f}" for kind in KINDS
        )
        gain = row["difference"]
        seeds = " ".join(f"{value:+.2f}" for value in gain["by_seed"])
        print(f"{row['rank']:18s}{cells} {gain['mean']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})  {seeds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, help="where a world is or is to be made; a temporary folder otherwise")
    parser.add_argument("--quick", action="store_true", help="make the small world")
    parser.add_argument("--personas", type=int, default=200, help="the first so many")
    parser.add_argument("--seeds", type=int, default=3, help="of the training")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    command = " ".join(["python", *sys.argv])
    print(f"{command}\n{machine}")
    with tempfile.TemporaryDirectory() as temporary:
        personas, base = world_in(arguments.world or Path(temporary), arguments.quick)
        names = list(personas.names)[: arguments.personas]
        encoder = load_encoder(ENCODER)
        table = choose_experts(personas, names, encoder)
        found: list[dict[str, dict[str, Scored]]] = [{} for _ in range(arguments.seeds)]
        for seed, (kind, shared) in itertools.product(range(arguments.seeds), KINDS.items()):
            begun = time.perf_counter()
            own = train_own(base, personas, names, seed, shared=shared)
            seconds = time.perf_counter() - begun
            print(f"seed {seed}, {kind}: {len(own)} adapters trained in {seconds:.0f} s", flush=True)
            found[seed][kind] = score_kind(base, encoder, personas, own, table)
    rows = as_json(found)
    show(rows)
    if arguments.json:
        told = {"machine": machine, "command": command, "personas": len(names), "seeds": arguments.seeds, "rows": rows}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
