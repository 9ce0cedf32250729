"""Many adapters trained at once are what training each alone gives, and what the libraries themselves would give."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raymerge.adapters import LoraAdapter, read_adapter, save_adapter
from raymerge.errors import ModelError, UnsupportedAdapterError
from raymerge.models.answers import encode_rows, pad_right
from raymerge.models.base import BaseModel
from raymerge.models.generation import score_references
from raymerge.models.multilora import MultiLora
from raymerge.models.stacked import Rows
from raymerge.models.training import TrainingGroup, TrainingSettings, batch_order, learning_rate, train
from raymerge.models.training.beginning import first_factors
from raymerge.models.training.optimiser import update
from tests.models.training_groups import SETTINGS, group, relative


@pytest.mark.parametrize("shared", [True, False])
def test_together_equals_alone(base: BaseModel, shared: bool) -> None:
    settings = replace(SETTINGS, shared_init=shared)
    groups = [group("p0", 10, 0), group("p1", 10, 1), group("odd", 7, 2), group("p3", 10, 3)]
    together = train(base, groups, settings)
    assert [result.adapter.name for result in together] == ["p0", "p1", "odd", "p3"]
    for one, result in zip(groups, together, strict=True):
        (alone,) = train(base, [one], settings)
        assert relative(result.adapter, alone.adapter) < 1e-4
        assert result.losses == pytest.approx(alone.losses, rel=1e-4)
        assert result.tokens == alone.tokens


def test_the_size_of_a_chunk_changes_nothing(base: BaseModel) -> None:
    groups = [group(f"p{i}", 6, i) for i in range(5)]
    whole = train(base, groups, replace(SETTINGS, together=5))
    for result, wanted in zip(train(base, groups, replace(SETTINGS, together=2)), whole, strict=True):
        assert relative(result.adapter, wanted.adapter) < 1e-4


def peft_training(base: BaseModel, rows: TrainingGroup, settings: TrainingSettings, start: LoraAdapter) -> LoraAdapter:
    """The same training with PEFT's layers, torch's autograd, loss, clipping and optimiser, one row at a time."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank, lora_alpha=int(settings.alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base.model, config).eval()
    layers = {name: model.base_model.model.get_submodule(name) for name in start.modules}
    for name, module in start.modules.items():
        layers[name].lora_A["default"].weight.data.copy_(module.A)
        layers[name].lora_B["default"].weight.data.copy_(module.B)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=settings.weight_decay)
    encoded = encode_rows(base, [p for p, _ in rows.rows], [a for _, a in rows.rows], end=True)
    ordered = sorted(encoded, key=len)
    order = batch_order(len(ordered), settings)
    for step, batch in enumerate(order):
        total, count = torch.zeros(()), 0
        for i in batch.tolist():
            one = pad_right([ordered[i]], base.pad_id)
            labels = one.ids.masked_fill(~one.answer, -100)
            tokens = int(one.answer.sum())
            total = total + model(input_ids=one.ids, labels=labels).loss * tokens
            count += tokens
        optimiser.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimiser.param_groups[0]["lr"] = learning_rate(step, len(order), settings)
        optimiser.step()
    found = {
        name: replace(
            start.modules[name],
            A=layer.lora_A["default"].weight.detach().clone(),
            B=layer.lora_B["default"].weight.detach().clone(),
        )
        for name, layer in layers.items()
    }
    model.unload()
    return replace(start, modules=found)


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_equals_training_with_peft(base: BaseModel, make_adapter: Callable[..., LoraAdapter], clip: float) -> None:
    settings = replace(SETTINGS, clip=clip, weight_decay=0.1)
    start = make_adapter(base, 5, rank=3, scaling=2.0)
    groups = [group("p0", 9, 0), group("p1", 9, 4)]
    for one, result in zip(groups, train(base, groups, settings, start_from=start), strict=True):
        assert relative(result.adapter, peft_training(base, one, settings, start)) < 1e-4


def test_peft_loads_the_result_and_computes_the_same(base: BaseModel, tmp_path: Path) -> None:
    from peft import PeftModel

    (result, _) = train(base, [group("p0", 8), group("p1", 8, 1)], SETTINGS)
    save_adapter(result.adapter, str(tmp_path / "p0"))
    read = read_adapter(str(tmp_path / "p0"))
    assert relative(read, result.adapter) == 0
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    lora = MultiLora(base.model)
    lora.load([read])
    with lora.rows([0, 0, 0]), torch.inference_mode():
        ours = base.model(input_ids=ids).logits
    lora.detach()
    with torch.inference_mode():
        plain = base.model(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base.model, str(tmp_path / "p0")).eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float((ours - plain).abs().max()) > 1e-2


