"""A model worker on a tiny base, personas that ask and answer, and adapters that change what is answered."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.adapters import LoraAdapter, LoraModule, save_adapter
from raymerge.models.layers import linear_modules, shape_of
from raymerge.routing.embeddings import Encoder, load_encoder
from raymerge.runtime.tasks import AnswerSource, EvaluateTask, ExpertRef, MergeTask
from raymerge.runtime.workers import ModelWorker

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
NAMES = ("ada", "bob", "cyd")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bytes depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return load_encoder(ENCODER)


@pytest.fixture
def worker(tiny_llama: Path, encoder: Encoder) -> ModelWorker:
    torch.set_num_threads(1)
    worker = ModelWorker(str(tiny_llama), "tiny", dtype="float32", device="cpu")
    worker._encoders[ENCODER] = encoder  # loaded once for all tests
    return worker


@pytest.fixture
def personas(tmp_path: Path) -> str:
    """Three personas with 6 training, 2 validation and 3 test examples each; cyd has no training examples."""
    lines = []
    for i, name in enumerate(NAMES):
        for split, count in (("train", 6), ("validation", 2), ("test", 3)):
            for j in range(0 if (name, split) == ("cyd", "train") else count):
                prompt = f"w{(7 * i + 5 * j) % 56} w{(3 * j + len(split)) % 56} ?"
                response = f"w{(11 * i + j) % 56} w{(j + 2 * len(split)) % 56}."
                lines.append({"persona": name, "prompt": prompt, "response": response, "split": split})
    location = tmp_path / "personas.jsonl"
    location.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(location)


@pytest.fixture
def saved(worker: ModelWorker, tmp_path: Path) -> Callable[..., str]:
    """Writes a random adapter of the base; returns where it lies."""

    def save(name: str, seed: int, rank: int = 3, factor: float = 1.0, **more: Any) -> str:
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for path, layer in linear_modules(worker.base.model).items():
            if path != "lm_head":
                outer, inner = shape_of(layer)
                A, B = torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator)
                modules[path] = LoraModule(A * 0.3, B * 0.3 * factor, 1.0)
        location = tmp_path / "adapters" / name
        save_adapter(LoraAdapter(name, modules, base_model="tiny", task_type="CAUSAL_LM", **more), str(location))
        return str(location)

    return save


@pytest.fixture
def evaluate_task(personas: str, tmp_path: Path) -> EvaluateTask:
    """The base answers for everybody; to be replaced in part."""
    return EvaluateTask(
        folder=str(tmp_path / "evaluation"),
        sources=tuple(AnswerSource(name, "base") for name in NAMES),
        personas=personas,
        split="test",
        generation={"prompt_format": "{prompt}", "max_new_tokens": 6, "stop": []},
        similarity_model=ENCODER,
        batch_size=4,
        base_digest="sha256:base",
    )


def merge_task(
    name: str, experts: Sequence[tuple[str, str, float]], workspace: Path, scale: Any = 1.0, rank: Any = "keep",
    anchor: str = "auto",
) -> MergeTask:  # fmt: skip
    """A linear merge of experts (name, location, weight), as a recipe would have it done."""
    merges = {
        "method": "linear", "method_parameters": {}, "scale": scale, "rank": rank, "anchor": anchor, "dtype": None,
    }  # fmt: skip
    folder = str(workspace / "merged" / name)
    return MergeTask(name, folder, tuple(ExpertRef(*expert) for expert in experts), merges, str(workspace))


def source(persona: str, kind: Any, place: str | MergeTask) -> AnswerSource:
    """What answers for a persona: a location, or a merge."""
    one = AnswerSource(persona, kind)
    return replace(one, location=place) if isinstance(place, str) else replace(one, merge=place)
