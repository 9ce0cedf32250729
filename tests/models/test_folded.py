"""A base with an adapter in its weights answers as one with the adapter beside it, and is left as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from raymerge.adapters import LoraAdapter, LoraModule
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel, load_base
from raymerge.models.folded import folded
from raymerge.models.multilora import MultiLora

IDS = torch.arange(8, 24).view(2, 8)


def bits(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in base.model.state_dict().items()}


def answers(base: BaseModel) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = base.model(IDS).logits
        return logits.clone()


@pytest.mark.parametrize("kind", ["base", "gpt2"])
def test_it_answers_as_with_the_adapter_beside_it(
    kind: str, request: pytest.FixtureRequest, make_adapter: Callable[..., LoraAdapter]
) -> None:
    base = request.getfixturevalue(kind)
    adapter, before = make_adapter(base, 3), bits(base)
    plain = answers(base)
    lora = MultiLora(base.model)
    lora.load([adapter])
    with lora.rows([0, 0]):
        beside = answers(base)
    lora.detach()
    with folded(base, adapter):
        inside = answers(base)
    torch.testing.assert_close(inside, beside, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(inside, plain, atol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_an_error_leaves_the_bits_as_they_were(tiny_llama: Any, make_adapter: Callable[..., LoraAdapter]) -> None:
    base = load_base(str(tiny_llama), dtype="bfloat16")  # where subtracting would not bring them back
    before = bits(base)
    with pytest.raises(KeyboardInterrupt), folded(base, make_adapter(base, 5)):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_a_head_that_is_the_embedding_too_is_refused(base: BaseModel) -> None:
    base.model.lm_head.weight = base.model.get_input_embeddings().weight
    before = bits(base)
    layer = "model.layers.0.self_attn.q_proj"
    modules = {layer: LoraModule(torch.ones(1, 32), torch.ones(32, 1), 1.0)}
    modules |= {"lm_head": LoraModule(torch.ones(1, 32), torch.ones(64, 1), 1.0)}
    refused = pytest.raises(ModelError, match=r"^a: lm_head shares its weight with the embedding")
    with refused, folded(base, LoraAdapter("a", modules)):
        pytest.fail("it was folded in")
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
