"""Answers of many adapters at once: ours against PEFT's mixed batch, and against the base alone.

    python benchmarks/generation.py --json generation.json
    python benchmarks/generation.py --sizes 64x5 --adapters 4 --prompts 2 --new-tokens 4 --rounds 1   # does it run

Random Llamas (hidden size x layers), rank 8 on all linear layers, greedy, no early end, one thread. All ways answer
the same rows in the same batches and must give the same tokens; rounds are interleaved, the median counts. Floors: the
base alone through the same loop, and the base's multiplications at the speed of a large product on this machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.models.base import BaseModel
from raymerge.models.generation import GenerationSettings, generate
from raymerge.models.layers import linear_modules, shape_of
from raymerge.models.multilora import MultiLora

WORDS = 160
RANK = 8


@dataclass(frozen=True)
class Load:
    """Rows of the benchmark: prompts of equally many words for each adapter, in the order of the adapters."""

    prompts: tuple[str, ...]
    owners: tuple[int, ...]
    batch_size: int
    new_tokens: int


def make_base(hidden: int, layers: int) -> BaseModel:
    """A random Llama without an end token."""
    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return BaseModel(model, tokenizer, torch.device("cpu"), torch.float32, "random-llama")


def make_adapters(base: BaseModel, count: int) -> list[LoraAdapter]:
    """Random adapters on every linear layer but the head."""
    generator = torch.Generator().manual_seed(1)
    layers = {name: layer for name, layer in linear_modules(base.model).items() if name != "lm_head"}
    found = []
    for number in range(count):
        modules = {}
        for name, layer in layers.items():
            outer, inner = shape_of(layer)
            A = torch.randn(RANK, inner, generator=generator) / inner**0.5
            modules[name] = LoraModule(A, torch.randn(outer, RANK, generator=generator) * 0.1, 2.0)
        found.append(LoraAdapter(name=f"adapter_{number:03d}", modules=modules))
    return found


def make_load(arguments: argparse.Namespace) -> Load:
    rng = random.Random(2)
    rows = arguments.adapters * arguments.prompts
    prompts = tuple(" ".join(f"w{rng.randint(2, WORDS - 1)}" for _ in range(rng.randint(8, 12))) for _ in range(rows))
    owners = tuple(number // arguments.prompts for number in range(rows))
    return Load(prompts, owners, arguments.batch_size, arguments.new_tokens)


def ours(base: BaseModel, lora: MultiLora | None, load: Load, choice: Tensor | Sequence[int] | None) -> list[str]:
    return generate(base, lora, load.prompts, choice, GenerationSettings(load.new_tokens), load.batch_size)


def theirs(model: Any, base: BaseModel, load: Load, rows: range, **extra: Any) -> list[str]:
    """transformers' generate on some rows as one batch."""
    base.tokenizer.padding_side = "left"
    batch = base.tokenizer([load.prompts[i] for i in rows], return_tensors="pt", padding=True)
    out = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=load.new_tokens,
        do_sample=False, pad_token_id=0, **extra,
    )  # fmt: skip
    return list(base.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))


def batches(load: Load) -> list[range]:
    rows = len(load.prompts)
    return [range(start, min(start + load.batch_size, rows)) for start in range(0, rows, load.batch_size)]


