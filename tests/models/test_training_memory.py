"""Rows cut by micro_batch or by memory, and blocks computed again, give the same; what is kept is less."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.models.training import Trained, train
from tests.models.training_groups import SETTINGS, Recorder, group, relative

GROUPS = [group("p0", 16, 0, validation=3), group("p1", 12, 1, validation=6), group("p2", 8, 2, validation=1)]


def assert_same(found: list[Trained], wanted: list[Trained]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert relative(one.adapter, other.adapter) < 1e-4
        assert [loss for _, loss in one.validation] == pytest.approx([loss for _, loss in other.validation], rel=1e-5)


@settings(max_examples=5)
@given(st.integers(1, 7), st.integers(1, 7))
def test_accumulation_changes_nothing(fixed_base: BaseModel, micro_batch: int, batch_size: int) -> None:
    whole = replace(SETTINGS, batch_size=batch_size, epochs=2, patience=9)
    assert_same(train(fixed_base, GROUPS, replace(whole, micro_batch=micro_batch)), train(fixed_base, GROUPS, whole))


def gpu_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def cpu_error() -> Exception:
    try:
        torch.empty(10**16)
    except RuntimeError as error:
        return error
    raise AssertionError


@contextmanager
def too_large_above(base: BaseModel, rows: int, error: Exception, backward: bool = False) -> Iterator[list[int]]:
    """A model whose last block finds no memory for more rows; yields the rows that it was given."""
    seen: list[int] = []
    layer = base.model.model.layers[-1]

    def check(_module: Any, inputs: Any, *_: Any) -> None:
        count, width = inputs[0].shape[:2]
        if width > 4:  # not the few tokens on which the form of the model is tried
            seen.append(count)
            if count > rows:
                raise error

    def check_gradient(_module: Any, _inputs: Any, gradients: Any) -> None:
        check(None, gradients)

    hook = layer.register_full_backward_hook(check_gradient) if backward else layer.register_forward_pre_hook(check)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("make", [gpu_error, cpu_error])
@pytest.mark.parametrize(("fits", "said"), [
    (6, ["4 rows of an adapter at once: 2 from now on"]),
    (3, ["4 rows of an adapter at once: 2 from now on", "2 rows of an adapter at once: 1 from now on"]),
    (1, ["4 rows of", "2 rows of", "one row of 3 adapters at once: 1 from now on"]),
])  # fmt: skip
def test_less_at_once_where_memory_runs_out(base: BaseModel, make: Any, fits: int, said: list[str]) -> None:
    chosen = replace(SETTINGS, patience=9)
    wanted = train(base, GROUPS, chosen)
    watch = Recorder()
    with too_large_above(base, fits, make()) as seen:
        assert_same(train(base, GROUPS, chosen, watch=watch), wanted)
    assert len(watch.texts) == len(said)
    assert all(part in text for part, text in zip(said, watch.texts, strict=True))
    assert sum(rows > fits for rows in seen) == len(said)  # it stays there


def test_gradients_of_a_step_that_failed_are_forgotten(base: BaseModel) -> None:
    wanted = train(base, GROUPS, SETTINGS)
    with too_large_above(base, 6, gpu_error(), backward=True) as seen:
        assert_same(train(base, GROUPS, SETTINGS), wanted)
    assert max(seen) > 6


def test_what_does_not_fit_at_one_row_is_an_error(base: BaseModel) -> None:
    with too_large_above(base, 0, cpu_error()), pytest.raises(ModelError) as raised:
        train(base, GROUPS, SETTINGS)
    first, *rest = str(raised.value).splitlines()
    assert first == "memory runs out at one row of one adapter."
    assert "DefaultCPUAllocator" in rest[0]
    assert "Lower training.max_length" in rest[1]
    with (
        too_large_above(base, 0, RuntimeError("a fault of another kind")),
        pytest.raises(RuntimeError, match="another"),
    ):
        train(base, GROUPS, SETTINGS)
    assert all("forward" not in module.__dict__ for module in base.model.modules())


def kept_bytes(base: BaseModel, gradient_checkpointing: bool) -> tuple[list[Trained], int]:
    """A training, and the most bytes that were kept at once for a backward pass."""
    alive = peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            self.tensor, self.size = tensor, tensor.nbytes
            alive += self.size
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    chosen = replace(SETTINGS, gradient_checkpointing=gradient_checkpointing, batch_size=6)
    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        found = train(base, [group("p0", 24)], chosen)
    return found, peak


@pytest.mark.parametrize("kind", ["base", "gpt2"])
def test_blocks_computed_again_keep_less_and_give_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(kind)
    if kind == "gpt2":  # a model with dropout, which must stay off
        assert base.model.config.resid_pdrop > 0
    wanted, whole = kept_bytes(base, False)
    found, less = kept_bytes(base, True)
    assert_same(found, wanted)
    assert less < 0.7 * whole
    assert not base.model.training
    assert all("forward" not in module.__dict__ for module in base.model.modules())
