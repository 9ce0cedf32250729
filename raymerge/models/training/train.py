"""Many adapters trained at once against one frozen base model.

Adapters of equally many rows share every batch: adapter 0's rows first, then adapter 1's, and so on. Nothing couples
them: each has its own loss, its own gradient norm, its own optimiser state, so the result is what training each alone
with the same rows in the same order gives (1e-4 relative in float32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raymerge.adapters.adapter import LoraAdapter
from raymerge.errors import ModelError
from raymerge.models.answers import AnswerHead, TokenRow, encode_rows, pad_right
from raymerge.models.base import BaseModel
from raymerge.models.layers import is_transposed, linear_modules, shape_of
from raymerge.models.stacked import (
    StackedModule,
    attached,
    clip_per_adapter,
    first_factors,
    refresh,
    stack_module,
    unstack,
)
from raymerge.models.training.settings import (
    Trained,
    TrainingGroup,
    TrainingSettings,
    Unwatched,
    Watch,
    check_settings,
    learning_rate,
)

# Tokens of one step: enough to keep the products large, few enough to stay in the caches of a CPU.
_TOKENS = {"cpu": 4096, "cuda": 32768}


def train(
    base: BaseModel,
    groups: Sequence[TrainingGroup],
    settings: TrainingSettings,
    start_from: LoraAdapter | None = None,
    watch: Watch | None = None,
    state: bytes | None = None,
) -> list[Trained]:
    """Train one adapter for each group; the results stand in the order of the groups.

    start_from: every adapter begins from a copy of this one, and records its name.
    watch: is told of each step and each adapter that is done.
    Loss: mean cross entropy over an adapter's own answer tokens (the end token included) in the batch. Optimiser:
    AdamW (Loshchilov and Hutter 2019) with linear warm-up and cosine decay.
    Raises ModelError if settings are impossible, a group has no rows, or start_from does not fit;
    UnsupportedAdapterError if start_from holds more than deltas of linear modules.
    """
    check_settings(groups, settings)
    layers = _targets(base, settings.target_modules)
    if start_from is not None:
        _check_start(start_from, layers, settings)
    encoded = [
        encode_rows(base, [p for p, _ in g.rows], [a for _, a in g.rows], end=True, limit=settings.max_length)
        for g in groups
    ]
    chunks = _chunks(encoded, settings, base)
    watch = watch or Unwatched()
    results: dict[int, Trained] = {}
    for chunk in chunks:
        names = [groups[i].name for i in chunk]
        stack = _initial(base, layers, names, settings, start_from)
        losses, tokens = _train_chunk(base, layers, stack, [encoded[i] for i in chunk], settings)
        for place, number in enumerate(chunk):
            adapter = _adapter(base, stack, layers, place, names[place], start_from)
            results[number] = Trained(adapter, tuple(losses[:, place].tolist()), tokens[place])
            watch.finished(results[number])
    return [results[number] for number in range(len(groups))]


def _targets(base: BaseModel, wanted: str | tuple[str, ...]) -> dict[str, nn.Module]:
    """Layers that get factors, sorted by path. Raises ModelError if a name matches none."""
    linear = linear_modules(base.model)
    if wanted == "all-linear":
        head = base.model.get_output_embeddings()
        return {name: linear[name] for name in sorted(linear) if linear[name] is not head}
    names = (wanted,) if isinstance(wanted, str) else wanted
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in linear):
            ends = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in linear}))
            raise ModelError(f"training.target_modules names {name!r}, which {base.location} lacks.\nIt has: {ends}.")
    matches = tuple(f".{name}" for name in names)
    return {path: linear[path] for path in sorted(linear) if f".{path}".endswith(matches)}


def _check_start(start: LoraAdapter, layers: Mapping[str, nn.Module], settings: TrainingSettings) -> None:
    start.require_plain("cannot be trained further")
    for name, header in start.headers.items():
        if name not in layers:
            raise ModelError(
                f"start_from {start.name}: it changes {name}, which this training does not.\n"
                "Set training.target_modules so that it covers the adapter's modules."
            )
        expected = shape_of(layers[name])
        if header.shape != expected:
            raise ModelError(f"start_from {start.name}: {name} is {header.shape}, the model's is {expected}.")
        if header.rank != settings.rank:
            raise ModelError(
                f"start_from {start.name}: {name} has rank {header.rank}, training.rank is {settings.rank}.\n"
                "A copy keeps its rank: set training.rank to it, or compress the adapter first."
            )


def _chunks(encoded: Sequence[Sequence[TokenRow]], settings: TrainingSettings, base: BaseModel) -> list[list[int]]:
    """Groups of equally many rows, in their order, cut to so many as fill a step."""
    of_size: dict[int, list[int]] = {}
    for number, rows in enumerate(encoded):
        of_size.setdefault(len(rows), []).append(number)
    chunks = []
    for size, members in sorted(of_size.items()):
        longest = max(len(row) for number in members for row in encoded[number])
        budget = _TOKENS.get(base.device.type, _TOKENS["cuda"])
        fitting = settings.together or max(1, budget // (min(size, settings.batch_size) * longest))
        count = math.ceil(len(members) / fitting)
        chunks += [part.tolist() for part in np.array_split(np.array(members), count)]
    return chunks


def _initial(
    base: BaseModel,
    layers: Mapping[str, nn.Module],
    names: Sequence[str],
    settings: TrainingSettings,
    start: LoraAdapter | None,
) -> dict[str, StackedModule]:
    scaling = settings.scaling
    drawn_for = [""] * len(names) if settings.shared_init else list(names)
    stack = {}
    for path, layer in layers.items():
        outer, inner = shape_of(layer)
        copied = start.modules.get(path) if start is not None else None
        if copied is None:
            A = first_factors(drawn_for, settings.seed, path, settings.rank, inner)
            Bt = torch.zeros(len(names), settings.rank, outer)
        else:
            A = copied.A.float().expand(len(names), -1, -1)
            Bt = (copied.B.float() * (copied.scaling / scaling)).T.expand(len(names), -1, -1)
        stack[path] = stack_module(layer, A.contiguous(), Bt.contiguous(), scaling)
    return stack


def batch_order(rows: int, settings: TrainingSettings) -> list[Tensor]:
    """Which rows a step takes, by their rank in length: int64 (batch,) for each step.

    Rows of similar length meet, so that little is padding; a jitter of the ranks changes the company from epoch to
    epoch, and the batches come in random order. All of it depends on (rows, seed, epoch) alone: adapters in one
    chunk walk in step, and each as if it were alone.
    """
    steps = []
    count = math.ceil(rows / settings.batch_size)
    for epoch in range(settings.epochs):
        generator = np.random.Generator(np.random.PCG64([settings.seed, epoch, rows]))
        jittered = np.argsort(np.arange(rows) + generator.uniform(0, settings.batch_size, rows), kind="stable")
        batches = np.array_split(jittered, count)
        steps += [torch.from_numpy(np.sort(batches[i])) for i in generator.permutation(count)]
    return steps


def _train_chunk(
    base: BaseModel,
    layers: Mapping[str, nn.Module],
    stack: Mapping[str, StackedModule],
    encoded: Sequence[Sequence[TokenRow]],
    settings: TrainingSettings,
) -> tuple[Tensor, list[int]]:
    """Train the adapters of a chunk in place; losses (steps, adapters) on the CPU, and answer tokens of each."""
    batches = _Batches(encoded, base)
    factors = [factor for module in stack.values() for factor in (module.A, module.Bt)]
    optimiser = torch.optim.AdamW(factors, lr=0.0, weight_decay=settings.weight_decay, fused=True)
    head = base.model.get_output_embeddings()
    answer_head = AnswerHead(base, adapted=any(layer is head for layer in layers.values()))
    order = batch_order(len(encoded[0]), settings)
    losses = []
    with attached(layers, stack):
        for step, ranks in enumerate(order):
            ids, places, targets, counts = batches.take(ranks)
            nats = nn.functional.cross_entropy(answer_head.logits(ids, places), targets, reduction="none")
            everywhere = nats.new_zeros(ids.numel()).index_copy(0, places, nats)  # one order of summing on any device
            own = everywhere.view(len(counts), -1).sum(1) / counts
            torch.autograd.backward(own.sum())
            clip_per_adapter(stack, settings.clip)
            for part in optimiser.param_groups:
                part["lr"] = learning_rate(step, len(order), settings)
            optimiser.step()
            refresh(stack)
            losses.append(own.detach())
    return torch.stack(losses).cpu(), batches.answer_tokens


class _Batches:
    """The rows of a chunk's adapters on the device, each adapter's sorted by length."""

    def __init__(self, encoded: Sequence[Sequence[TokenRow]], base: BaseModel) -> None:
        ordered = [sorted(rows, key=len) for rows in encoded]
        batch = pad_right([row for rows in ordered for row in rows], base.pad_id)
        shape = (len(encoded), len(encoded[0]), -1)
        lengths = torch.tensor([[len(row) for row in rows] for rows in ordered])
        self.longest = lengths.amax(0)
        self.ids = batch.ids.view(shape).to(base.device)
        self.answer = batch.answer.view(shape).to(base.device)
        self.answer_tokens = [sum(len(row.answer) for row in rows) for rows in ordered]

    def take(self, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A step's ids (adapters * batch, width), the places that predict an answer token, their targets, and how many
        each adapter has."""
        width = int(self.longest[ranks].max())
        chosen = ranks.to(self.ids.device)
        ids = self.ids.index_select(1, chosen)[:, :, :width]
        answer = self.answer.index_select(1, chosen)[:, :, :width]
        owner, row, column = torch.nonzero(answer, as_tuple=True)
        targets = ids[owner, row, column]
        places = (owner * len(ranks) + row) * width + column - 1
        return ids.flatten(0, 1).contiguous(), places, targets, answer.sum((1, 2))


def _adapter(
    base: BaseModel,
    stack: Mapping[str, StackedModule],
    layers: Mapping[str, nn.Module],
    place: int,
    name: str,
    start: LoraAdapter | None,
) -> LoraAdapter:
    return LoraAdapter(
        name=name,
        modules={path: unstack(module, place) for path, module in stack.items()},
        base_model=base.location,
        fan_in_fan_out=any(is_transposed(layer) for layer in layers.values()),
        task_type="CAUSAL_LM",
        started_from=start.name if start is not None else None,
        errors={},
    )