def peft_model(base: BaseModel, adapters: Sequence[LoraAdapter]) -> Any:
    """The same base and adapters in PEFT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config, adapter_name=adapters[0].name)
    for adapter in adapters[1:]:
        model.add_adapter(adapter.name, config)
    for adapter in adapters:
        for name, module in adapter.modules.items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A[adapter.name].weight.data.copy_(module.A)
            layer.lora_B[adapter.name].weight.data.copy_(module.B)
    return model.eval()


def ways(load: Load, size: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Callable[[], list[str]]]:
    """Every way of answering the load, by name."""
    base, plain, third = (make_base(*size) for _ in range(3))
    adapters = make_adapters(base, arguments.adapters)
    lora = MultiLora(base.model)
    lora.load(adapters)
    peft = peft_model(third, adapters)
    mixture = torch.zeros(len(load.prompts), len(adapters))
    for row, owner in enumerate(load.owners):
        for step in range(min(5, len(adapters))):
            mixture[row, (owner + 7 * step) % len(adapters)] += 0.2

    def mixed() -> list[str]:
        names = [adapters[owner].name for owner in load.owners]
        return [t for r in batches(load) for t in theirs(peft, base, load, r, adapter_names=[names[i] for i in r])]

    def one_by_one() -> list[str]:
        texts = []
        for number, adapter in enumerate(adapters):
            peft.set_adapter(adapter.name)
            texts += theirs(peft, base, load, range(number * arguments.prompts, (number + 1) * arguments.prompts))
        return texts

    return {
        "base alone, our loop": lambda: ours(plain, None, load, None),
        "base alone, transformers generate": lambda: [
            t for r in batches(load) for t in theirs(plain.model, base, load, r)
        ],
        "own adapter for each row": lambda: ours(base, lora, load, load.owners),
        "own mixture of 5 for each row": lambda: ours(base, lora, load, mixture),
        "PEFT, mixed batch": mixed,
        "PEFT, one adapter at a time": one_by_one,
    }


def peak() -> float:
    """Multiplications and additions a second of a large float32 product on one thread."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - begun)
    return float(2 * 1024**3 / min(seconds))


def measure(size: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows a second of each way, the floor, and how ours compares."""
    load = make_load(arguments)
    named = ways(load, size, arguments)
    answers = {name: answer() for name, answer in named.items()}  # also warms up
    for first, second in (
        ("own adapter for each row", "PEFT, mixed batch"),
        ("PEFT, mixed batch", "PEFT, one adapter at a time"),
    ):
        same = sum(a == b for a, b in zip(answers[first], answers[second], strict=True))
        if same < 0.98 * len(load.prompts):  # other batch shapes may turn a near tie
            sys.exit(f"{first} and {second} agree on {same} of {len(load.prompts)} answers only")
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(arguments.rounds):
        for name, answer in named.items():
            begun = time.perf_counter()
            answer()
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    words = sum(len(prompt.split()) for prompt in load.prompts) + len(load.prompts) * load.new_tokens
    parameters = sum(p.numel() for p in make_base(*size).model.parameters())
    floor = 2 * parameters * words / peak()
    own = median["own adapter for each row"]
    return {
        "rows_per_second": {name: len(load.prompts) / found for name, found in median.items()},
        "floor_rows_per_second": len(load.prompts) / floor,
        "ratios": {
            "to PEFT's mixed batch": median["PEFT, mixed batch"] / own,
            "to the base alone, same loop": median["base alone, our loop"] / own,
            "to the base alone, transformers generate": median["base alone, transformers generate"] / own,
        },
    }


def show(size: tuple[int, int], found: Mapping[str, Any]) -> None:
    print(f"hidden {size[0]}, {size[1]} layers")
    rates = {**found["rows_per_second"], "floor: the base's multiplications": found["floor_rows_per_second"]}
    for name, rate in rates.items():
        print(f"  {name:38s} {rate:9.0f} rows/s")
    for name, ratio in found["ratios"].items():
        print(f"  own adapter for each row, {name:42s} {ratio:6.2f}")
    print()


def as_size(text: str) -> tuple[int, int]:
    hidden, layers = text.split("x")
    return int(hidden), int(layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=as_size, nargs="+", default=[(64, 5), (128, 4)], help="hidden x layers")
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=8, help="for each adapter")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, torch {torch.__version__}"
    command = " ".join(["python", *sys.argv])
    print(f"{command}\n{machine}\n")
    results = {}
    for size in arguments.sizes:
        found = measure(size, arguments)
        show(size, found)
        results["x".join(map(str, size))] = found
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "command": command, "results": results}, file, indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
