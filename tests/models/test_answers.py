"""Prompts and answers as tokens, and logits at the places that predict an answer."""

from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GraniteConfig, GraniteForCausalLM

from raymerge.errors import ModelError
from raymerge.models.answers import AnswerHead, encode_prompts, encode_rows, keep_end, pad_right
from raymerge.models.base import BaseModel


def test_an_opening_token_is_never_doubled(base: BaseModel) -> None:
    assert encode_prompts(base, ["<s> w1", "", "w1 w2"]) == [[1, 9], [1], [9, 10]]
    base.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert encode_prompts(base, ["<s> w1", "", "w1 w2"]) == [[1, 9], [1], [1, 9, 10]]


def test_an_answer_closes_with_the_end_token(base: BaseModel) -> None:
    (row,) = encode_rows(base, ["w1 w2"], ["w3 w4"], end=True)
    assert (row.prompt, row.answer) == ((9, 10), (11, 12, 2))
    (row,) = encode_rows(base, ["w1 w2"], ["w3 w4"], end=False)
    assert row.answer == (11, 12)
    with pytest.raises(ModelError, match="row 1: the answer '' has no token"):
        encode_rows(base, ["w1", "w1"], ["w2", ""], end=False)


def test_long_rows_lose_the_start_of_the_prompt_then_the_end_of_the_answer(base: BaseModel) -> None:
    prompt, answer = "w1 w2 w3 w4 w5 w6", "w11 w12 w13"
    (row,) = encode_rows(base, [prompt], [answer], end=False, limit=6)
    assert (row.prompt, row.answer) == ((9, 13, 14), (19, 20, 21))
    (row,) = encode_rows(base, [prompt], [answer], end=False, limit=3)
    assert (row.prompt, row.answer) == ((9,), (19, 20))
    assert keep_end([1, 2, 3, 4], 2) == [1, 4]


def _granite(base: BaseModel) -> BaseModel:
    """A model that scales its logits: decoder and head alone would be wrong."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=len(base.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, logits_scaling=4.0, pad_token_id=0,
    )  # fmt: skip
    return replace(base, model=GraniteForCausalLM(config).eval())


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_at_chosen_places_are_the_models_own(base: BaseModel, scaled: bool) -> None:
    chosen = _granite(base) if scaled else base
    head = AnswerHead(chosen)
    assert head.split is not scaled
    batch = pad_right(encode_rows(chosen, ["w1 w2", "w3"], ["w4", "w5 w6 w7"], end=True), chosen.pad_id)
    row, column = torch.nonzero(batch.answer, as_tuple=True)
    found = head.logits(batch.ids, row * batch.ids.shape[1] + column - 1)
    wanted = chosen.model(input_ids=batch.ids).logits[row, column - 1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
