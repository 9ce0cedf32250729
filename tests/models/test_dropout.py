"""Dropout is a function of where a number stands."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.models.base import BaseModel
from raymerge.models.dropout import Dropout, masked, row_keys
from raymerge.models.training import train
from tests.models.training_groups import SETTINGS, group, relative


def mask(share: float, rows: list[int], width: int, features: int, **key: object) -> torch.Tensor:
    chosen = {"seed": 0, "adapter": "p0", "step": 3, "module": "q", **key}
    keys = row_keys(chosen["seed"], chosen["adapter"], chosen["step"], torch.tensor(rows))  # type: ignore[arg-type]
    ones = torch.ones(len(rows), width, features)
    return masked(ones, Dropout(share, keys).kept(str(chosen["module"]), ones))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 12), st.integers(1, 40))
def test_a_number_is_kept_or_not_whatever_stands_beside_it(rows: list[int], width: int, more: int, wide: int) -> None:
    alone = torch.cat([mask(0.5, [row], width + more, wide) for row in rows])[:, :width]
    assert torch.equal(mask(0.5, rows, width, wide), alone)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_the_share_is_kept_and_nothing_repeats(share: float) -> None:
    kept = mask(share, list(range(64)), 32, 128).double()
    spread = (share * (1 - share)) ** 0.5
    assert abs(float(kept.mean()) - (1 - share)) < 4 * spread / kept.numel() ** 0.5
    centred = (kept.view(-1, 128) - (1 - share)) / spread
    for rows in (centred, centred.T):  # rows and columns are as unlike each other as chance makes them
        products = (rows @ rows.T / rows.shape[1] ** 0.5).fill_diagonal_(0)
        assert float(products.square().mean().sqrt()) == pytest.approx(1, abs=0.05)
    for other in ({"seed": 1}, {"adapter": "p1"}, {"step": 4}, {"module": "k"}):
        differing = mask(share, list(range(64)), 32, 128, **other).double() != kept
        assert float(differing.double().mean()) == pytest.approx(2 * spread**2, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_stays_as_it_is(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = masked(x, Dropout(0.5, torch.arange(3)).kept("q", x))
    assert torch.equal(found, torch.where(found == 0, 0, x))
    assert torch.equal(found == 0, masked(torch.ones_like(x), Dropout(0.5, torch.arange(3)).kept("q", x)) == 0)
    ones = torch.ones(3, 40, 16)
    assert torch.equal(found != 0, masked(ones, Dropout(0.5, torch.arange(3)).kept("q", ones)) != 0)


def test_what_is_kept_is_scaled_up() -> None:
    assert Dropout(0.2, torch.zeros(1, dtype=torch.int64)).factor == pytest.approx(1.25)


@pytest.mark.parametrize("change", [{}, {"micro_batch": 2}, {"gradient_checkpointing": True}, {"together": 2}])
def test_dropout_together_is_dropout_alone(base: BaseModel, change: dict[str, object]) -> None:
    settings = replace(SETTINGS, dropout=0.3)
    groups = [group("p0", 10, 0), group("p1", 7, 1), group("p2", 10, 2)]
    together = train(base, groups, replace(settings, **change))  # type: ignore[arg-type]
    for one, result in zip(groups, together, strict=True):
        assert relative(result.adapter, train(base, [one], settings)[0].adapter) < 1e-4
    assert relative(together[0].adapter, train(base, groups[:1], SETTINGS)[0].adapter) > 0.05


def test_the_loss_with_dropout_is_that_of_masked_inputs(base: BaseModel) -> None:
    """The second step's loss, against PEFT's layers with the same masks in the place of its dropout."""
    from peft import LoraConfig, get_peft_model

    from raymerge.models.answers import encode_rows, pad_right

    settings = replace(SETTINGS, dropout=0.4, epochs=2, target_modules=("down_proj",), learning_rate=0.3)
    one = group("p0", 4)
    (result,) = train(base, [one], settings)
    (first,) = train(base, [one], replace(settings, epochs=1))
    model = get_peft_model(base.model, LoraConfig(r=3, lora_alpha=6, target_modules=["down_proj"], lora_dropout=0.4))
    model.eval()
    keys = row_keys(settings.seed, "p0", 1, torch.arange(4))

    class Masked(torch.nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * masked(torch.ones_like(x), Dropout(0.4, keys).kept(self.path, x)) / 0.6

    for path, module in first.adapter.modules.items():
        layer = model.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(module.A)
        layer.lora_B["default"].weight.data.copy_(module.B)
        layer.lora_dropout["default"] = Masked(path)
    rows = sorted(encode_rows(base, [p for p, _ in one.rows], [a for _, a in one.rows], end=True), key=len)
    batch = pad_right(rows, base.pad_id)
    labels = batch.ids.masked_fill(~batch.answer, -100)
    with torch.no_grad():
        wanted = float(model(input_ids=batch.ids, labels=labels).loss)
        for path in first.adapter.modules:
            model.base_model.model.get_submodule(path).lora_dropout["default"] = torch.nn.Identity()
        whole = float(model(input_ids=batch.ids, labels=labels).loss)
    assert result.losses[1] == pytest.approx(wanted, rel=1e-5)
    assert abs(whole - wanted) > 1e-3
    model.unload()
