"""Batched answers are what each prompt gets alone; scores are the model's own log-likelihoods."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.adapters.adapter import LoraAdapter
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel, load_base
from raymerge.models.generation import GenerationSettings, generate, plan_batches, score_references
from raymerge.models.layers import linear_modules
from raymerge.models.multilora import MultiLora

PROMPTS = ["w1 w2 w3 ?", "w9", "w30 w31 w32 w33 w34 w35 w36", "user w5 w6", "w7 w7", "assistant w11 w12 w13", ""]
SETTINGS = GenerationSettings(max_new_tokens=12)


def merged(base: BaseModel, adapter: LoraAdapter | None) -> BaseModel:
    """A base of its own with the adapter folded in."""
    model = copy.deepcopy(base.model)
    for name, module in (adapter.modules if adapter else {}).items():
        linear_modules(model)[name].weight.data += module.delta()
    return replace(base, model=model)


def library_answer(base: BaseModel, prompt: str, settings: GenerationSettings = SETTINGS) -> str:
    """What transformers generates for one prompt alone."""
    ids = base.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    if ids.shape[1] == 0:
        ids = torch.tensor([[base.tokenizer.bos_token_id]])
    out = base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.max_new_tokens, do_sample=False,
        eos_token_id=list(base.end_ids), pad_token_id=base.pad_id,
    )  # fmt: skip
    return str(base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_each_row_gets_its_own_adapter(base: BaseModel, varied: list[LoraAdapter]) -> None:
    index = [0, 1, -1, 3, 2, 0, 1]
    wanted = [
        library_answer(merged(base, varied[i] if i >= 0 else None), p) for i, p in zip(index, PROMPTS, strict=True)
    ]
    assert len(set(wanted)) > 4
    lora = MultiLora(base.model)
    lora.load(varied)
    for batch_size in (1, 3, 64):
        assert generate(base, lora, PROMPTS, index, SETTINGS, batch_size) == wanted


def test_a_mixture_answers_as_the_merge(base: BaseModel, varied: list[LoraAdapter]) -> None:
    weights = torch.tensor([[0.5, 0.5, 0, 0]] * 4 + [[0, 0, 0.2, 0.8]] * 3)
    both = [copy.deepcopy(base.model) for _ in range(2)]
    for model, row in zip(both, (weights[0], weights[-1]), strict=True):
        for adapter, weight in zip(varied, row.tolist(), strict=True):
            for name, module in adapter.modules.items():
                linear_modules(model)[name].weight.data += weight * module.delta()
    wanted = [library_answer(replace(base, model=both[i // 4]), prompt) for i, prompt in enumerate(PROMPTS)]
    lora = MultiLora(base.model)
    lora.load(varied)
    assert generate(base, lora, PROMPTS, weights, SETTINGS, 4) == wanted


def test_equal_calls_give_equal_answers_with_gpt2(gpt2: BaseModel, make_adapter: Callable[..., LoraAdapter]) -> None:
    adapters = [make_adapter(gpt2, seed) for seed in range(2)]
    index = [0, 1, -1, 1, 0, 0, 1]
    wanted = [
        library_answer(_folded_conv1d(gpt2, adapters[i] if i >= 0 else None), p)
        for i, p in zip(index, PROMPTS, strict=True)
    ]
    lora = MultiLora(gpt2.model)
    lora.load(adapters)
    assert generate(gpt2, lora, PROMPTS, torch.tensor(index), SETTINGS, 4) == wanted


def test_rows_are_counted_as_they_are_done(base: BaseModel, varied: list[LoraAdapter]) -> None:
    index = [0, 1, -1, 3, 2, 0, 1]
    lora = MultiLora(base.model)
    lora.load(varied)
    done: list[int] = []
    generate(base, lora, PROMPTS, index, GenerationSettings(max_new_tokens=1), 3, done.append)
    assert sum(done) == 7
    assert max(done) <= 3
    done.clear()
    score_references(base, lora, PROMPTS, ["w1"] * 7, index, 3, done.append)
    assert sum(done) == 7
    assert max(done) <= 3


def _folded_conv1d(base: BaseModel, adapter: LoraAdapter | None) -> BaseModel:
    model = copy.deepcopy(base.model)
    for name, module in (adapter.modules if adapter else {}).items():
        linear_modules(model)[name].weight.data += module.delta().T
    return replace(base, model=model)


def _constant(base: BaseModel, cycle: list[int]) -> tuple[BaseModel, list[int]]:
    """A base that answers any prompt with this cycle of tokens, and a list that counts its forward passes."""
    calls: list[int] = []
    model = copy.deepcopy(base.model)
    original = model.forward

    def forward(input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep):  # type: ignore[no-untyped-def]
        out = original(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep,
        )  # fmt: skip
        out.logits.zero_()[..., cycle[len(calls) % len(cycle)]] = 1
        calls.append(input_ids.shape[1])
        return out

    model.forward = forward
    return replace(base, model=model), calls


def test_the_batch_ends_when_all_rows_have(base: BaseModel) -> None:
    ending, calls = _constant(base, [10, 11, 2])
    assert generate(ending, None, ["w1", "w1 w2"], None, GenerationSettings(max_new_tokens=50)) == ["w2 w3"] * 2
    assert calls == [2, 1, 1]


def test_any_listed_end_token_ends(base: BaseModel) -> None:
    ending, _ = _constant(base, [10, 11, 12, 2])
    ending.model.generation_config.eos_token_id = [2, 12]
    assert ending.end_ids == (2, 12)
    assert generate(ending, None, ["w1"], None, SETTINGS) == ["w2 w3"]


def test_a_stop_may_name_a_token(base: BaseModel) -> None:
    ending, calls = _constant(base, [10, 1, 11, 2])
    assert generate(ending, None, ["w1"], None, SETTINGS) == ["w2 w3"]
    calls.clear()
    assert generate(ending, None, ["w1"], None, replace(SETTINGS, stop=("<s>",))) == ["w2"]
    assert len(calls) == 2


def test_a_stop_string_cuts_the_text_and_ends_the_batch(base: BaseModel) -> None:
    ending, calls = _constant(base, [10, 11, 12, 13])
    settings = GenerationSettings(max_new_tokens=40, stop=("w3 w4",))
    assert generate(ending, None, ["w1"], None, settings) == ["w2"]
    assert len(calls) == 4


def test_a_long_prompt_keeps_its_opening_and_its_end(base: BaseModel) -> None:
    long = " ".join(f"w{i % 50}" for i in range(300))
    ending, calls = _constant(base, [10])
    assert generate(ending, None, ["<s> " + long], None, SETTINGS)[0].split() == ["w2"] * 12
    assert calls[0] == 128 - 12


def test_no_pad_token_is_needed(base: BaseModel) -> None:
    wanted = generate(base, None, PROMPTS, None, SETTINGS)
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.pad_token = None
    assert generate(replace(base, tokenizer=tokenizer), None, PROMPTS, None, SETTINGS) == wanted


def test_scores_are_log_likelihoods(base: BaseModel, varied: list[LoraAdapter]) -> None:
    references = ["w4 w5 w6", "w40", "w1 w2 w3 w4 w5 w6 w7", "w9 w9", "w50 ?", "w2", "w3 w4"]
    index = [0, 1, -1, 3, 2, 0, 1]
    lora = MultiLora(base.model)
    lora.load(varied)
    found = {size: score_references(base, lora, PROMPTS, references, index, size) for size in (2, 64)}
    lora.detach()
    for row, adapter in enumerate(index):
        prompt = base.tokenizer(PROMPTS[row])["input_ids"] or [base.tokenizer.bos_token_id]
        answer = base.tokenizer(references[row])["input_ids"]
        model = merged(base, varied[adapter] if adapter >= 0 else None).model.double()
        log = model(input_ids=torch.tensor([prompt + answer])).logits.log_softmax(-1)[0]
        wanted = -sum(float(log[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)
        assert found[2][row] == pytest.approx(wanted, rel=1e-5)
        assert found[64][row] == pytest.approx(wanted, rel=1e-5)


def test_rows_that_do_not_fit_are_refused(base: BaseModel, varied: list[LoraAdapter]) -> None:
    lora = MultiLora(base.model)
    lora.load(varied)
    with pytest.raises(ModelError, match="2 prompts meet adapters for 1"):
        generate(base, lora, ["w1", "w2"], [0], SETTINGS)
    with pytest.raises(ModelError, match="none are loaded"):
        generate(base, None, ["w1"], [0], SETTINGS)
    with pytest.raises(ModelError, match="has no token"):
        score_references(base, None, ["w1"], [""], None)
    with pytest.raises(ModelError, match="1 prompts meet 2 references"):
        score_references(base, None, ["w1"], ["w2", "w3"], None)
    assert generate(base, lora, [], [], SETTINGS) == []


@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 9)), max_size=40), st.integers(1, 12))
def test_batches_hold_every_row_once_and_cut_owners_rarely(rows: list[tuple[int, int]], size: int) -> None:
    owners = [owner for owner, _ in rows]
    batches = plan_batches(owners, [length for _, length in rows], size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert all(1 <= len(batch) <= size for batch in batches)
    for owner in set(owners):
        pieces = sum(any(owners[i] == owner for i in batch) for batch in batches)
        assert pieces == -(-owners.count(owner) // size)


def test_the_small_llama_tells_its_story(test_data: Path) -> None:
    base = load_base(str(test_data / "stories260k"))
    answer = generate(base, None, [""], None, GenerationSettings(max_new_tokens=24))[0]
    assert answer.startswith("Once upon a time, there was a little girl named Lily.")
    settings = GenerationSettings(max_new_tokens=450)
    story, on = (
        generate(base, None, ["Once upon a time"], None, replace(settings, stop=stop))[0] for stop in (("<s>",), ())
    )
    assert on.startswith(story)
    assert len(story) < len(on)
    assert story.endswith('friend."')
