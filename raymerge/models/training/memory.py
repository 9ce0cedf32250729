"""What to do when memory runs out, and blocks that are computed again instead of kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from raymerge.errors import ModelError
from raymerge.models.training.rows import Limits

T = TypeVar("T")

# How the allocators of CPU and of cuBLAS say it, which have no exception of their own.
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def fitting(
    compute: Callable[[Limits], T], limits: Limits, tried: Callable[[Limits], Limits], said: Callable[[str], None]
) -> tuple[T, Limits]:
    """What `compute` returns, at limits so low that it fits into memory, and these.

    compute: begins anew each time. tried: the most rows of an adapter, and adapters, that limits let through at once.
    Rows of an adapter are halved first, then adapters. Raises ModelError if one row of one adapter does not fit.
    """
    while True:
        try:
            return compute(limits), limits
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
        # out of the handler, since an exception's traceback holds the tensors of the pass that failed
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows, slots = (number or 1 for number in (tried(limits).rows, tried(limits).slots))
        if rows > 1:
            limits = Limits(rows // 2, limits.slots)
            said(f"memory ran out at {rows} rows of an adapter at once: {rows // 2} from now on, accumulated")
        elif slots > 1:
            limits = Limits(limits.rows, slots // 2)
            said(f"memory ran out at one row of {slots} adapters at once: {slots // 2} from now on, in turn")
        else:
            raise ModelError(
                f"memory runs out at one row of one adapter.\n{reason}\n"
                "Lower training.max_length (with training.truncate), training.rank or hardware.dtype, set "
                "training.gradient_checkpointing, or use a larger GPU."
            )


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
