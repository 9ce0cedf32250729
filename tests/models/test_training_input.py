"""What no training can be is refused by name, and rsLoRA's scaling survives in PEFT."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raymerge.adapters import save_adapter
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.models.training import TrainingGroup, train
from tests.models.training_groups import SETTINGS, Recorder, group


@pytest.mark.parametrize(("change", "message"), [
    ({"rank": 0}, r"training\.rank is 0"),
    ({"warmup": 2}, r"training\.warmup is 2"),
    ({"dropout": 1.0}, r"training\.dropout is 1\.0"),
    ({"micro_batch": 0}, r"training\.micro_batch is 0"),
    ({"patience": 0}, r"training\.patience is 0"),
    ({"together": 0}, r"training\.together is 0"),
    ({"target_modules": ("w_q",)}, r"names 'w_q', which .* lacks; it has: .*q_proj"),
    ({"target_modules": ()}, r"training\.target_modules is empty"),
    ({"learning_rate": math.nan}, r"training\.learning_rate is nan"),
    ({"learning_rate": math.inf}, r"training\.learning_rate is inf"),
    ({"alpha": math.nan}, r"training\.alpha is nan"),
    ({"warmup": math.nan}, r"training\.warmup is nan"),
    ({"weight_decay": math.nan}, r"training\.weight_decay is nan"),
    ({"clip": math.nan}, r"training\.clip is nan"),
    ({"dropout": math.nan}, r"training\.dropout is nan"),
])  # fmt: skip
def test_impossible_settings_are_refused(base: BaseModel, change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        train(base, [group("p0", 4)], replace(SETTINGS, **change))  # type: ignore[arg-type]


def test_impossible_rows_are_refused_with_adapter_and_row(base: BaseModel) -> None:
    good = group("good", 4)
    with pytest.raises(ModelError, match="p0: has no training examples"):
        train(base, [good, TrainingGroup("p0", ())], SETTINGS)
    with pytest.raises(ModelError, match="good: two groups have this name"):
        train(base, [good, good], SETTINGS)
    for empty in ("", "  \n"):
        with pytest.raises(ModelError, match=r"p0: row 1: the answer .*"):
            train(base, [good, TrainingGroup("p0", (("w1", "w2"), ("w1", empty)))], SETTINGS)
    with pytest.raises(ModelError, match="p0: validation: row 0: the answer is empty"):
        train(base, [TrainingGroup("p0", good.rows, (("w1", ""),))], replace(SETTINGS, patience=1))


def test_a_row_longer_than_the_context_is_refused_or_cut(base: BaseModel) -> None:
    long = TrainingGroup("p0", (("w1", "w2"), ("w1 " * 150, "w2 w3")))
    with pytest.raises(ModelError, match=r"p0: row 1 has 153 tokens, the limit is 128: set .*\n.* what the base"):
        train(base, [long], SETTINGS)
    above = replace(SETTINGS, max_length=140)
    with pytest.raises(ModelError, match=r"p0: row 1 has 153 tokens, the limit is 128: set .*\n.* what the base"):
        train(base, [long], above)
    short = replace(SETTINGS, max_length=5)
    with pytest.raises(ModelError, match=r"p0: row 1 has 10 tokens, the limit is 5: .*\n.* training\.max_len"):
        train(base, [group("p0", 4)], short)
    for chosen in (SETTINGS, above):
        watch = Recorder()
        (result,) = train(base, [long], replace(chosen, truncate=True), watch=watch)
        assert watch.tokens == SETTINGS.epochs * (3 + 128)
    assert not result.diverged
    (cut,) = train(base, [TrainingGroup("p0", (("w1 w4 w5 w6", "w2"),))], replace(short, truncate=True))
    (same,) = train(base, [TrainingGroup("p0", (("w1 w5 w6", "w2"),))], short)
    assert cut.losses == same.losses


def test_an_error_of_the_watch_ends_the_training_and_leaves_the_model_as_it_was(base: BaseModel) -> None:
    class Stopping(Recorder):
        def stepped(self, *_: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, [group("p0", 4)], replace(SETTINGS, gradient_checkpointing=True), watch=Stopping())
    assert all("forward" not in module.__dict__ for module in base.model.modules())


def test_no_groups_are_no_training(base: BaseModel) -> None:
    assert train(base, [], SETTINGS) == []


def test_rslora_scales_by_the_root_of_the_rank_and_loads_in_peft(base: BaseModel, tmp_path: Path) -> None:
    from peft import PeftModel

    settings = replace(SETTINGS, rank=4, alpha=6.0, rslora=True)
    watch = Recorder(wanted=frozenset([2]))
    one = group("p0", 4)
    (first,) = train(base, [one], replace(settings, epochs=1))
    (result,) = train(base, [one], replace(settings, epochs=2), watch=watch)
    assert {module.scaling for module in result.adapter.modules.values()} == {3.0}
    save_adapter(first.adapter, str(tmp_path / "p0"))
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "p0")).eval()
    nats = tokens = 0.0
    for prompt, answer in one.rows:
        ids = base.tokenizer(f"{prompt} {answer} </s>", return_tensors="pt")["input_ids"]
        count = len(answer.split()) + 1
        labels = ids.clone()
        labels[:, :-count] = -100
        with torch.inference_mode():
            nats += float(model(input_ids=ids, labels=labels).loss) * count
        tokens += count
    assert result.losses[1] == pytest.approx(nats / tokens, rel=1e-5)
    assert result.losses[1] != pytest.approx(result.losses[0], rel=1e-4)
    model.unload()
