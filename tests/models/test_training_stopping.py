"""Validation at the end of each epoch: the best is kept, and who grows no better stops."""

from dataclasses import replace

import pytest

from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.models.generation import score_references
from raymerge.models.multilora import MultiLora
from raymerge.models.training import Trained, TrainingGroup, train
from tests.models.training_groups import SETTINGS, Recorder, group, relative

# a rate at which these few rows are soon learned by heart
HASTY = replace(SETTINGS, epochs=12, learning_rate=0.02, patience=2)


def validation_loss(base: BaseModel, trained: Trained, one: TrainingGroup) -> float:
    """Nats per answer token by the scoring of references, the end token written out."""
    prompts, answers = [p for p, _ in one.validation], [f"{a} </s>" for _, a in one.validation]
    lora = MultiLora(base.model)
    lora.load([trained.adapter])
    nats = score_references(base, lora, prompts, answers, [0] * len(prompts))
    lora.detach()
    tokens = [len(answer.split()) for answer in answers]
    return sum(n * t for n, t in zip(nats, tokens, strict=True)) / sum(tokens)


def test_the_best_is_kept_and_the_slot_is_free(base: BaseModel) -> None:
    groups = [group(f"p{i}", 6 + 3 * i, i, validation=2 + 3 * i) for i in range(4)]
    watch = Recorder()
    together = train(base, groups, replace(HASTY, together=2), watch=watch)
    stopped = 0
    for one, result in zip(groups, together, strict=True):
        epoch = -(-len(one.rows) // HASTY.batch_size)
        steps, losses = zip(*result.validation, strict=True)
        assert steps == tuple(epoch * (i + 1) for i in range(len(steps)))
        assert result.best_step == steps[losses.index(min(losses))]
        assert validation_loss(base, result, one) == pytest.approx(min(losses), rel=1e-4)
        ended = len(result.losses)
        assert ended == steps[-1]
        assert ended == epoch * HASTY.epochs or ended == result.best_step + 2 * epoch
        stopped += ended < epoch * HASTY.epochs
        (alone,) = train(base, [one], HASTY)
        assert (alone.best_step, len(alone.losses)) == (result.best_step, ended)
        assert losses == pytest.approx([loss for _, loss in alone.validation], rel=1e-3)
        assert relative(result.adapter, alone.adapter) < 1e-2
        assert watch.steps[-1][one.name].validation == losses[-1]
    assert stopped
    busy = [
        sum(now[n].step > before[n].step for n in now)
        for before, now in zip(watch.steps, watch.steps[1:], strict=False)
    ]
    assert set(busy[:-1]) <= {1, 2}
    assert busy == sorted(busy, reverse=True)


def test_validation_does_not_touch_what_is_trained(base: BaseModel) -> None:
    one = group("p0", 9, validation=4)
    (watched,) = train(base, [one], replace(SETTINGS, patience=99, learning_rate=1e-3))
    (plain,) = train(base, [one], replace(SETTINGS, learning_rate=1e-3))
    assert watched.best_step == len(watched.losses)  # at so low a rate each epoch is better
    assert relative(watched.adapter, plain.adapter) == 0
    assert (plain.validation, plain.best_step) == ((), None)


def test_patience_without_validation_rows_is_refused(base: BaseModel) -> None:
    with pytest.raises(ModelError, match=r"p1: has no validation examples, and training\.patience is 2"):
        train(base, [group("p0", 4, validation=1), group("p1", 4)], replace(SETTINGS, patience=2))
