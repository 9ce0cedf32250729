"""Rows cut by micro_batch or by memory, and blocks computed again, give the same; what is kept is less."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from raymerge.errors import ModelError
from raymerge.models.base import BaseModel
from raymerge.models.stacked import FactorStack
from raymerge.models.training import Trained, train
from raymerge.models.training.beginning import targets
from tests.models.training_groups import SETTINGS, Recorder, group, relative

GROUPS = [group("p0", 16, 0, validation=3), group("p1", 12, 1, validation=6), group("p2", 8, 2, validation=1)]


@pytest.fixture(autouse=True)
def small_heap() -> Iterator[None]:
    """Wherever memory runs out garbage is collected. What was there before the test, mostly imported libraries, is not
    looked at: it took 0.3 s each time, and most of the time of these tests."""
    gc.freeze()
    yield
    gc.unfreeze()


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
    assert first.startswith("memory runs out at one row of one adapter: lower training.max_length")
    assert all(name in first for name in ("micro_batch", "adapters_per_item", "rank", "gradient_checkpointing"))
    assert "DefaultCPUAllocator" in rest[0]
    with (
        too_large_above(base, 0, RuntimeError("a fault of another kind")),
        pytest.raises(RuntimeError, match="another"),
    ):
        train(base, GROUPS, SETTINGS)
    assert all("forward" not in module.__dict__ for module in base.model.modules())


class Little(TorchFunctionMode):
    """An allocator that holds so many bytes of zeros at once, and raises what a real one would raise for more."""

    def __init__(self, limit: int, make: Callable[[], Exception]) -> None:
        super().__init__()
        self.limit, self.make, self.held, self.most = limit, make, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.zeros, torch.zeros_like) and made.ndim == 2 and made.dtype == torch.float32:
            size = made.untyped_storage().nbytes()
            if self.held + size > self.limit:
                raise self.make()
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(made.untyped_storage(), self.free, size)
        return made

    def free(self, size: int) -> None:
        self.held -= size


def bytes_of_slots(base: BaseModel, slots: int) -> int:
    """Of factors, gradients and moments."""
    stack = FactorStack(base.model, targets(base, "all-linear"), SETTINGS.rank, SETTINGS.scaling)
    stack.allocate(slots)
    return sum(4 * rows.factors.nbytes for rows in stack.rows)


def driver_error() -> Exception:
    return torch.AcceleratorError("CUDA error: out of memory")


SIZES = [9, 5, 12, 4, 8]


@pytest.mark.parametrize("make", [gpu_error, cpu_error, driver_error])
def test_fewer_slots_where_their_factors_do_not_fit(base: BaseModel, make: Callable[[], Exception]) -> None:
    groups, chosen = [group(f"p{i}", size, i) for i, size in enumerate(SIZES)], replace(SETTINGS, together=5)
    wanted, watch = train(base, groups, chosen), Recorder(wanted=frozenset([4]))
    with Little(bytes_of_slots(base, 3), make) as memory:
        assert_same(train(base, groups, chosen, watch=watch), wanted)
    assert watch.texts == ["memory ran out at the factors of 5 adapters: 2 in training from now on, in more turns"]
    assert memory.most <= memory.limit
    assert sum(one.step > 0 for one in watch.steps[0].values()) == 2
    later = Recorder()
    assert_same(train(base, groups, chosen, watch=later, state=watch.states[0]), wanted)
    assert later.texts == []
    assert sum(now.step > before.step for now, before in zip(later.steps[0].values(), watch.steps[3].values())) == 2  # noqa: B905


def test_factors_of_one_adapter_that_do_not_fit_are_an_error(base: BaseModel) -> None:
    with (
        Little(bytes_of_slots(base, 1) - 1, gpu_error),
        pytest.raises(ModelError, match=r"the factors of one adapter: lower .*rank.*\nCUDA out of memory"),
    ):
        train(base, GROUPS, SETTINGS)


@contextmanager
def no_room_beside(base: BaseModel, slots: int, begin: int) -> Iterator[None]:
    """From a pass on, a model whose last block finds no memory beside the factors of more slots."""
    most, passes = bytes_of_slots(base, slots), 0

    def check(_module: Any, inputs: Any) -> None:
        nonlocal passes
        passes += inputs[0].shape[1] > 4
        if passes > begin and memory.held > most:
            raise gpu_error()

    with Little(10**9, gpu_error) as memory:
        hook = base.model.model.layers[-1].register_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()


@pytest.mark.parametrize("begin", [0, 3, 7])
def test_adapters_wait_where_no_row_fits_beside_the_factors_of_all(base: BaseModel, begin: int) -> None:
    groups = [group(f"p{i}", size, i, validation=2) for i, size in enumerate(SIZES)]
    chosen = replace(SETTINGS, together=5, patience=9, dropout=0.1, epochs=2)
    wanted = train(base, groups, chosen)
    watch = Recorder(wanted=frozenset(range(99)))
    with no_room_beside(base, 1, begin):
        found = train(base, groups, chosen, watch=watch)
        assert_same(found, wanted)
    halved = [text for text in watch.texts if "beside the factors" in text]
    assert halved[-1].endswith(": 1 in training from now on, in more turns")
    if begin < 7:  # then all are still in training
        assert halved == [
            "memory ran out beside the factors of 5 adapters: 2 in training from now on, in more turns",
            "memory ran out beside the factors of 2 adapters: 1 in training from now on, in more turns",
        ]
    for state in watch.states[1::12]:
        with no_room_beside(base, 1, 0):
            again = train(base, groups, chosen, state=state)
        assert_same(again, wanted)


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