def test_the_first_loss_is_the_bases_and_the_last_is_lower(base: BaseModel) -> None:
    one = group("p0", 4)
    # the random base can say little with its small head, so the head is trained too
    settings = replace(SETTINGS, epochs=30, learning_rate=5e-2, target_modules=("down_proj", "lm_head"))
    (result,) = train(base, [one], settings)
    prompts, answers = [p for p, _ in one.rows], [f"{a} </s>" for _, a in one.rows]
    tokens = [len(a.split()) for a in answers]
    nats = score_references(base, None, prompts, answers, None)
    mean = sum(n * t for n, t in zip(nats, tokens, strict=True)) / sum(tokens)
    assert result.losses[0] == pytest.approx(mean, rel=1e-5)
    assert result.tokens == sum(tokens)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert not result.diverged


def test_a_diverged_adapter_leaves_the_others_alone(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group("good", 6, 0), group("bad", 6, 1)]
    alone = train(base, groups[:1], SETTINGS)[0]

    def poisoned(name: str, seed: int, module: str, rank: int, inner: int) -> Tensor:
        return torch.full((rank, inner), torch.nan) if name == "bad" else first_factors(name, seed, module, rank, inner)

    monkeypatch.setattr("raymerge.models.training.beginning.first_factors", poisoned)
    settings = replace(SETTINGS, shared_init=False)
    good, bad = train(base, groups, settings)
    assert bad.diverged
    assert len(bad.losses) == 1
    assert not good.diverged
    monkeypatch.undo()
    assert relative(good.adapter, train(base, groups[:1], settings)[0].adapter) < 1e-4
    assert not alone.diverged


def test_an_adapter_whose_last_update_is_not_finite_has_diverged(base: BaseModel) -> None:
    chosen = replace(SETTINGS, epochs=1, learning_rate=1e38, clip=1e30)
    (result,) = train(base, [group("p0", 4)], chosen)
    assert len(result.losses) == 1
    assert math.isfinite(result.losses[0])
    assert result.diverged


