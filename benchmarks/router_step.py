"""A step of the router's training: forward and backward through the base with 5 of 200 experts, against 5 of 5.

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
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from torch import Tensor, nn
from training_crew import Place, Size, make_base

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.models.answers import AnswerHead
from raymerge.models.base import BaseModel
from raymerge.models.layers import Forward, frozen_weight, linear_modules, shape_of, wrap
from raymerge.models.multilora import MultiLora
from raymerge.models.products import frozen_layer

TARGET = 2.5  # times a step with 5 of 5


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


def stacked(base: BaseModel, experts: list[LoraAdapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (experts * rank, in) and Bt (experts * rank, out) of each layer."""
    found = {}
    for name in experts[0].modules:
        modules = [expert.modules[name] for expert in experts]
        A, Bt = torch.cat([m.A for m in modules]), torch.cat([m.B.T * m.scaling for m in modules])
        found[name] = A.to(base.device, base.dtype), Bt.to(base.device, base.dtype)
    return found


def timed(action: Callable[[], object], cuda: bool) -> float:
    """Seconds of an action: of the processor, or by the clock until a GPU's kernels are done."""
    if not cuda:
        start = time.process_time()
        action()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def make_cases(step: Step, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    cases: dict[str, Callable[[], None]] = {
        "base, torch's layers": partial(base_step, step, False),
        "base, frozen products": partial(base_step, step, True),
    }
    experts = make_experts(step.base, options.experts, options.rank)
    for count in (options.few, options.experts):
        lora = MultiLora(step.base.model)
        lora.load(experts[:count])
        for k in sorted({options.few, *options.more}):
            if k <= count:
                cases[f"{k} of {count}"] = partial(weighted_step, step, lora, k)
        if count == options.few or options.dense:
            stacks = stacked(step.base, experts[:count])
            cases[f"all {count} at once"] = partial(dense_step, step, stacks, count, options.rank, options.few)
    return cases


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of every case: the middle of the rounds, in which all take their turns."""
    base = make_base(Size(options.hidden, options.layers), Place(options.device, options.dtype, options.threads))
    step = make_step(base, options.groups, options.rows, options.tokens)
    cases = make_cases(step, options)
    cuda = options.device == "cuda"
    for action in cases.values():
        timed(action, cuda)  # libraries choose their kernels
    rounds = [{name: timed(action, cuda) for name, action in cases.items()} for _ in range(options.rounds)]
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
    found["ratio"] = found["seconds"][f"{options.few} of {options.experts}"] / found["seconds"][one]
    rows = f"{options.groups} groups of {options.rows} rows of {options.tokens} tokens"
    print(f"a step of {rows}; base {options.hidden}x{options.layers}, experts of rank {options.rank}")
    show(found["seconds"], one, floor)
    print(f"  {options.few} of {options.experts} takes {found['ratio']:.2f} times {one} (at most {TARGET} asked)")
    print(textwrap.fill(found["command"], 100), found["machine"], sep="\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
