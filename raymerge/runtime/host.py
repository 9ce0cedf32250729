"""What holds a worker and calls it: the same in an actor of Ray and in this process, so that items mean the same.

An item that raises is an answer, not a crash: its exception comes back as text, because not every exception survives
the way between processes, and nobody but a person does anything with it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.errors import RaymergeError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read when a library is loaded


@dataclass(frozen=True)
class Answer:
    """What came of one call. error: None, or a text whose first line says what and where. seconds: of the call."""

    result: dict[str, Any] | None
    error: str | None
    traceback: str | None
    seconds: float
    host: str


class Host:
    """Constructs a worker with a fixed number of threads, and calls its methods.

    factory: a worker class or any callable that returns a worker. threads: of torch; results depend on it, so it is
    fixed by the plan and not by the machine. The constructor never raises: `ready` tells what happened.
    """

    def __init__(self, factory: Callable[..., object], arguments: Mapping[str, Any], threads: int) -> None:
        self.worker: object = None
        self.threads = threads
        self._start = self._guarded(lambda: self._construct(factory, arguments))

    def _construct(self, factory: Callable[..., object], arguments: Mapping[str, Any]) -> None:
        self.fix_threads()
        self.worker = factory(**arguments)

    def fix_threads(self) -> None:
        """Set torch's thread count, if torch is loaded; if it is loaded later, the environment of an actor sets it.

        Done before each call, since the worker's code or another worker in the same process may have changed it.
        """
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(self.threads)

    def ready(self) -> Answer:
        """How the constructor went."""
        return self._start

    def pid(self) -> int:
        """The process this runs in."""
        return os.getpid()

    def run(self, call: str, payload: Any) -> Answer:
        """Call the worker's method `call` with `payload`; it returns a small mapping or None."""
        self.fix_threads()
        return self._guarded(lambda: getattr(self.worker, call)(payload))

    def _guarded(self, act: Callable[[], dict[str, Any] | None]) -> Answer:
        start = time.perf_counter()
        result = error = trace = None
        try:
            result = act()
        except Exception as exception:
            error, trace = describe(exception), traceback.format_exc()
        return Answer(result, error, trace, time.perf_counter() - start, socket.gethostname())


def describe(error: BaseException) -> str:
    """An exception as text. Our own speak for themselves; of others the first line says what and where it was."""
    text = str(error).strip()
    if isinstance(error, RaymergeError) and text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (in {frames[-1].name}, {os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    first, _, rest = text.partition("\n")
    return f"{type(error).__name__}{': ' if first else ''}{first}{where}" + (f"\n{rest}" if rest else "")
