"""Processes that hold one base each, and what training.py has them do: our training, PEFT's, and the floor."""

from __future__ import annotations

import gc
import math
import multiprocessing
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft_trainer import Choices, train_by_peft
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.models.answers import TokenRow, encode_rows
from raymerge.models.base import DTYPES, BaseModel
from raymerge.models.layers import linear_modules, shape_of
from raymerge.models.training import TrainingGroup, TrainingSettings, steps_of, train
from raymerge.world.population import WorldSettings, examples, populate
from raymerge.world.pretrain import untrained

Rows = tuple[tuple[str, str], ...]
LONG, PROMPT = 256, 64  # tokens of a long row, and of its prompt


@dataclass(frozen=True)
class Size:
    """hidden x layers x vocabulary; without a vocabulary the demo's words."""

    hidden: int
    layers: int
    vocabulary: int | None = None

    def __str__(self) -> str:
        return "x".join(str(part) for part in (self.hidden, self.layers, self.vocabulary) if part is not None)


@dataclass(frozen=True)
class Place:
    """Where a process computes."""

    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Job:
    """Adapters to train: the rows of each by name."""

    groups: tuple[tuple[str, Rows], ...]
    settings: TrainingSettings


@dataclass(frozen=True)
class Done:
    """What a job took. busy: processor seconds, which other work on the machine hardly changes. loop: of `seconds`,
    those of Trainer's own loop. tokens: of all steps, without padding. computed: tokens that went through the model,
    padding and idle slots included."""

    seconds: float
    busy: float
    tokens: int
    computed: int
    loop: float = 0.0


