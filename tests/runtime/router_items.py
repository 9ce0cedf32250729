"""A router item on a tiny base: personas, adapters and embeddings, and a way to stop it in the middle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raymerge import storage
from raymerge.adapters import LoraAdapter, LoraModule, save_adapter
from raymerge.config.router import Router
from raymerge.models.base import BaseModel
from raymerge.models.layers import linear_modules, shape_of
from raymerge.routing.embeddings import encode_embeddings, make_embeddings
from raymerge.routing.similarity import mean_direction
from raymerge.runtime import router
from raymerge.runtime.router import RouterRecorder
from raymerge.runtime.tasks import RouterTask
from raymerge.runtime.workers import ModelWorker
from tests.runtime.training_items import Gated

ROWS = {"ada": 5, "bob": 4, "cyd": 6, "dot": 5, "eva": 3, "fay": 5}
NAMES = tuple(ROWS)
STEPS = 3 * (3 + 3 + 2)  # of three epochs, two personas with two rows at a time: one round has four personas left
TINY = {
    "epochs": 3, "k": 2, "candidates": 3, "rank": 4, "personas_per_step": 2, "rows_per_persona": 2,
    "learning_rate": 0.1, "checkpoint_every": 0, "weighting": "entmax",
}  # fmt: skip


def random_adapter(base: BaseModel, name: str, seed: int, rank: int = 2, **more: Any) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, layer in linear_modules(base.model).items():
        if path != "lm_head":
            outer, inner = shape_of(layer)
            A, B = torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator)
            modules[path] = LoraModule(A * 0.2, B * 0.2, 1.0)
    return LoraAdapter(name, modules, base_model="tiny", task_type="CAUSAL_LM", **more)


def write_world(folder: Path, base: BaseModel) -> None:
    """Six personas in two clusters with an adapter each, and where they lie among embeddings."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"persona": name, "prompt": f"w{i} w{j}?", "response": f"w{2 * i + j} w{i + 2}.", "split": split}
        for i, (name, rows) in enumerate(ROWS.items())
        for split, count in (("train", rows), ("validation", 4), ("test", 1))
        for j in range(count)
    ]
    write_personas(folder, lines)
    for number, name in enumerate(NAMES):
        save_adapter(random_adapter(base, name, number), str(folder / "adapters" / name))
    vectors = np.random.default_rng(0).normal(size=(len(NAMES), 6)).astype(np.float32)
    placing = str(folder / "placing")
    storage.write_bytes(f"{placing}/vectors.parquet", encode_embeddings(make_embeddings(NAMES, vectors)))
    storage.write_json(f"{placing}/mean.json", mean_direction(vectors).tolist())
    storage.write_json(f"{placing}/labels.json", {name: f"cluster_0{i % 2}" for i, name in enumerate(NAMES)})


def write_personas(folder: Path, lines: list[dict[str, str]]) -> None:
    (folder / "personas.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "personas.jsonl").read_text().splitlines()]


def make_task(folder: Path, held_out: tuple[str, ...] = (), tuning_examples: int = 2, **settings: Any) -> RouterTask:
    """The item of a world; every step is checkpointed unless said otherwise."""
    return RouterTask(
        embedding="texts by an encoder",
        folder=str(folder / "router"),
        names=NAMES,
        held_out=held_out,
        experts=tuple((name, str(folder / "adapters" / name)) for name in NAMES),
        placing=str(folder / "placing"),
        personas=str(folder / "personas.jsonl"),
        settings=Router(**{**TINY, **settings}).model_dump(mode="json"),
        tuning_examples=tuning_examples,
        prompt_format="{prompt}",
        base_digest="sha256:base",
        workspace=str(folder),
    )


def digests(folder: Path) -> dict[str, str]:
    """Of every file of a router."""
    files = sorted(p for p in (folder / "router").rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Stopped(BaseException):
    """Nothing of ours catches it."""


def run_stopped(task: RouterTask, worker: ModelWorker, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a training after a step, as a signal would."""

    class Stopping(RouterRecorder):
        seen = 0

        def stepped(self, progress: Any, tokens: int) -> None:
            super().stepped(progress, tokens)
            self.seen += 1
            if self.seen == step:
                raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(router, "RouterRecorder", Stopping)
        with pytest.raises(Stopped):
            worker.train_router(task)


class RouterGate(Gated, RouterRecorder):
    """Of a router."""
