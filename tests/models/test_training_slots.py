"""Adapters of unequal size side by side: each as if alone, no slot idle, little padding, dealt by the plan alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.models.base import BaseModel
from raymerge.models.training import TrainingGroup, steps_of, train
from raymerge.models.training.rows import Encoded, Limits, Taken, epoch_order, plan, portion
from raymerge.models.training.train import _slots
from tests.models.training_groups import SETTINGS, Recorder, group, relative


@settings(max_examples=10)
@given(st.lists(st.integers(1, 14), min_size=2, max_size=6), st.integers(1, 4), st.booleans())
def test_unequal_groups_together_are_what_each_is_alone(
    fixed_base: BaseModel, sizes: list[int], together: int, shared: bool
) -> None:
    chosen = replace(SETTINGS, together=together, shared_init=shared, epochs=2)
    groups = [group(f"p{i}", size, i) for i, size in enumerate(sizes)]
    for one, result in zip(groups, train(fixed_base, groups, chosen), strict=True):
        (alone,) = train(fixed_base, [one], chosen)
        assert relative(result.adapter, alone.adapter) < 1e-4
        assert result.losses == pytest.approx(alone.losses, rel=1e-4)
        assert (result.adapter.name, result.tokens) == (one.name, alone.tokens)


def test_no_slot_idles_until_the_queue_is_empty(base: BaseModel) -> None:
    sizes = [3, 30, 11, 18, 7, 22, 5, 9]
    watch = Recorder()
    groups = [group(f"p{i}", size, i) for i, size in enumerate(sizes)]
    train(base, groups, replace(SETTINGS, together=3), watch=watch)
    steps = [steps_of(size, SETTINGS) for size in sizes]
    before = dict.fromkeys((g.name for g in groups), 0)
    width = min(3, len(steps))
    for told in watch.steps:
        waiting = [name for name, step in before.items() if step == 0]
        moved = [name for name, one in told.items() if one.step > before[name]]
        left = [name for name in before if not 0 < before[name] == told[name].steps]
        assert len(moved) == min(width, len(left))
        assert all(told[name].step - before[name] == 1 for name in moved)
        started = [told[name].steps for name in waiting if told[name].step]
        assert min(started, default=99) >= max((told[name].steps for name in waiting if not told[name].step), default=0)
        before = {name: one.step for name, one in told.items()}
    assert list(before.values()) == steps
    assert [t.adapter.name for t in watch.done[:1]] != ["p0"]  # the longest begin first, the shortest last
    assert watch.tokens == sum(tokens_of(base, one) for one in groups) * SETTINGS.epochs
    last = watch.steps[-1]["p1"]
    assert (last.epoch, last.done) == (3.0, True)


def tokens_of(base: BaseModel, one: TrainingGroup) -> int:
    return sum(len(base.tokenizer(f"{prompt} {answer}")["input_ids"]) + 1 for prompt, answer in one.rows)


def test_the_plan_alone_says_how_many_are_together() -> None:
    rows = [encoded(np.full(size, 20)) for size in (60, 60, 60)]
    assert _slots(rows, replace(SETTINGS, batch_size=4), "cpu") == 3
    many = rows * 40  # 25 steps of 80 tokens fit into 2048: five turns of 24
    assert _slots(many, replace(SETTINGS, batch_size=4), "cpu") == 24
    assert _slots(many, replace(SETTINGS, batch_size=4, micro_batch=2), "cpu") == 40
    assert _slots(many, replace(SETTINGS, together=7), "cpu") == 7


def encoded(lengths: np.ndarray) -> Encoded:  # type: ignore[type-arg]
    """Rows of these lengths whose ids say where they stand, half of each the answer."""
    lengths = np.sort(lengths)
    ids = np.arange(len(lengths) * lengths[-1]).reshape(len(lengths), -1)
    return Encoded(ids, lengths // 2, lengths)


LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=12)


@given(st.dictionaries(st.integers(0, 5), LENGTHS, min_size=1), st.integers(1, 13), st.integers(1, 6))
def test_every_row_goes_through_the_model_once_within_the_limits(
    found: dict[int, list[int]], rows: int, slots: int
) -> None:
    taken = {slot: Taken(encoded(np.array(own)), np.arange(len(own))) for slot, own in found.items()}
    seen: dict[int, list[int]] = {slot: [] for slot in taken}
    answers = 0
    for parts in plan(taken, Limits(rows, slots), "cpu"):
        assert len(parts) <= slots
        assert all(len(places) <= rows for _, places in parts)
        made = portion(taken, parts)
        assert made.ids.shape[0] == made.numbers.numel() == len(parts) * max(len(places) for _, places in parts)
        assert made.slots == tuple(sorted(made.slots))
        flat = made.ids.flatten()
        assert (flat[made.places + 1] == made.targets).all()
        answers += len(made.targets)
        for slot, places in parts:
            seen[slot] += places.tolist()
    assert all(seen[slot] == list(range(len(own.ranks))) for slot, own in taken.items())
    assert answers == sum(own.answer_tokens for own in taken.values())


def share_of_padding(groups: list[Encoded], together: int) -> float:
    """Share of the computed tokens that is padding, in an epoch of adapters that follow each other in slots."""
    queue = sorted(groups, key=len, reverse=True)
    slots = [(own, 0) for own in queue[:together]]
    waiting, real, computed = queue[together:], 0, 0
    while slots:
        taken = {i: Taken(own, epoch_order(len(own), 0, 6, 0)[step]) for i, (own, step) in enumerate(slots)}
        for parts in plan(taken, Limits(), "cpu"):
            made = portion(taken, parts)
            real, computed = real + made.tokens, computed + made.ids.numel()
        moved = [(own, step + 1) for own, step in slots]
        ended = [(own, step) for own, step in moved if step * 6 >= len(own)]
        slots = [one for one in moved if one not in ended] + [(waiting.pop(0), 0) for _ in ended if waiting]
    return 1 - real / computed


def test_little_of_what_is_computed_is_padding() -> None:
    rng = np.random.default_rng(0)

    def some(size: int) -> Encoded:
        return encoded(np.clip(rng.lognormal(3.2, 0.5, size), 4, 120).astype(np.int64))

    equal = share_of_padding([some(30) for _ in range(50)], 25)
    unequal = share_of_padding([some(int(size)) for size in rng.integers(6, 90, 50)], 25)
    naive = 1 - float(np.mean([own.lengths.mean() / own.lengths.max() for own in (some(30) for _ in range(50))]))
    assert equal < 0.3
    assert unequal < 0.3
    assert naive > 0.5
