"""Where a base lies changes nothing: one device, hooks of accelerate, several devices, memory that is mapped."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from raymerge.adapters.adapter import LoraAdapter
from raymerge.errors import ModelError
from raymerge.models.answers import AnswerHead
from raymerge.models.base import BaseModel, load_base
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.layers import linear_modules
from raymerge.models.multilora import MultiLora
from raymerge.models.training import TrainingGroup, TrainingSettings, train
from raymerge.runtime.workers import ModelWorker

BLOCKS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w1"]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
one_gpu = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")


def outcome(base: BaseModel, adapters: list[LoraAdapter]) -> dict[str, Any]:
    """Answers, scores and losses; trained factors in one vector."""
    lora = MultiLora(base.model)
    lora.load(adapters)
    said = generate(base, lora, PROMPTS, [0, 1, -1, 1], GenerationSettings(max_new_tokens=6))
    scores = score_references(base, lora, PROMPTS, PROMPTS, torch.tensor([[0.5, 0.5], [1, 0], [0, 0], [0.3, 2]]))
    lora.detach()
    rows = (("w1 w2", "w3 w4"), ("w5", "w6 w7 w8"))
    groups = [TrainingGroup("a", rows), TrainingGroup("b", rows[::-1])]
    results = train(base, groups, TrainingSettings(rank=2, epochs=2, learning_rate=1e-2))
    factors = [f for r in results for m in r.adapter.modules.values() for f in (m.A.flatten(), m.B.flatten())]
    return {"said": said, "scores": scores, "losses": [r.losses for r in results], "factors": torch.cat(factors)}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["said"] == wanted["said"]
    assert found["scores"] == pytest.approx(wanted["scores"], rel=1e-4)
    assert torch.tensor(found["losses"]).numpy() == pytest.approx(torch.tensor(wanted["losses"]).numpy(), rel=1e-4)
    torch.testing.assert_close(found["factors"], wanted["factors"], rtol=1e-3, atol=1e-4)


def test_hooks_of_accelerate_change_nothing(tiny_llama: Path, make_adapter: Callable[..., LoraAdapter]) -> None:
    plain, hooked = load_base(str(tiny_llama)), load_base(str(tiny_llama))
    adapters = [make_adapter(plain, seed) for seed in range(2)]
    wanted = outcome(plain, adapters)
    skipped = hooked.model._skip_keys_device_placement
    accelerate.dispatch_model(hooked.model, dict.fromkeys(BLOCKS, "cpu"), force_hooks=True, skip_keys=skipped)
    hooks = {name: m.__dict__["forward"] for name, m in hooked.model.named_modules() if "forward" in m.__dict__}
    assert {"model.layers.1", "lm_head"} <= hooks.keys()
    found = outcome(hooked, adapters)
    assert all(hooked.model.get_submodule(name).__dict__["forward"] is hook for name, hook in hooks.items())
    assert found.pop("factors").equal(wanted.pop("factors"))
    assert found == wanted


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> dict[str, Any]:
    """What a base says that lies on two devices, and what the same base says on one."""
    script = Path(__file__).with_name("two_devices.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_llama)], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("place", ["head with the last layer", "head with the embedding"])
def test_a_base_on_two_devices_answers_as_on_one(pair: dict[str, Any], place: str) -> None:
    wanted, found = pair["plain"], pair[place]
    assert found["answers"] == wanted["answers"]
    assert found["scores"].keys() == wanted["scores"].keys()
    for name, scores in wanted["scores"].items():
        assert found["scores"][name] == pytest.approx(scores, rel=1e-5), name


def test_training_on_two_devices_is_training_on_one(pair: dict[str, Any]) -> None:
    wanted, found = pair["plain"], pair["training"]
    for one, other in zip(found["losses"], wanted["losses"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert found["sizes"] == pytest.approx(wanted["sizes"], rel=1e-4)


def test_weights_on_two_devices_learn_as_on_one(pair: dict[str, Any]) -> None:
    wanted, found = pair["plain"]["weighted"], pair["weighted"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["gradients"] == pytest.approx(wanted["gradients"], rel=1e-3, abs=1e-4)
    assert [abs(g) > 1e-3 for g in found["gradients"]] == [True, True, True, False, True, True]  # one is nobody's


@two_gpus
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_two_gpus_are_one(tiny_llama: Path, make_adapter: Callable[..., LoraAdapter], quantization: str) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    one = load_base(str(tiny_llama), "cuda", "float32", quantization)
    adapters = [make_adapter(one, seed) for seed in range(2)]
    wanted = outcome(one, adapters)
    both = load_base(str(tiny_llama), "cuda", "float32", quantization, gpus=2)
    assert {str(p.device) for p in both.model.parameters()} <= {"cuda:0", "cuda:1"}
    assert both.device == both.model.get_input_embeddings().weight.device
    assert_same(outcome(both, adapters), wanted)


@one_gpu
def test_a_gpu_computes_what_the_cpu_does(tiny_llama: Path, make_adapter: Callable[..., LoraAdapter]) -> None:
    cpu, gpu = load_base(str(tiny_llama)), load_base(str(tiny_llama), "cuda")
    adapters = [make_adapter(cpu, seed) for seed in range(2)]
    assert gpu.device == torch.device("cuda", torch.cuda.current_device())
    assert_same(outcome(gpu, adapters), outcome(cpu, adapters))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpus_that_are_not_there_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"over 2 GPUs, of device cpu this process sees 0\.\nSet hardware\."):
        load_base(str(tiny_llama), gpus=2)
    with pytest.raises(ModelError, match="over 0 GPUs"):
        load_base(str(tiny_llama), gpus=0)


@pytest.mark.parametrize(
    ("visible", "asked", "device", "placed"),
    [
        (0, 2, "auto", ("cpu", 1)),  # --local where there is no GPU
        (1, 2, "auto", ("cuda", 1)),
        (4, 2, "auto", ("cuda", 2)),
        (2, 2, "cuda", ("cuda", 2)),
        (2, 1, "cuda", ("cuda", 1)),
        (2, 2, "cpu", ("cpu", 1)),  # the plan reserves none
    ],
)
def test_a_worker_takes_what_the_project_says_of_what_it_sees(
    monkeypatch: pytest.MonkeyPatch, visible: int, asked: int, device: str, placed: tuple[str, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    worker = ModelWorker("base", "base", device=device, gpus=asked)
    assert (worker.device, worker.gpus) == placed


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="this system does not list what is mapped")
def test_weights_on_a_cpu_are_the_mapped_file(tiny_llama: Path) -> None:
    def mapped(base: BaseModel) -> bool:
        lines = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(tiny_llama / "model.safetensors"))]
        weights = [layer.weight.data_ptr() for layer in linear_modules(base.model).values()]
        return all(any(int(a, 16) <= at < int(b, 16) for a, b in ranges) for at in weights)

    assert mapped(load_base(str(tiny_llama)))
    assert not mapped(load_base(str(tiny_llama), dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_works_on_a_cpu(tiny_llama: Path, make_adapter: Callable[..., LoraAdapter], dtype: str) -> None:
    exact, half = load_base(str(tiny_llama)), load_base(str(tiny_llama), dtype=dtype)
    adapters = [make_adapter(exact, seed) for seed in range(2)]
    wanted, found = outcome(exact, adapters), outcome(half, adapters)
    assert found["scores"] == pytest.approx(wanted["scores"], rel=0.02)
    assert torch.tensor(found["losses"]).numpy() == pytest.approx(torch.tensor(wanted["losses"]).numpy(), rel=0.02)
    assert found["factors"].dtype == torch.float32


def test_the_head_is_asked_for_answers_alone_through_hooks(tiny_llama: Path) -> None:
    base = load_base(str(tiny_llama))
    accelerate.dispatch_model(base.model, dict.fromkeys(BLOCKS, "cpu"), force_hooks=True)
    assert AnswerHead(base).split