def test_what_was_best_before_a_training_diverged_is_kept(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one, chosen = group("p0", 8, validation=3), replace(SETTINGS, learning_rate=1e-3, patience=9)
    wanted = train(base, [one], chosen)[0].validation[0]

    def poisoned(stack: Sequence[Rows], steps: Sequence[int], *others: Any) -> None:
        update(stack, steps, *others)
        if steps[0] == 2:
            for rows in stack:
                rows.factors.fill_(math.nan)
                rows.refresh()

    monkeypatch.setattr(sys.modules["raymerge.models.training.train"], "update", poisoned)  # train is a function too
    (result,) = train(base, [one], chosen)
    assert len(result.losses) == 4
    assert math.isnan(result.losses[-1])
    assert (result.best_step, result.validation) == (2, (wanted,))
    assert not result.diverged
    (last,) = train(base, [one], replace(chosen, patience=None))
    assert last.diverged


def test_shared_and_separate_beginnings(base: BaseModel) -> None:
    groups = [group("p0", 4, 0), group("p1", 4, 1)]
    still = replace(SETTINGS, learning_rate=1e-12)
    shared = [r.adapter for r in train(base, groups, still)]
    separate = [r.adapter for r in train(base, groups, replace(still, shared_init=False))]
    for name in shared[0].modules:
        torch.testing.assert_close(shared[0].modules[name].A, shared[1].modules[name].A)
        assert float((separate[0].modules[name].A - separate[1].modules[name].A).abs().max()) > 0.05
        bound = shared[0].modules[name].in_features ** -0.5
        assert 0.8 * bound < float(shared[0].modules[name].A.abs().max()) <= bound * 1.001
    assert relative(shared[0], train(base, groups[1:], replace(still, seed=1))[0].adapter) > 0.5


def test_start_from_continues_a_copy(base: BaseModel, make_adapter: Callable[..., LoraAdapter]) -> None:
    start = make_adapter(base, 7, rank=3, scaling=0.5, skip="mlp")
    before = {name: (m.A.clone(), m.B.clone()) for name, m in start.modules.items()}
    (result,) = train(base, [group("p0", 4)], replace(SETTINGS, learning_rate=1e-12), start_from=start)
    assert result.adapter.started_from == "adapter_7"
    for name, module in result.adapter.modules.items():
        wanted = start.modules[name].delta() if name in start.modules else torch.zeros(module.shape)
        torch.testing.assert_close(module.delta(), wanted, rtol=1e-5, atol=1e-6)
    train(base, [group("p0", 4)], SETTINGS, start_from=start)
    assert all(
        torch.equal(start.modules[n].A, A) and torch.equal(start.modules[n].B, B) for n, (A, B) in before.items()
    )


def test_a_start_that_does_not_fit_is_refused(base: BaseModel, make_adapter: Callable[..., LoraAdapter]) -> None:
    start = make_adapter(base, 7, rank=5)
    with pytest.raises(ModelError, match=r"start_from adapter_7: model\.layers\.0\S+ has rank 5, training\.rank is 3"):
        train(base, [group("p0", 4)], SETTINGS, start_from=start)
    narrow = replace(SETTINGS, rank=5, target_modules=("q_proj",))
    with pytest.raises(ModelError, match="start_from adapter_7: it changes"):
        train(base, [group("p0", 4)], narrow, start_from=start)
    headed = replace(make_adapter(base, 7, rank=3), whole={"lm_head.weight": torch.zeros(64, 32)})
    with pytest.raises(UnsupportedAdapterError, match="adapter_7: cannot be trained further, since it holds whole"):
        train(base, [group("p0", 4)], SETTINGS, start_from=headed)


def test_target_modules(base: BaseModel, gpt2: BaseModel) -> None:
    still = replace(SETTINGS, epochs=1)
    (all_linear,) = train(base, [group("p0", 4)], still)
    assert len(all_linear.adapter.modules) == 14
    assert not all_linear.adapter.fan_in_fan_out
    (two,) = train(base, [group("p0", 4)], replace(still, target_modules=("q_proj", "layers.1.mlp.up_proj")))
    assert list(two.adapter.modules) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip
    (with_head,) = train(base, [group("p0", 4)], replace(still, target_modules=("lm_head", "q_proj")))
    assert float(with_head.adapter.modules["lm_head"].B.abs().max()) > 0
    (conv,) = train(gpt2, [group("p0", 4)], still)
    assert conv.adapter.fan_in_fan_out
    assert conv.adapter.modules["transformer.h.0.mlp.c_fc"].shape == (128, 32)
    with pytest.raises(ModelError, match="names 'w_q', which"):
        train(base, [group("p0", 4)], replace(still, target_modules=("w_q",)))


def test_conv1d_trains_together_as_alone(gpt2: BaseModel) -> None:
    groups = [group("p0", 6, 0), group("p1", 6, 1)]
    for one, result in zip(groups, train(gpt2, groups, SETTINGS), strict=True):
        assert relative(result.adapter, train(gpt2, [one], SETTINGS)[0].adapter) < 1e-4
        assert result.losses[-1] < result.losses[0]


def test_a_bfloat16_base_trains_float32_factors(base: BaseModel) -> None:
    groups = [group("p0", 6, 0), group("p1", 6, 1)]
    exact = train(base, groups, replace(SETTINGS, epochs=10))
    half = replace(base, model=base.model.bfloat16(), dtype=torch.bfloat16)
    for rounded, result in zip(train(half, groups, replace(SETTINGS, epochs=10)), exact, strict=True):
        assert rounded.adapter.dtype == torch.float32
        assert rounded.losses[-1] == pytest.approx(result.losses[-1], rel=0.05)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_every_epoch_takes_every_row_once(rows: int, batch_size: int, epochs: int) -> None:
    settings = TrainingSettings(batch_size=batch_size, epochs=epochs)
    order = batch_order(rows, settings)
    steps = -(-rows // batch_size)
    assert len(order) == steps * epochs
    for epoch in range(epochs):
        taken = torch.cat(order[epoch * steps : (epoch + 1) * steps])
        assert sorted(taken.tolist()) == list(range(rows))
    assert max(map(len, order)) <= batch_size
    assert max(map(len, order)) - min(map(len, order)) <= 1


@given(st.integers(1, 300), st.floats(0, 1))
def test_the_rate_rises_then_falls(steps: int, warmup: float) -> None:
    settings = TrainingSettings(warmup=warmup, learning_rate=1.0)
    rates = [learning_rate(step, steps, settings) for step in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0 or warmup == 1
