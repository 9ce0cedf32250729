"""The two kinds of worker. Plain classes: the pool wraps them for Ray, `--local` calls them as they are.

Every method takes one task, writes its result into the task's folder unless it is there already, and returns a small
mapping: `skipped`, and what the driver wants to tell of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raymerge import storage
from raymerge.config import parse_size
from raymerge.runtime.experts import ExpertCache, merge_to_folder
from raymerge.runtime.tasks import (
    CheckTask,
    EmbedTask,
    EvaluateTask,
    GatherTask,
    MergeTask,
    PrefixTask,
    RouterTask,
    SketchTask,
    TrainTask,
    TuneTask,
)


class MergeWorker:
    """Merges adapters and other work that needs no base model."""

    def __init__(self, expert_cache: str = "256MiB") -> None:
        self.cache = ExpertCache(parse_size(expert_cache))

    def merge(self, task: MergeTask) -> dict[str, Any]:
        """Write one merged adapter."""
        return merge_to_folder(task, self.cache)

    def sketch(self, task: SketchTask) -> dict[str, Any]:
        """Write coordinates of adapters whose inner products are those of their deltas, nearly."""
        from raymerge.runtime.embedding import sketch_to_folder

        return sketch_to_folder(task, self.cache)

    def gather(self, task: GatherTask) -> dict[str, Any]:
        """Join the parts of an evaluation."""
        from raymerge.runtime.scoring import gather

        return gather(task)


def _placed(device: str, gpus: int) -> tuple[str, int]:
    """A device and a number of GPUs for the base; `auto` takes what this process sees, which may be less or nothing."""
    if device != "auto":
        return device, gpus if device == "cuda" else 1
    import torch

    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ("cuda", min(gpus, visible)) if visible else ("cpu", 1)


class ModelWorker:
    """Holds a base model: trains adapters on it, generates and scores answers with it.

    name: what adapters trained on it record. gpus: how many the base is spread over. The others as `load_base` says.
    """

    def __init__(
        self,
        base_model: str,
        name: str,
        dtype: str = "auto",
        quantization: str = "none",
        device: str = "auto",
        gpus: int = 1,
        expert_cache: str = "256MiB",
    ) -> None:
        self.base_model = base_model
        self.name = name
        self.dtype = dtype
        self.quantization = quantization
        self.device, self.gpus = _placed(device, gpus)
        self.cache = ExpertCache(parse_size(expert_cache))
        self._base: Any = None
        self._encoders: dict[str, Any] = {}

    @property
    def base(self) -> Any:
        """The base model, loaded at first use and held."""
        if self._base is None:
            from raymerge.models.base import load_base

            loaded = load_base(
                str(storage.open_local(self.base_model)), self.device, self.dtype, self.quantization, self.gpus
            )
            self._base = replace(loaded, location=self.name)
        return self._base

    @property
    def dtype_name(self) -> str:
        """The dtype that the base computes in and the bits it is kept in (`bfloat16 4bit`): results depend on both."""
        import torch

        from raymerge.models.base import resolve_dtype

        computed = str(resolve_dtype(self.dtype, torch.device(self.device))).removeprefix("torch.")
        return computed if self.quantization == "none" else f"{computed} {self.quantization}"

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

    def train_prefixes(self, task: PrefixTask) -> dict[str, Any]:
        """Write the prefixes of an item."""
        from raymerge.runtime.prefix import train_prefixes_to_folders

        return train_prefixes_to_folders(task, self)

    def train_router(self, task: RouterTask) -> dict[str, Any]:
        """Write the router of an item."""
        from raymerge.runtime.router import train_router_to_folder

        return train_router_to_folder(task, self)

    def tune(self, task: TuneTask) -> dict[str, Any]:
        """Write how similar the answers of each candidate are."""
        from raymerge.runtime.tuning import tune_to_folder

        return tune_to_folder(task, self)

    def embed(self, task: EmbedTask) -> dict[str, Any]:
        """Write the embeddings of a part of the personas."""
        from raymerge.runtime.embedding import embed_to_folder

        return embed_to_folder(task, self)

    def check(self, task: CheckTask) -> dict[str, Any]:
        """Say what base and own adapters make of training answers, and how fast they are. Writes nothing."""
        from raymerge.runtime.checking import check_model

        return check_model(task, self)
