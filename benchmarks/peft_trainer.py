"""One adapter by PEFT and transformers.Trainer, set up for a small model on one machine: the other side of training.py.

Nothing is logged, saved or evaluated; rows are tokenised beforehand and padded to the longest of their batch; labels
stand on answer tokens alone; the optimiser is AdamW with the schedule and the clipping that ours has.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.models.answers import TokenRow
from raymerge.models.base import BaseModel
from raymerge.models.training import TrainingSettings, learning_rate, steps_of

IGNORED = -100


@dataclass(frozen=True)
class Choices:
    """What may be set without changing the task, so that the quickest can be taken.

    fused: AdamW in one kernel. by_length: rows of similar length meet. autocast: bfloat16 by torch.autocast, as
    `bf16=True` does. plain_factors: factors in the base's dtype instead of float32.
    """

    fused: bool = True
    by_length: bool = False
    autocast: bool = False
    plain_factors: bool = False

    def __str__(self) -> str:
        return ", ".join(field.name for field in fields(self) if getattr(self, field.name)) or "plain AdamW"


def candidates(device: str, dtype: str) -> list[Choices]:
    """What may be quickest there."""
    if device == "cpu":
        return [Choices(), Choices(fused=False), Choices(by_length=True)]
    kinds = [Choices()]
    if dtype != "float32":
        kinds += [Choices(autocast=True), Choices(plain_factors=True)]
    return [replace(kind, by_length=by_length) for kind in kinds for by_length in (False, True)]


@dataclass(frozen=True)
class PeftResult:
    """seconds: of trainer.train() alone. losses: of each step, where they were asked for. modules: the factors."""

    seconds: float
    losses: tuple[float, ...]
    modules: dict[str, LoraModule]


def train_by_peft(
    base: BaseModel,
    rows: Sequence[TokenRow],
    settings: TrainingSettings,
    choices: Choices,
    *,
    start: LoraAdapter | None = None,
    watched: bool = False,
    seed: int = 0,
) -> PeftResult:
    """Train one adapter on tokenised rows; the base is as before afterwards.

    start: what the factors begin from, PEFT's own initial ones unless given. watched: keep the loss of each step, with
    the rows in their order: for a comparison of results, not of speed.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        return _train(base, rows, settings, choices, folder, start, seed, watched=watched)


def _train(
    base: BaseModel,
    rows: Sequence[TokenRow],
    settings: TrainingSettings,
    choices: Choices,
    folder: str,
    start: LoraAdapter | None,
    seed: int,
    *,
    watched: bool,
) -> PeftResult:
    transformers.set_seed(seed)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type=TaskType.CAUSAL_LM
    )
    model = get_peft_model(base.model, config, autocast_adapter_dtype=not choices.plain_factors)
    if start is not None:
        _begin_from(model, start)
    arguments = _arguments(settings, choices, folder, base, seed, in_order=watched)
    given: dict[str, Any] = {
        "model": model, "args": arguments, "train_dataset": [_features(row) for row in rows],
        "data_collator": lambda features: _pad(features, base.pad_id),
    }  # fmt: skip
    if watched:
        trainer: Trainer = _Watched(**given, optimizers=_same_schedule(model, len(rows), settings))
    else:
        trainer = Trainer(**given)
    trainer.remove_callback(PrinterCallback)
    seconds = float(trainer.train().metrics["train_runtime"])
    losses = tuple(float(loss) for loss in trainer.losses) if isinstance(trainer, _Watched) else ()
    modules = _factors(model) if watched else {}
    model.unload()
    base.model.eval().requires_grad_(False)
    return PeftResult(seconds, losses, modules)


class _Watched(Trainer):
    """A Trainer that keeps the loss of each step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses: list[Tensor] = []

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        """The loss, kept."""
        loss = super().compute_loss(*arguments, **named)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


def _arguments(
    settings: TrainingSettings, choices: Choices, folder: str, base: BaseModel, seed: int, *, in_order: bool
) -> TrainingArguments:
    order = "sequential" if in_order else "group_by_length" if choices.by_length else "random"
    return TrainingArguments(
        output_dir=folder, num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, warmup_steps=settings.warmup, lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay, max_grad_norm=settings.clip,
        optim="adamw_torch_fused" if choices.fused else "adamw_torch",
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_num_workers=0, dataloader_pin_memory=False, remove_unused_columns=False,
        gradient_checkpointing=False, train_sampling_strategy=order,
        use_cpu=base.device.type == "cpu", bf16=choices.autocast, seed=seed,
    )  # fmt: skip


def _features(row: TokenRow) -> dict[str, list[int]]:
    ids = [*row.prompt, *row.answer]
    return {"input_ids": ids, "labels": [IGNORED] * len(row.prompt) + list(row.answer)}


def _pad(features: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    width = max(len(one["input_ids"]) for one in features)

    def filled(key: str, value: int) -> Tensor:
        return torch.tensor([one[key] + [value] * (width - len(one[key])) for one in features])

    ids = filled("input_ids", pad_id)
    lengths = torch.tensor([[len(one["input_ids"])] for one in features])
    mask = (torch.arange(width)[None] < lengths).long()
    return {"input_ids": ids, "labels": filled("labels", IGNORED), "attention_mask": mask}


def _begin_from(model: Any, start: LoraAdapter) -> None:
    for path, module in start.modules.items():
        layer = model.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(module.A)
        layer.lora_B["default"].weight.data.copy_(module.B * (module.scaling / layer.scaling["default"]))


def _factors(model: Any) -> dict[str, LoraModule]:
    return {
        path.removeprefix("base_model.model."): LoraModule(
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
            layer.scaling["default"],
        )
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


def _same_schedule(model: Any, rows: int, settings: TrainingSettings) -> tuple[Any, Any]:
    """AdamW and our rates: transformers' first step has the rate 0."""
    steps = steps_of(rows, settings)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(factors, lr=1.0, weight_decay=settings.weight_decay, fused=True)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, steps, settings))


@contextmanager
def _quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
