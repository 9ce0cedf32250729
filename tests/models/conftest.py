"""Bases and adapters for the tests of this room."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.models.base import BaseModel, load_base
from raymerge.models.layers import linear_modules, shape_of


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def base(tiny_llama: Path) -> BaseModel:
    return load_base(str(tiny_llama))


@pytest.fixture
def gpt2(base: BaseModel) -> BaseModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(base.tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    return BaseModel(model, base.tokenizer, base.device, base.dtype, "tiny-gpt2")


@pytest.fixture
def make_adapter() -> Callable[..., LoraAdapter]:
    """An adapter with random factors; `skip` leaves out modules whose path contains it."""

    def make(base: BaseModel, seed: int, rank: int = 4, scaling: float = 2.0, skip: str | None = None) -> LoraAdapter:
        generator = torch.Generator().manual_seed(seed)
        modules = {}
        for name, layer in linear_modules(base.model).items():
            if name == "lm_head" or (skip and skip in name):
                continue
            outer, inner = shape_of(layer)
            A = torch.randn(rank, inner, generator=generator) * 0.2
            B = torch.randn(outer, rank, generator=generator) * 0.2
            modules[name] = LoraModule(A, B, scaling)
        return LoraAdapter(name=f"adapter_{seed}", modules=modules)

    return make


@pytest.fixture
def varied(base: BaseModel, make_adapter: Callable[..., LoraAdapter]) -> list[LoraAdapter]:
    """Adapters of different rank, scaling and target modules."""
    return [
        make_adapter(base, 0, rank=4),
        make_adapter(base, 1, rank=2, scaling=0.5, skip="mlp"),
        make_adapter(base, 2, rank=7, scaling=1.3, skip="q_proj"),
        make_adapter(base, 3, rank=1, scaling=3.0),
    ]


@pytest.fixture(scope="session")
def fixed_base(tiny_llama: Path) -> BaseModel:
    """One base for the many examples of a law; nobody may change it."""
    return load_base(str(tiny_llama))
