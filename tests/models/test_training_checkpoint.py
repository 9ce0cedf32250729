"""A training that goes on from a checkpoint ends with the very bytes of one that was not interrupted."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.adapters import LoraAdapter
from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.models.training import Trained, TrainingGroup, TrainingSettings, train
from tests.models.training_groups import SETTINGS, Recorder, group

GROUPS = [group(f"p{i}", rows, i, validation=2) for i, rows in enumerate((5, 13, 3, 9, 9))]
NAMES = [one.name for one in GROUPS]
KINDS = {
    "plain": replace(SETTINGS, together=2),
    "everything": replace(
        SETTINGS, together=3, epochs=6, learning_rate=0.03, patience=1, dropout=0.2, rslora=True, micro_batch=3,
        weight_decay=0.1, shared_init=False, gradient_checkpointing=True,
    ),
}  # fmt: skip


class InterruptedTrainingError(Exception):
    pass


class Stopping(Recorder):
    """Ends a training right after its first checkpoint."""

    def save(self, state: bytes) -> None:
        super().save(state)
        raise InterruptedTrainingError


def assert_equal(found: list[Trained], wanted: list[Trained]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert replace(one, adapter=other.adapter) == other
        for path, module in other.adapter.modules.items():
            assert torch.equal(one.adapter.modules[path].A, module.A)
            assert torch.equal(one.adapter.modules[path].B, module.B)
            assert one.adapter.modules[path].scaling == module.scaling


@pytest.fixture(scope="module")
def undisturbed(fixed_base: BaseModel) -> dict[str, tuple[list[Trained], int]]:
    """Each kind of training without interruption, and how many joint steps it has."""
    found = {}
    for kind, chosen in KINDS.items():
        watch = Recorder()
        found[kind] = train(fixed_base, GROUPS, chosen, watch=watch), len(watch.steps)
    return found


@settings(max_examples=12)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3))
def test_interrupted_anywhere_ends_with_the_same_bytes(
    fixed_base: BaseModel, undisturbed: dict[str, tuple[list[Trained], int]], kind: str, places: list[float]
) -> None:
    wanted, steps = undisturbed[kind]
    state, taken = None, 0
    for place in sorted({max(1, int(steps * place)) for place in places}):
        watch = Stopping(wanted=frozenset([place - taken]))
        with pytest.raises(InterruptedTrainingError):
            train(fixed_base, GROUPS, KINDS[kind], watch=watch, state=state)
        (state,), taken = watch.states, place
    watch = Recorder()
    assert_equal(train(fixed_base, GROUPS, KINDS[kind], watch=watch, state=state), wanted)
    assert len(watch.steps) == steps - taken
    # those that were done before are told again, so that whoever writes them misses none
    assert sorted(t.adapter.name for t in watch.done) == [one.name for one in GROUPS]


def test_checkpoints_change_nothing_and_equal_states_are_equal_bytes(
    fixed_base: BaseModel, undisturbed: dict[str, tuple[list[Trained], int]]
) -> None:
    wanted, steps = undisturbed["everything"]
    first, second = (Recorder(wanted=frozenset(range(steps))) for _ in range(2))
    for watch in (first, second):
        assert_equal(train(fixed_base, GROUPS, KINDS["everything"], watch=watch), wanted)
    assert first.states == second.states
    assert len(first.states) == steps - 1  # none when nothing is left to do


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_kept_elsewhere_is_left_out_and_not_told_again(
    fixed_base: BaseModel, undisturbed: dict[str, tuple[list[Trained], int]], kind: str
) -> None:
    wanted, steps = undisturbed[kind]
    for place in range(1, steps, 4):
        kept, held = (Stopping(wanted=frozenset([place]), keeps=keeps) for keeps in (frozenset(NAMES), frozenset()))
        for watch in (kept, held):
            with pytest.raises(InterruptedTrainingError):
                train(fixed_base, GROUPS, KINDS[kind], watch=watch)
        before = {one.adapter.name for one in kept.done}
        floats = sum(m.A.numel() + m.B.numel() for m in wanted[0].adapter.modules.values())
        assert (len(held.states[0]) - len(kept.states[0])) // (4 * floats) == len(before)
        later = Recorder()
        found = train(fixed_base, GROUPS, KINDS[kind], watch=later, state=kept.states[0])
        assert_equal(found, [one for one in wanted if one.adapter.name not in before])
        assert sorted(one.adapter.name for one in later.done) == sorted(set(NAMES) - before)
        assert later.steps[-1].keys() == set(NAMES)
        assert all(one.done for one in later.steps[-1].values())


def test_the_rows_that_memory_allowed_are_remembered(base: BaseModel) -> None:
    def check(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[1] > 4 and len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = base.model.model.layers[0].register_forward_pre_hook(check)
    one, watch, later = [group("p0", 12)], Stopping(wanted=frozenset([2])), Recorder()
    with pytest.raises(InterruptedTrainingError):
        train(base, one, SETTINGS, watch=watch)
    train(base, one, SETTINGS, watch=later, state=watch.states[0])
    hook.remove()
    assert watch.texts == ["memory ran out at 4 rows of an adapter at once: 2 from now on, accumulated"]
    assert later.texts == []


@pytest.fixture(scope="module")
def state(fixed_base: BaseModel) -> bytes:
    watch = Stopping(wanted=frozenset([4]))
    with pytest.raises(InterruptedTrainingError):
        train(fixed_base, GROUPS, SETTINGS, watch=watch)
    return watch.states[0]


@pytest.mark.parametrize(("change", "names"), [
    ({"epochs": 4}, "settings"),
    ({"seed": 1}, "settings"),
    ({"target_modules": ("q_proj",)}, "settings, modules"),
    ({"rank": 5}, "settings"),
])  # fmt: skip
def test_a_state_of_other_settings_is_refused(
    fixed_base: BaseModel, state: bytes, change: dict[str, object], names: str
) -> None:
    with pytest.raises(ModelError, match=f"what differs: {names}"):
        train(fixed_base, GROUPS, replace(SETTINGS, **change), state=state)  # type: ignore[arg-type]


def test_a_state_of_another_training_is_refused(fixed_base: BaseModel, gpt2: BaseModel, state: bytes) -> None:
    others = [*GROUPS[:-1], TrainingGroup("p4", GROUPS[-1].rows[::-1])]
    with pytest.raises(ModelError, match="what differs: groups"):
        train(fixed_base, others, SETTINGS, state=state)
    with pytest.raises(ModelError, match="what differs: modules"):
        train(gpt2, GROUPS, SETTINGS, state=state)


def test_a_state_with_another_start_is_refused(
    base: BaseModel, state: bytes, make_adapter: Callable[..., LoraAdapter]
) -> None:
    start = make_adapter(base, 7, rank=3)
    with pytest.raises(ModelError, match="what differs: start_from"):
        train(base, GROUPS, SETTINGS, start_from=start, state=state)


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_a_broken_state_is_refused(fixed_base: BaseModel, state: bytes, length: int) -> None:
    with pytest.raises(ModelError, match="checkpoint of a training: cannot be read"):
        train(fixed_base, GROUPS, SETTINGS, state=state[: length % len(state)])


def test_a_state_knows_which_adapter_of_the_queue_has_the_slot(fixed_base: BaseModel) -> None:
    chosen = TrainingSettings(rank=2, epochs=2, batch_size=2, together=1)
    watch = Recorder(wanted=frozenset([3, 7]))
    wanted = train(fixed_base, GROUPS[:2], chosen, watch=watch)
    for state in watch.states:
        assert_equal(train(fixed_base, GROUPS[:2], chosen, state=state), wanted)
