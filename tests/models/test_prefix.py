"""Prefixes side by side are what PEFT computes with each alone, and load in PEFT as they are."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from raymerge.errors import AdapterError, ModelError, UnsupportedAdapterError
from raymerge.models.answers import encode_rows, pad_right
from raymerge.models.base import BaseModel
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.prefix import Prefix, Prefixes, check_prefix, encode_prefix, read_prefix
from raymerge.models.prefix_training import TrainedPrefix, first_prefix, train_prefixes
from raymerge.models.training import TrainingGroup, TrainingSettings, batch_order, learning_rate

PROMPTS = ["w1 w2 w3 ?", "w9", "w30 w31 w32 w33 w34 w35 w36", "user w5 w6", "w7 w7", "assistant w11 w12 w13", ""]
REFERENCES = ["w4 w5 w6", "w40", "w1 w2 w3 w4 w5 w6 w7", "w9 w9", "w50 ?", "w2", "w3 w4"]
INDEX = [0, 1, -1, 3, 2, 0, 1]
SETTINGS = TrainingSettings(epochs=3, learning_rate=5e-2, batch_size=4, clip=0.02, weight_decay=0.01)


@pytest.fixture
def mistral(base: BaseModel) -> BaseModel:
    """A base with a sliding window, grouped heads and heads of a size of their own."""
    torch.manual_seed(2)
    config = MistralConfig(
        vocab_size=len(base.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, sliding_window=64, eos_token_id=2,
    )  # fmt: skip
    return replace(base, model=MistralForCausalLM(config).eval().requires_grad_(False))


@pytest.fixture(params=["llama", "gpt2", "mistral"])
def any_base(request: pytest.FixtureRequest, base: BaseModel) -> BaseModel:
    return base if request.param == "llama" else request.getfixturevalue(request.param)


def draw(base: BaseModel, lengths: Sequence[int] = (5, 3, 5, 1)) -> list[Prefix]:
    generator = torch.Generator().manual_seed(3)
    width = Prefixes(base.model).shape.width
    return [Prefix(f"p{i}", torch.randn(n, width, generator=generator)) for i, n in enumerate(lengths)]


def attach(base: BaseModel, prefixes: Sequence[Prefix]) -> Prefixes:
    attached = Prefixes(base.model)
    attached.load([prefix.embeddings for prefix in prefixes])
    return attached


def with_peft(base: BaseModel, embeddings: Tensor) -> Any:
    """PEFT's model with this prefix."""
    model: Any = get_peft_model(
        base.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(embeddings))
    )
    model.prompt_encoder["default"].load_prompt_embeddings(embeddings)
    return model.eval()


def tokens_of(base: BaseModel, prompt: str) -> list[int]:
    return base.tokenizer(prompt)["input_ids"] or [base.tokenizer.bos_token_id]


