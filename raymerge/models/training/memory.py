"""What to do when memory runs out, and blocks that are computed again instead of kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from raymerge.errors import ModelError
from raymerge.models.training.rows import Limits, Taken, plan

T = TypeVar("T")

# How the allocators of CPU, of cuBLAS and of the CUDA driver say it, which have no exception of their own.
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class TooLittleMemoryError(ModelError):
    """Memory does not hold the least that is computed at once, or kept at once."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"memory runs out at {what}: lower training.max_length (with training.truncate), rank, micro_batch or "
            f"adapters_per_item, or set training.gradient_checkpointing.\n{reason}\n"
            "A hardware.dtype of fewer bytes or a larger GPU helps too."
        )


def release() -> None:
    """Give back what is not used. To be called outside of a handler: a traceback holds the tensors of its frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reason_of(error: BaseException) -> str:
    """The first line of what it says."""
    return str(error).splitlines()[0] if str(error) else "out of memory"


def slots_that_fit(allocate: Callable[[int], None], slots: int, said: Callable[[str], None]) -> int:
    """The most slots, out of a number of them halved again and again, that `allocate` finds memory for.

    Raises TooLittleMemoryError if it finds none for one.
    """
    while True:
        try:
            allocate(slots)
            return slots
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            reason = reason_of(error)
        release()
        if slots <= 1:
            raise TooLittleMemoryError("the factors of one adapter", reason)
        said(f"memory ran out at the factors of {slots} adapters: {slots // 2} in training from now on, in more turns")
        slots //= 2


def fitting(
    compute: Callable[[Limits], T], limits: Limits, tried: Callable[[Limits], Limits], said: Callable[[str], None]
) -> tuple[T, Limits]:
    """What `compute` returns, at limits so low that it fits into memory, and these.

    compute: begins anew each time. tried: the most rows of an adapter, and adapters, that limits let through at once.
    Rows of an adapter are halved first, then adapters. Raises TooLittleMemoryError if one row of one adapter does not.
    """
    while True:
        try:
            return compute(limits), limits
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            reason = reason_of(error)
        release()
        rows, slots = (number or 1 for number in (tried(limits).rows, tried(limits).slots))
        if rows > 1:
            limits = Limits(rows // 2, limits.slots)
            said(f"memory ran out at {rows} rows of an adapter at once: {rows // 2} from now on, accumulated")
        elif slots > 1:
            limits = Limits(limits.rows, slots // 2)
            said(f"memory ran out at one row of {slots} adapters at once: {slots // 2} from now on, in turn")
        else:
            raise TooLittleMemoryError("one row of one adapter", reason)


def fitting_rows(
    compute: Callable[[Limits], T],
    limits: Limits,
    taken: Mapping[int, Taken],
    kind: str,
    said: Callable[[str], None],
    *,
    most: int | None = None,
) -> tuple[T, Limits]:
    """As `fitting`, of passes through the model that `plan` cuts at the limits.

    kind: of device. most: rows of a slot at once, whatever memory allows.
    """

    def bounded(limits: Limits) -> Limits:
        return limits if most is None else replace(limits, rows=min(most, limits.rows or most))

    def tried(limits: Limits) -> Limits:
        passes = plan(taken, bounded(limits), kind)
        return Limits(max(len(rows) for parts in passes for _, rows in parts), max(len(parts) for parts in passes))

    return fitting(lambda limits: compute(bounded(limits)), limits, tried, said)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Let each block of a transformers model be computed again in the backward pass, so that only its input is kept.

    The model stays in evaluation mode: transformers' own switch works in training mode only, where dropout is on.
    Raises ModelError if the model has no such blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            f"{type(model).__name__}: has no blocks that can be computed again.\n"
            "Set training.gradient_checkpointing to false."
        )

    def computing_again(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*inputs: Any, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*inputs, **options)
            return checkpoint(original, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

        return forward

    previous = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.__dict__["forward"] = computing_again(block.forward)
    try:
        yield
    finally:
        for block, before in zip(blocks, previous, strict=True):
            if before is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before
