"""One Ray on two CPUs for all tests of this folder, and a deadline for each."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

DEADLINE_S = 120


@pytest.fixture(scope="session")
def ray_here() -> Iterator[Any]:
    """The `ray` module, connected to a Ray of its own with two CPUs and no dashboard."""
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=128 * 1024**2,
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """A test that hangs fails, and its workers are cleared away as by any error."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test took longer than {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(DEADLINE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def wait_for_end(pid: int, limit_s: float = 30) -> None:
    """Block until a process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([handle], [], [], limit_s)
    os.close(handle)
    assert ended, f"process {pid} is still there"
