"""Adapters of unequal size side by side: each as if alone, no slot idle, little padding, dealt by the plan alone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.models.base import BaseModel
from raymerge.models.training import TrainingGroup, steps_of, train
from raymerge.models.training.rows import Encoded, Limits, Taken, plan, portion, slots_of
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
    assert slots_of(rows, replace(SETTINGS, batch_size=4), "cpu") == 3
    many = rows * 40  # 25 steps of 80 tokens fit into 2048: five turns of 24
    assert slots_of(many, replace(SETTINGS, batch_size=4), "cpu") == 24
    assert slots_of(many, replace(SETTINGS, batch_size=4, micro_batch=2), "cpu") == 40
    assert slots_of(many, replace(SETTINGS, together=7), "cpu") == 7


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


def share_of_padding(base: BaseModel, sizes: list[int], together: int) -> float:
    """Share of the tokens that went through the model which is padding, in an epoch of adapters of so many rows."""
    rng = np.random.default_rng(0)
    words = [np.clip(rng.lognormal(2.2, 0.5, size), 2, 40).astype(int) for size in sizes]
    groups = [
        TrainingGroup(f"p{i}", [(" ".join(["w1"] * int(n)), "w2 w3.") for n in own]) for i, own in enumerate(words)
    ]
    computed: list[int] = []
    hook = base.model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: computed.append(given[0].numel())
    )
    watch = Recorder()
    try:
        train(base, groups, replace(SETTINGS, epochs=1, batch_size=6, together=together), watch=watch)
    finally:
        hook.remove()
    computed = computed[1:]  # the first tells whether the head can be run apart
    return 1 - watch.tokens / sum(computed)


def test_little_of_what_is_computed_is_padding(base: BaseModel) -> None:
    unequal = [int(size) for size in np.random.default_rng(1).integers(6, 50, 12)]
    equal = share_of_padding(base, [30] * 12, 6)
    assert equal < 0.3
    assert share_of_padding(base, unequal, 6) < 0.35
    assert share_of_padding(base, [6] * 6, 6) > equal + 0.05  # one step for each: no row can choose its company