class Crew:
    """Processes that each hold the base, take one job after the other, and wait idle in between."""

    def __init__(self, size: Size, place: Place, count: int) -> None:
        self.count = count
        context = multiprocessing.get_context("spawn")
        self._processes = [
            ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(size, place)) for _ in range(count)
        ]
        self.each(_ready)

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same in every process at the same time."""
        return [future.result() for future in [p.submit(function, *arguments) for p in self._processes]]

    def deal(self, function: Callable[..., Done], jobs: Sequence[tuple[Any, ...]]) -> tuple[float, list[Done]]:
        """Seconds until all jobs are done, and their results; a process takes the next job when it is free."""
        waiting = deque(jobs)
        results: list[Done] = []

        def work(process: ProcessPoolExecutor) -> None:
            while waiting:
                results.append(process.submit(function, *waiting.popleft()).result())

        begun = time.perf_counter()
        with ThreadPoolExecutor(self.count) as threads:
            list(threads.map(work, self._processes))
        return time.perf_counter() - begun, results

    def peak(self) -> float:
        """MiB above the loaded base, of the process that took most."""
        return max(self.each(_peak))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.shutdown()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_base: BaseModel
_loaded: float  # MiB when the base was loaded
_computed = 0


def _begin(size: Size, place: Place) -> None:
    global _base, _loaded
    torch.set_num_threads(place.threads)
    _base = make_base(size, place)
    _base.model.get_input_embeddings().register_forward_pre_hook(_count)
    gc.collect()
    gc.freeze()  # accelerate collects garbage in every training: here only what trainings leave
    _loaded = _memory(peak=False)


def _ready() -> None:
    pass


def _count(_module: Any, inputs: tuple[Tensor, ...]) -> None:
    global _computed
    _computed += inputs[0].numel()


def _memory(*, peak: bool) -> float:
    if _base.device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    name = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) / 2**10


def _peak() -> float:
    return _memory(peak=True) - _loaded


def make_base(size: Size, place: Place) -> BaseModel:
    """A Llama with random weights and the demo's words."""
    base = untrained(0)
    if str(size) != "128x4":
        config = LlamaConfig(
            vocab_size=size.vocabulary or len(base.tokenizer), hidden_size=size.hidden,
            intermediate_size=size.hidden * 43 // 16, num_hidden_layers=size.layers,
            num_attention_heads=max(1, size.hidden // 64), num_key_value_heads=max(1, size.hidden // 64),
            max_position_embeddings=2 * LONG, tie_word_embeddings=True, bos_token_id=base.tokenizer.bos_token_id,
            eos_token_id=base.tokenizer.eos_token_id, pad_token_id=base.tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        base = replace(base, model=LlamaForCausalLM(config))
    device, dtype = torch.device(place.device), DTYPES[place.dtype]
    base.model.to(device, dtype).eval().requires_grad_(False)
    return replace(base, device=device, dtype=dtype)


def world_rows() -> list[tuple[str, Rows]]:
    """The training rows of the demo's 200 personas, by name."""
    rows: dict[str, list[tuple[str, str]]] = {}
    for example in examples(populate(WorldSettings())):
        if example["split"] == "train":
            rows.setdefault(example["persona"], []).append((example["prompt"], example["response"]))
    return [(name, tuple(rows[name])) for name in sorted(rows)]


def unequal_rows(count: int) -> list[tuple[str, Rows]]:
    """5 to 60 rows each, most of them few, one in twenty more than 40."""
    sizes = np.random.default_rng(0).lognormal(math.log(14), 0.65, count).round().clip(5, 60).astype(int)
    source = iter([row for _, rows in world_rows() for row in rows] * (1 + count // 100))
    return [(f"persona_{number:04d}", tuple(islice(source, int(size)))) for number, size in enumerate(sizes)]


def long_rows(count: int) -> Rows:
    """Rows of LONG tokens, the end token counted."""
    tokenizer = untrained(0).tokenizer
    texts = " ".join(f"{prompt} {answer}" for _, rows in world_rows()[:40] for prompt, answer in rows)
    ids = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] * (1 + count // 100))
    parts = [(list(islice(ids, PROMPT - 1)), list(islice(ids, LONG - PROMPT - 1))) for _ in range(count)]
    return tuple((tokenizer.decode(prompt), tokenizer.decode(answer)) for prompt, answer in parts)


def _encoded(rows: Rows) -> list[TokenRow]:
    return encode_rows(_base, [prompt for prompt, _ in rows], [answer for _, answer in rows], end=True)


def _tokens(job: Job) -> int:
    return job.settings.epochs * sum(len(row) for _, rows in job.groups for row in _encoded(rows))


def by_us(job: Job) -> Done:
    """All adapters of a job by one call of train()."""
    before, groups = _computed, [TrainingGroup(name, rows) for name, rows in job.groups]
    begun, busy = time.perf_counter(), time.process_time()
    trained = train(_base, groups, job.settings)
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    for result in trained:
        rows = dict(job.groups)[result.adapter.name]
        assert len(result.losses) == steps_of(len(rows), job.settings)
        assert not result.diverged
    return Done(seconds, busy, _tokens(job), _computed - before)


def by_peft(job: Job, choices: Choices) -> Done:
    """The adapters of a job by PEFT and Trainer, one after the other; tokenising is not counted."""
    before, encoded = _computed, [_encoded(rows) for _, rows in job.groups]
    begun, busy = time.perf_counter(), time.process_time()
    loop = sum(train_by_peft(_base, rows, job.settings, choices).seconds for rows in encoded)
    seconds, busy = time.perf_counter() - begun, time.process_time() - busy
    return Done(seconds, busy, _tokens(job), _computed - before, loop)


def compare_work(rows: Rows, settings: TrainingSettings) -> tuple[float, float]:
    """How far our training and Trainer's are apart, on one batch of rows in each epoch and from the same factors:
    largest relative difference of a step's losses, and relative difference of what the adapters learned."""
    rows, settings = rows[: settings.batch_size], replace(settings, clip=1.0)
    start = _random_adapter(settings)
    ours = train(_base, [TrainingGroup("same", rows)], settings, start_from=start)[0]
    theirs = train_by_peft(_base, _encoded(rows), settings, Choices(), start=start, watched=True)
    assert len(ours.losses) == len(theirs.losses) == settings.epochs
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    learned = missed = 0.0
    for path, module in theirs.modules.items():
        begun, expected, found = (_delta(m) for m in (start.modules[path], module, ours.adapter.modules[path]))
        learned += float((expected - begun).square().sum())
        missed += float((expected - found).square().sum())
    return apart, math.sqrt(missed / learned)


def _random_adapter(settings: TrainingSettings) -> LoraAdapter:
    generator = torch.Generator().manual_seed(3)
    head = _base.model.get_output_embeddings()
    modules = {}
    for path, layer in linear_modules(_base.model).items():
        if layer is not head:
            outer, inner = shape_of(layer)
            A = torch.randn(settings.rank, inner, generator=generator) / inner**0.5
            B = torch.randn(outer, settings.rank, generator=generator) * 0.01
            modules[path] = LoraModule(A, B, settings.alpha / settings.rank)
    return LoraAdapter("start", modules)


def _delta(module: LoraModule) -> Tensor:
    return module.scaling * (module.B.double().cpu() @ module.A.double().cpu())


def floor_operations(job: Job) -> float:
    """Multiplications and additions that LoRA training of a job cannot do without: two passes through the base, of the
    head for answers alone, and three products with each factor. Attention is left out."""
    encoded = [row for _, rows in job.groups for row in _encoded(rows)]
    tokens, answers = sum(len(row) for row in encoded), sum(len(row.answer) for row in encoded)
    head = _base.model.get_output_embeddings()
    shapes = [shape_of(layer) for layer in linear_modules(_base.model).values() if layer is not head]
    base = sum(outer * inner for outer, inner in shapes)
    factors = job.settings.rank * sum(outer + inner for outer, inner in shapes)
    return 2.0 * job.settings.epochs * (tokens * (2 * base + 3 * factors) + answers * 2 * math.prod(shape_of(head)))


def peak_speed() -> tuple[float, str]:
    """Multiplications and additions a second of a large product, and the library that was quickest at it."""
    cuda = _base.device.type == "cuda"
    width = 8192 if cuda else 1024
    left, right = (torch.randn(width, width, dtype=_base.dtype, device=_base.device) for _ in range(2))
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    products: dict[str, Callable[[], Tensor]] = {
        "cuBLAS" if cuda else f"torch.matmul (BLAS: {blas[1] if blas else 'own'})": lambda: left @ right
    }
    if not cuda and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    taken = []
    for library, product in products.items():
        for _ in range(20):
            begun = time.perf_counter()
            product()
            if cuda:
                torch.cuda.synchronize()
            taken.append((time.perf_counter() - begun, library))
    seconds, library = min(taken)
    return 2 * width**3 / seconds, library
