"""The two kinds of worker. Plain classes: the pool wraps them for Ray, `--local` calls them as they are.

Every method takes one task, writes its result into the task's folder unless it is there already, and returns a small
mapping: `skipped`, and what the driver wants to tell of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raymerge import storage
from raymerge.config import parse_size
from raymerge.manifest import is_complete, write_artefact
from raymerge.runtime.experts import ExpertCache, merge_to_folder
from raymerge.runtime.tasks import EmbedTask, EvaluateTask, GatherTask, MergeTask, SketchTask, TrainTask


class MergeWorker:
    """Merges adapters and other work that needs no base model."""

    def __init__(self, expert_cache: str = "256MiB") -> None:
        self.cache = ExpertCache(parse_size(expert_cache))

    def merge(self, task: MergeTask) -> dict[str, Any]:
        """Write one merged adapter."""
        return merge_to_folder(task, self.cache)

    def sketch(self, task: SketchTask) -> dict[str, Any]:
        """Write coordinates of adapters whose inner products are those of their deltas, nearly."""
        import numpy as np
        import pyarrow as pa

        from raymerge.merging.sketch import sketch
        from raymerge.runtime.experts import adapter_digest

        key = storage.digest_value(
            [task.dimensions, task.seed, [[name, adapter_digest(where)] for name, where in task.adapters]]
        )
        if is_complete(task.folder, key):
            return {"skipped": True}
        rows = [sketch(self.cache.read(name, where), task.dimensions, task.seed) for name, where in task.adapters]
        vectors = np.stack(rows).astype(np.float32)
        table = pa.table({"persona": [name for name, _ in task.adapters], "vector": list(vectors)})
        write_artefact(
            task.folder, {"vectors.parquet": storage.encode_parquet(table)}, {"dimensions": task.dimensions}, key
        )
        return {"skipped": False}

    def gather(self, task: GatherTask) -> dict[str, Any]:
        """Join the parts of an evaluation."""
        from raymerge.runtime.scoring import gather

        return gather(task)


def _device_here() -> str:
    """The GPU that Ray gave this process, if it gave one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class ModelWorker:
    """Holds a base model on one device: trains adapters on it, generates and scores answers with it."""

    def __init__(
        self, base_model: str, name: str, dtype: str = "auto", device: str = "auto", expert_cache: str = "256MiB"
    ) -> None:
        self.base_model = base_model
        self.name = name  # what adapters trained on it record
        self.dtype = dtype
        self.device = device if device != "auto" else _device_here()
        self.cache = ExpertCache(parse_size(expert_cache))
        self._base: Any = None
        self._encoders: dict[str, Any] = {}

    @property
    def base(self) -> Any:
        """The base model, loaded at first use and held."""
        if self._base is None:
            from raymerge.models.base import load_base

            loaded = load_base(str(storage.open_local(self.base_model)), device=self.device, dtype=self.dtype)
            self._base = replace(loaded, location=self.name)
        return self._base

    def encoder(self, model: str) -> Any:
        """A sentence encoder, loaded at first use and held."""
        if model not in self._encoders:
            from raymerge.routing.embeddings import load_encoder

            self._encoders[model] = load_encoder(model, device=self.device)
        return self._encoders[model]

    def train(self, task: TrainTask) -> dict[str, Any]:
        """Write the adapters of a training item."""
        from raymerge.runtime.training import train_to_folders

        return train_to_folders(task, self)

    def evaluate(self, task: EvaluateTask) -> dict[str, Any]:
        """Write the answers and scores of a part of a run."""
        from raymerge.runtime.scoring import evaluate_to_folder

        return evaluate_to_folder(task, self)

    def embed(self, task: EmbedTask) -> dict[str, Any]:
        """Write the embeddings of a part of the personas."""
        import pyarrow as pa

        from raymerge.personas import read_personas
        from raymerge.routing.embeddings import persona_embeddings

        personas = read_personas(task.personas)
        rows = {name: [[e.prompt, e.response] for e in personas.examples(name, "train")] for name in task.names}
        key = storage.digest_value([task.model, rows])
        if is_complete(task.folder, key):
            return {"skipped": True}
        names, vectors = persona_embeddings(personas, self.encoder(task.model), names=task.names)
        table = pa.table({"persona": list(names), "vector": list(vectors)})
        write_artefact(task.folder, {"vectors.parquet": storage.encode_parquet(table)}, {"model": task.model}, key)
        return {"skipped": False}