def test_answers_are_those_of_pefts_generate_one_by_one(any_base: BaseModel) -> None:
    base, prefixes = any_base, draw(any_base)
    wanted = []
    for prompt, number in zip(PROMPTS, INDEX, strict=True):
        model = base.model if number < 0 else with_peft(base, prefixes[number].embeddings)
        ids = torch.tensor([tokens_of(base, prompt)])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            eos_token_id=list(base.end_ids), pad_token_id=base.pad_id,
        )  # fmt: skip
        wanted.append(base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    assert len(set(wanted)) > 4
    attached = attach(base, prefixes)
    for size in (1, 3, 64):
        assert generate(base, attached, PROMPTS, INDEX, GenerationSettings(max_new_tokens=12), size) == wanted


def test_scores_are_pefts_log_likelihoods(any_base: BaseModel) -> None:
    base, prefixes = any_base, draw(any_base)
    attached = attach(base, prefixes)
    found = {size: score_references(base, attached, PROMPTS, REFERENCES, INDEX, size) for size in (2, 64)}
    attached.detach()
    for row, number in enumerate(INDEX):
        model = base.model if number < 0 else with_peft(base, prefixes[number].embeddings)
        prompt, answer = tokens_of(base, PROMPTS[row]), base.tokenizer(REFERENCES[row])["input_ids"]
        with torch.inference_mode():
            log = model(input_ids=torch.tensor([prompt + answer])).logits.log_softmax(-1)[0]
        wanted = -sum(float(log[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / len(answer)
        assert found[2][row] == pytest.approx(wanted, rel=1e-4)
        assert found[64][row] == pytest.approx(wanted, rel=1e-4)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=7), st.booleans())
def test_a_row_does_not_depend_on_its_batch(base_of_laws: BaseModel, index: list[int], padded_left: bool) -> None:
    base = base_of_laws
    attached = attach(base, draw(base))
    ids = torch.arange(8, 8 + 6 * len(index)).view(len(index), 6) % len(base.tokenizer)
    given = torch.ones(len(index), 9, dtype=torch.int64)
    given[:, :3] = 0
    try:
        with torch.inference_mode():
            with attached.rows(index):
                if padded_left:
                    wide = torch.nn.functional.pad(ids, (3, 0), value=base.pad_id)
                    positions = (given.cumsum(1) - 1).clamp(min=0)
                    together = base.model(wide, attention_mask=given, position_ids=positions).logits[:, 3:]
                else:
                    together = base.model(ids).logits
            for row, number in enumerate(index):
                with attached.rows([number]):
                    alone = base.model(ids[row : row + 1]).logits[0]
                assert (together[row] - alone).abs().max() < 1e-4
    finally:
        attached.detach()


@pytest.fixture(scope="module")
def base_of_laws(tiny_llama: Path) -> BaseModel:
    from raymerge.models.base import load_base

    return load_base(str(tiny_llama))


def group(name: str, rows: int, shift: int = 0) -> TrainingGroup:
    texts = []
    for i in range(rows):
        words = [f"w{(shift * 7 + i * 5 + j * 3) % 56}" for j in range(4 + (i * 5 + shift) % 9)]
        cut = 1 + (i + shift) % 3
        texts.append((" ".join(words[:cut]), " ".join(words[cut:])))
    return TrainingGroup(name, tuple(texts))


def trained(base: BaseModel, groups: Sequence[TrainingGroup], settings: TrainingSettings) -> dict[str, TrainedPrefix]:
    _, first = first_prefix(base, 4, settings.seed)
    return {result.prefix.name: result for result in train_prefixes(base, groups, first, settings)}


def peft_training(base: BaseModel, rows: TrainingGroup, settings: TrainingSettings) -> tuple[Tensor, list[float]]:
    """The same training with PEFT's model, loss and torch's optimiser, one row at a time."""
    torch.manual_seed(settings.seed)
    model: Any = get_peft_model(base.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=settings.weight_decay)
    encoded = sorted(encode_rows(base, *map(list, zip(*rows.rows, strict=True)), end=True), key=len)
    order = batch_order(len(encoded), settings)
    losses = []
    for step, batch in enumerate(order):
        total, count = torch.zeros(()), 0
        for i in batch.tolist():
            one = pad_right([encoded[i]], base.pad_id)
            tokens = int(one.answer.sum())
            total = total + model(input_ids=one.ids, labels=one.ids.masked_fill(~one.answer, -100)).loss * tokens
            count += tokens
        optimiser.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimiser.param_groups[0]["lr"] = learning_rate(step, len(order), settings)
        optimiser.step()
        losses.append(float(total.detach() / count))
    return model.prompt_encoder["default"].embedding.weight.detach().clone(), losses


def test_training_side_by_side_is_training_with_peft(any_base: BaseModel) -> None:
    groups = [group("p0", 10), group("odd", 7, 1), group("p2", 10, 2), group("one", 1, 3)]
    found = trained(any_base, groups, SETTINGS)
    assert sorted(found) == sorted(one.name for one in groups)
    for one in groups:
        embeddings, losses = peft_training(any_base, one, SETTINGS)
        result = found[one.name]
        assert result.losses == pytest.approx(losses, rel=1e-4)
        assert losses[-1] < losses[0]
        assert result.tokens == sum(len(r.answer) for r in encode_rows(any_base, *_texts(one), end=True))
        assert _logits(any_base, result.prefix.embeddings) == pytest.approx(_logits(any_base, embeddings), abs=1e-4)


def _texts(one: TrainingGroup) -> tuple[list[str], list[str]]:
    return [prompt for prompt, _ in one.rows], [answer for _, answer in one.rows]


def _logits(base: BaseModel, embeddings: Tensor) -> Any:
    attached = attach(base, [Prefix("p", embeddings)])
    with torch.inference_mode(), attached.rows([0]):
        logits = base.model(torch.arange(8, 20)[None]).logits
    attached.detach()
    return logits.numpy()


def test_neither_company_nor_micro_batches_change_a_prefix(base: BaseModel) -> None:
    groups = [group(f"p{i}", 6 + i % 2, i) for i in range(5)]
    whole = trained(base, groups, SETTINGS)
    for settings in (replace(SETTINGS, together=2), replace(SETTINGS, micro_batch=1), replace(SETTINGS, micro_batch=3)):
        for name, result in trained(base, groups, settings).items():
            assert result.losses == pytest.approx(whole[name].losses, rel=1e-4)
            assert torch.allclose(result.prefix.embeddings, whole[name].prefix.embeddings, atol=1e-3)


def test_chunks_that_are_there_are_left_out_and_the_others_are_the_same_bytes(base: BaseModel) -> None:
    groups = [group(f"p{i}", 6, i) for i in range(5)]
    settings = replace(SETTINGS, together=2)
    whole = trained(base, groups, settings)
    _, first = first_prefix(base, 4, 0)
    some = {r.prefix.name: r for r in train_prefixes(base, groups, first, settings, wanted={"p4"})}
    assert "p4" in some
    assert len(some) < 5
    for name, result in some.items():
        assert torch.equal(result.prefix.embeddings, whole[name].prefix.embeddings)


def cramp(monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[list[int]]:
    """Memory for so many rows. Returns the prefixes of the rows of each pass that was begun."""
    begun: list[list[int]] = []
    rows = Prefixes.rows

    def cramped(self: Prefixes, index: Sequence[int]) -> Any:
        begun.append(list(index))
        if len(index) > most:
            raise error
        return rows(self, index)

    monkeypatch.setattr(Prefixes, "rows", cramped)
    return begun


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when")],
)
def test_a_full_memory_is_met_with_fewer_rows_at_once_and_said(
    error: Exception, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [group("p0", 8), group("p1", 8, 1), group("p2", 8, 2)]
    wanted = trained(base, groups, SETTINGS)
    _, first = first_prefix(base, 4, SETTINGS.seed)
    begun, said = cramp(monkeypatch, 2, error), []
    found = {r.prefix.name: r for r in train_prefixes(base, groups, first, SETTINGS, said=said.append)}
    assert [len(index) for index in begun[:4]] == [12, 6, 3, 1]
    assert max(map(len, begun[4:])) == 1
    assert [text.split(":")[0] for text in said] == [
        "memory ran out at 4 rows of an adapter at once", "memory ran out at 2 rows of an adapter at once",
        "memory ran out at one row of 3 adapters at once",
    ]  # fmt: skip
    for name, one in wanted.items():
        assert found[name].losses == pytest.approx(one.losses, rel=1e-4)
        assert torch.allclose(found[name].prefix.embeddings, one.prefix.embeddings, atol=1e-3)
    begun, said = cramp(monkeypatch, 0, error), []
    with pytest.raises(ModelError, match="memory runs out at one row of one adapter"):
        list(train_prefixes(base, groups, first, SETTINGS))


def test_micro_batches_count_the_rows_of_one_prefix(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group("p0", 4), group("p1", 3, 1)]
    begun = cramp(monkeypatch, 99, MemoryError())
    trained(base, groups, replace(SETTINGS, epochs=1, micro_batch=3))
    assert begun == [[0, 0, 0, 1, 1, 1], [1]]  # p0 is the second: those with fewer rows come first


def test_those_who_watch_are_told_of_each_step(base: BaseModel) -> None:
    groups = [group("p0", 8), group("p1", 3, 1), group("p2", 8, 2)]
    _, first = first_prefix(base, 4, 0)
    told: list[tuple[dict[str, Any], int]] = []
    settings = replace(SETTINGS, together=1)
    results = train_prefixes(
        base,
        groups,
        first,
        settings,
        {"p0", "p1"},
        stepped=lambda progress, tokens: told.append((dict(progress), tokens)),
    )
    losses = {result.prefix.name: result.losses for result in results}
    last = told[-1][0]
    assert last.keys() == losses.keys() == {"p0", "p1"}
    assert {name: (p.step, p.steps, p.epoch, p.done) for name, p in last.items()} == {
        "p0": (6, 6, 3.0, True), "p1": (3, 3, 3.0, True)
    }  # fmt: skip
    assert tuple(progress["p0"].loss for progress, _ in told if progress["p0"].step > 0) == losses["p0"]
    rows = [encode_rows(base, *_texts(one), end=True) for one in groups[:2]]
    assert sum(tokens for _, tokens in told) == 3 * sum(len(row) for some in rows for row in some)


def test_a_nan_stays_in_its_own_prefix(base: BaseModel) -> None:
    good, bad = draw(base, [4, 4])
    with torch.inference_mode():
        alone = attach(base, [good])
        with alone.rows([0]):
            wanted = base.model(torch.tensor([[9, 10]])).logits[0]
        alone.load([bad.embeddings * torch.nan, good.embeddings])
        with alone.rows([0, 1]):
            both = base.model(torch.tensor([[9, 10], [9, 10]])).logits
    alone.detach()
    assert bool(both[0].isnan().all())
    assert torch.allclose(both[1], wanted, atol=1e-5)
    found = trained(base, [group("p0", 6)], replace(SETTINGS, learning_rate=1e30))
    assert found["p0"].diverged


def test_a_prefix_that_its_last_step_broke_has_diverged(base: BaseModel) -> None:
    broken = trained(base, [group("p0", 4)], replace(SETTINGS, epochs=1, learning_rate=1e39))["p0"]
    assert [math.isfinite(loss) for loss in broken.losses] == [True]
    assert broken.diverged


def test_a_saved_prefix_loads_in_peft_as_it_is(any_base: BaseModel, tmp_path: Path) -> None:
    config, first = first_prefix(any_base, 4, 7)
    prefix = Prefix("p", first + 1)
    for name, data in encode_prefix(prefix, config).items():
        (tmp_path / name).write_bytes(data)
    assert torch.equal(read_prefix(str(tmp_path), "p").embeddings, prefix.embeddings)
    wanted = _logits(any_base, prefix.embeddings)
    model: Any = PeftModel.from_pretrained(any_base.model, tmp_path)
    with torch.inference_mode():
        assert model(torch.arange(8, 20)[None]).logits.numpy() == pytest.approx(wanted, abs=1e-4)


def test_the_files_are_those_that_peft_saves(base: BaseModel, tmp_path: Path) -> None:
    import json

    config, first = first_prefix(base, 4, 7)
    torch.manual_seed(7)
    model: Any = get_peft_model(base.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.save_pretrained(tmp_path)
    files = encode_prefix(Prefix("p", first), config)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {**json.loads(files["adapter_config.json"]), "base_model_name_or_path": None} == {
        **saved, "base_model_name_or_path": None
    }  # fmt: skip
    (tmp_path / "ours.safetensors").write_bytes(files["adapter_model.safetensors"])
    theirs, ours = load_file(tmp_path / "adapter_model.safetensors"), load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == ours.keys()
    assert torch.equal(theirs["prompt_embeddings"], ours["prompt_embeddings"])


def test_the_base_is_left_as_it_was(any_base: BaseModel) -> None:
    settings = GenerationSettings(max_new_tokens=8)
    before = {name: tensor.clone() for name, tensor in any_base.model.state_dict().items()}
    attributes = [sorted(module.__dict__) for module in any_base.model.modules()]
    answers = generate(any_base, None, PROMPTS, None, settings)
    nats = score_references(any_base, None, PROMPTS, REFERENCES, None)
    trained(any_base, [group("p0", 6)], SETTINGS)
    assert generate(any_base, None, PROMPTS, None, settings) == answers
    assert score_references(any_base, None, PROMPTS, REFERENCES, None) == nats
    after = any_base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert [sorted(module.__dict__) for module in any_base.model.modules()] == attributes
    assert not any(p.requires_grad for p in any_base.model.parameters())


def test_a_prefix_that_leaves_no_room_is_refused(base: BaseModel) -> None:
    (long,) = draw(base, [120])
    with pytest.raises(ModelError, match="p0: a prefix of 120 tokens leaves 8 of the model's 128 places"):
        check_prefix(long, base.model, room=13)
    check_prefix(long, base.model, room=8)
    with pytest.raises(ModelError, match="leaves 0 of"):
        list(train_prefixes(base, [group("p0", 2)], draw(base, [128])[0].embeddings, SETTINGS))
    with pytest.raises(ModelError, match=r"p0: a training row has 1\d tokens, and the prefix leaves room for 8"):
        list(train_prefixes(base, [group("p0", 6)], long.embeddings, SETTINGS))
    short = replace(SETTINGS, truncate=True)
    assert len(list(train_prefixes(base, [group("p0", 6)], long.embeddings, short))) == 1


def test_prompts_lose_their_start_to_the_prefix(base: BaseModel) -> None:
    """A prompt of which the context holds 128 - 12 - 20 tokens is answered as that much of it."""
    words = [f"w{i % 50}" for i in range(200)]
    attached = attach(base, draw(base, [20]))
    settings = GenerationSettings(max_new_tokens=12)
    prompts = ["<s> " + " ".join(words), "<s> " + " ".join(words[-95:])]
    whole, cut = generate(base, attached, prompts, [0, 0], settings, 1)
    assert whole == cut
    nats = score_references(
        base, attached, ["<s> " + " ".join(words), "<s> " + " ".join(words[-106:])], ["w1"] * 2, [0, 0], 1
    )
    assert nats[0] == nats[1]


def test_what_is_no_prefix_is_refused_by_name(base: BaseModel, gpt2: BaseModel, tmp_path: Path) -> None:
    config, first = first_prefix(base, 4, 0)
    with pytest.raises(AdapterError, match="ada: there is no prefix"):
        read_prefix(str(tmp_path), "ada")
    files = encode_prefix(Prefix("p", first), config)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedAdapterError, match=r"ada: .* is no prefix\.\nIts peft_type is LORA"):
        read_prefix(str(tmp_path), "ada")
    (tmp_path / "adapter_config.json").write_bytes(files["adapter_config.json"])
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(files[weights.name][:-9])
    with pytest.raises(AdapterError, match=r"ada: adapter_model.safetensors holds no prefix"):
        read_prefix(str(tmp_path), "ada")
    save_file({"prompt_embeddings": first.index_fill(0, torch.tensor([1]), torch.nan)}, weights)
    with pytest.raises(AdapterError, match=r"ada: adapter_model\.safetensors holds NaN"):
        read_prefix(str(tmp_path), "ada")
    with pytest.raises(ModelError, match=r"p: its prefix has 64 numbers per token, the model's cache 128"):
        check_prefix(Prefix("p", first), gpt2.model, room=1)
    attached = attach(base, draw(base))
    with pytest.raises(ModelError, match="rows name prefixes 0 to 9"), attached.rows([0, 9]):
        pass
    with pytest.raises(ModelError, match="prefixes cannot be mixed"):
        generate(base, attached, ["w1"], torch.ones(1, 4), GenerationSettings())
    with pytest.raises(ModelError, match="p1: has no training examples"):
        list(train_prefixes(base, [TrainingGroup("p1", ())], first, SETTINGS))


def test_models_with_a_cache_of_their_own_form_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="models of type bloom cannot have one"):
        Prefixes(model)
