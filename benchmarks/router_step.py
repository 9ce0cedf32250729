"""A step of the router's training with 5 of 200 experts, against 5 of 5: its passes through the base, and all of it.

    python benchmarks/router_step.py --json router_step.json             the demo's base, one thread: under a minute
    python benchmarks/router_step.py --hidden 64 --layers 2 --rounds 2                                does it run
    python benchmarks/router_step.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16            on a GPU

A step takes groups of rows of random tokens, each group with k experts of its own and weights that learn; the loss is
that of the last half of each row. All cases are timed in turns on the same rows, and the middle of all rounds is told:
on a CPU in seconds of the processor, which other work on the machine hardly changes, on a GPU by the clock.

base, torch's layers       the base's own pass, with gradients as far as its embedded input
base, frozen products      the same without what no gradient needs: the floor of all others
k of N                     `MultiLora.weighted`: N experts are resident, each group names k of them
all N at once              what does not choose: one product over all N experts, unwanted ones weighed 0
whole step, k of N         as a training takes it: scores of 64 candidates at most, the k best, their matched norm,
                           `weighted`, the gradient's way back, the optimiser; to bring the experts is no part of it
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
from torch import Tensor, nn
from training_crew import Place, Size, make_base

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.models.answers import AnswerHead
from raymerge.models.base import BaseModel
from raymerge.models.layers import Forward, frozen_weight, linear_modules, shape_of, wrap
from raymerge.models.multilora import MultiLora
from raymerge.models.products import frozen_layer
from raymerge.models.router_passes import Experts
from raymerge.models.router_settings import Learner, RouterSettings, RouterWatch
from raymerge.models.router_training import _Training
from raymerge.models.training.rows import Encoded
from raymerge.routing.router import Candidates, RouterShape
from raymerge.routing.similarity import nearest, unit

TARGET = 2.5  # times a step with 5 of 5
Case = Callable[[], AbstractContextManager[Callable[[], object]]]  # what is timed, in the context that it needs


@dataclass(frozen=True)
class Step:
    """What all cases compute: ids (rows, tokens), and the places and targets of the tokens that count."""

    base: BaseModel
    head: AnswerHead
    ids: Tensor
    places: Tensor
    targets: Tensor
    groups: int

    def run(self) -> None:
        """Forward and backward."""
        logits = self.head.logits(self.ids, self.places)
        nn.functional.cross_entropy(logits, self.targets).backward()


def make_step(base: BaseModel, groups: int, rows: int, tokens: int) -> Step:
    """Rows of random words."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, base.model.config.vocab_size, (groups * rows, tokens), generator=generator)
    columns = torch.arange(tokens // 2, tokens - 1)
    places = (torch.arange(len(ids))[:, None] * tokens + columns).flatten()
    targets = ids.flatten()[places + 1]
    device = base.device
    return Step(base, AnswerHead(base), ids.to(device), places.to(device), targets.to(device), groups)


def make_experts(base: BaseModel, count: int, rank: int) -> list[LoraAdapter]:
    """Adapters of all linear layers but the head."""
    generator = torch.Generator().manual_seed(1)
    head = base.model.get_output_embeddings()
    shapes = {name: shape_of(layer) for name, layer in linear_modules(base.model).items() if layer is not head}

    def module(outer: int, inner: int) -> LoraModule:
        A = torch.randn(rank, inner, generator=generator) / inner**0.5
        return LoraModule(A, torch.randn(outer, rank, generator=generator) / 100, 2.0)

    return [LoraAdapter(f"e{i}", {name: module(*shape) for name, shape in shapes.items()}) for i in range(count)]


@contextmanager
def learning_input(base: BaseModel) -> Iterator[None]:
    """Let gradients flow as far as the embedded input."""
    hook = base.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def answering(base: BaseModel, answers: dict[str, Callable[[Forward, Tensor], Tensor]]) -> Iterator[None]:
    """Let others answer for some layers."""
    layers = linear_modules(base.model)
    restores = [wrap(layers[name], answer) for name, answer in answers.items()]
    try:
        yield
    finally:
        for restore in restores:
            restore()


def base_step(step: Step, frozen: bool) -> None:
    """The base alone."""
    layers = linear_modules(step.base.model).items() if frozen else ()
    answers = {name: frozen_layer(frozen_weight(layer), layer.bias) for name, layer in layers}
    with learning_input(step.base), answering(step.base, answers):
        step.run()


def choices(step: Step, experts: int, k: int) -> tuple[Tensor, Tensor]:
    """Which k experts each group takes, and scores of them that learn."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(step.groups)])
    return chosen, torch.randn(step.groups, k, generator=generator).requires_grad_()


def weighted_step(step: Step, lora: MultiLora, k: int) -> None:
    """k of all that are loaded."""
    chosen, scores = choices(step, len(lora.names), k)
    with lora.weighted(chosen, scores.softmax(1)):
        step.run()
    assert scores.grad is not None


def dense_step(step: Step, stacks: dict[str, tuple[Tensor, Tensor]], experts: int, rank: int, k: int) -> None:
    """All experts for all rows, by torch's own autograd beside frozen products."""
    chosen, scores = choices(step, experts, k)
    dense = torch.zeros(step.groups, experts).scatter(1, chosen, scores.softmax(1))
    scale = dense.repeat_interleave(rank, 1)[:, None].to(step.base.device, step.base.dtype)

    def answer(
        frozen: Callable[[Forward, Tensor], Tensor], A: Tensor, Bt: Tensor, original: Forward, x: Tensor
    ) -> Tensor:
        inner = (x @ A.T).view(step.groups, -1, len(A)) * scale
        return frozen(original, x) + (inner.view(-1, len(A)) @ Bt).view(*x.shape[:-1], -1)

    layers = linear_modules(step.base.model)
    answers = {
        name: partial(answer, frozen_layer(frozen_weight(layers[name]), layers[name].bias), A, Bt)
        for name, (A, Bt) in stacks.items()
    }
    with answering(step.base, answers):
        step.run()
    assert scores.grad is not None


class Unwatched(RouterWatch):
    """Nobody looks."""


def training_of(step: Step, experts: list[LoraAdapter], k: int) -> _Training:
    """A training whose one step of an epoch takes the same rows: each group is a persona with random embeddings."""
    shape, dice = RouterShape(k=k), np.random.default_rng(3)
    queries, keys = (unit(dice.normal(size=(count, shape.size))) for count in (step.groups, len(experts)))
    near = nearest(queries, keys, shape.candidates)
    chosen = np.stack([one.indices for one in near]).astype(np.int64)
    cosines = np.stack([one.similarities for one in near]).astype(np.float32)
    known = Candidates(chosen, cosines, chosen % 8 == np.arange(step.groups)[:, None] % 8)
    ids = step.ids.cpu().view(step.groups, -1, step.ids.shape[1]).numpy()
    rows, lengths = ids.shape[1], np.full(ids.shape[1], ids.shape[2])
    settings = RouterSettings(personas_per_step=step.groups, rows_per_persona=rows)
    learners = [Learner(f"p{i}", (("w", "w"),) * rows) for i in range(step.groups)]  # whose rows are replaced
    by_number = Experts(lambda numbers: [experts[i] for i in numbers], lambda number: experts[number].headers)
    training = _Training(step.base, learners, (queries, keys), known, by_number, shape, settings, Unwatched(), None)
    training.rows = [Encoded(own, lengths // 2 + 1, lengths) for own in ids]
    return training


@contextmanager
def whole_step(training: _Training) -> Iterator[Callable[[], object]]:
    """One step of a training, its experts in memory."""
    (step,) = training._epoch(0)
    with training.passes.ready():
        training._step(step)
        yield partial(training._step, step)


def stacked(base: BaseModel, experts: list[LoraAdapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (experts * rank, in) and Bt (experts * rank, out) of each layer."""
    found = {}
    for name in experts[0].modules:
        modules = [expert.modules[name] for expert in experts]
        A, Bt = torch.cat([m.A for m in modules]), torch.cat([m.B.T * m.scaling for m in modules])
        found[name] = A.to(base.device, base.dtype), Bt.to(base.device, base.dtype)
    return found


def timed(case: Case, cuda: bool) -> float:
    """Seconds of what a case does: of the processor, or by the clock until a GPU's kernels are done."""
    with case() as action:
        if not cuda:
            start = time.process_time()
            action()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def make_cases(step: Step, options: argparse.Namespace) -> dict[str, Case]:
    """What is timed, by name."""
    plain: dict[str, Callable[[], object]] = {
        "base, torch's layers": partial(base_step, step, False),
        "base, frozen products": partial(base_step, step, True),
    }
    whole: dict[str, Case] = {}
    experts = make_experts(step.base, options.experts, options.rank)
    for count in (options.few, options.experts):
        lora = MultiLora(step.base.model)
        lora.load(experts[:count])
        for k in sorted({options.few, *options.more}):
            if k <= count:
                plain[f"{k} of {count}"] = partial(weighted_step, step, lora, k)
        if count == options.few or options.dense:
            stacks = stacked(step.base, experts[:count])
            plain[f"all {count} at once"] = partial(dense_step, step, stacks, count, options.rank, options.few)
        training = training_of(step, experts[:count], options.few)
        whole[f"whole step, {options.few} of {count}"] = partial(whole_step, training)
    return {**{name: partial(nullcontext, action) for name, action in plain.items()}, **whole}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of every case: the middle of the rounds, in which all take their turns."""
    base = make_base(Size(options.hidden, options.layers), Place(options.device, options.dtype, options.threads))
    step = make_step(base, options.groups, options.rows, options.tokens)
    cases = make_cases(step, options)
    cuda = options.device == "cuda"
    for case in cases.values():
        timed(case, cuda)  # libraries choose their kernels
    rounds = [{name: timed(case, cuda) for name, case in cases.items()} for _ in range(options.rounds)]
    return {name: statistics.median(taken[name] for taken in rounds) for name in cases}


def show(seconds: dict[str, float], one: str, floor: str) -> None:
    """Print the table."""
    print(f"  {'':24}{'ms':>9}{'of ' + one:>12}{'of the floor':>14}")
    for name, taken in seconds.items():
        print(f"  {name:24}{taken * 1000:9.1f}{taken / seconds[one]:12.2f}{taken / seconds[floor]:14.2f}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 128), ("layers", 4), ("groups", 40), ("rows", 5), ("tokens", 25), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("experts", 200), ("few", 5), ("rank", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--more", type=int, nargs="*", default=[16], help="other k of all experts")
    parser.add_argument("--dense", action="store_true", help="also all of many at once, which takes a minute or more")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kind = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    device = "" if options.device == "cpu" else f", {torch.cuda.get_device_name()}"
    found: dict[str, Any] = {
        "machine": f"{kind}{device}, {options.threads} threads, torch {torch.__version__}, {options.dtype}",
        "command": " ".join(["python", *sys.argv]),
        "seconds": measure(options),
    }
    one, floor = f"{options.few} of {options.few}", "base, frozen products"
    many, seconds = f"{options.few} of {options.experts}", found["seconds"]
    found["ratio"] = seconds[many] / seconds[one]
    found["whole_ratio"] = seconds[f"whole step, {many}"] / seconds[f"whole step, {one}"]
    rows = f"{options.groups} groups of {options.rows} rows of {options.tokens} tokens"
    print(f"a step of {rows}; base {options.hidden}x{options.layers}, experts of rank {options.rank}")
    show(seconds, one, floor)
    print(f"  {many} takes {found['ratio']:.2f} times {one} (at most {TARGET} asked); whole {found['whole_ratio']:.2f}")
    print(textwrap.fill(found["command"], 100), found["machine"], sep="\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
