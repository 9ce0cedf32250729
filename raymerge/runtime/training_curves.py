"""Curves of trainings as TensorBoard event files: `<output>/tensorboard/<adapter>`."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from raymerge import storage
from raymerge.config import GROUPINGS
from raymerge.errors import ProjectError

FLUSH_S = 10.0


def curves_folder(item_folder: str) -> str:
    """Where the curves of a training item lie, from where the item keeps what it knows.

    `<output>/_shared/training/persona/0003` -> `<output>/tensorboard`. Trainings that are of no grouping, tries and
    those of a recipe, have a folder of their own below it, since their adapters may have the same names.
    """
    output, found, item = item_folder.rpartition("/_shared/training/")
    if not found:
        return storage.join(item_folder, "tensorboard")
    kind, *parts = item.split("/")
    return storage.join(output, "tensorboard", *([] if kind in GROUPINGS else [kind, *parts[:-1]]))


def check_tensorboard() -> None:
    """Raise ProjectError, saying what to install, if event files cannot be written here."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ProjectError(
            "training.tensorboard: needs the package tensorboardX, which this machine's Python lacks.\n"
            "`pip install tensorboardX` where the workers run, or leave training.tensorboard out."
        ) from error


class Curves:
    """Event files of the adapters of one item.

    A local folder is written live; at a URI the files are copied by `publish`. Events of an interrupted training that
    are trained again are taken back by the mark that a resumed file begins with (`purge_step`).
    """

    def __init__(self, folder: str, *, resumed: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._resumed = resumed
        self._clock = clock
        self._flushed = clock()
        self._files: dict[str, Any] = {}
        self._here = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if storage.is_uri(folder):
            self._temporary = tempfile.TemporaryDirectory(prefix="raymerge-curves-")
            self._here = self._temporary.name

    def begin(self, name: str) -> None:
        """A training from the beginning: curves of an earlier one of this name go."""
        storage.remove(storage.join(self._folder, name))

    def note(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Points at a step. Values that are not finite are left out."""
        from tensorboardX.proto import event_pb2, summary_pb2

        points = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
            if math.isfinite(value)
        ]
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=points))
        self._file(name, step).write_event(event)
        if self._clock() - self._flushed >= FLUSH_S:
            self._flush()

    def publish(self) -> None:
        """Everything noted so far is in the files, and those of a URI are there."""
        self._flush()
        if self._temporary is None:
            return
        for name in self._files:
            for file in storage.list_files(storage.join(self._here, name)):
                data = storage.read_bytes(storage.join(self._here, name, file.path))
                storage.write_bytes(storage.join(self._folder, name, file.path), data)

    def close(self) -> None:
        """Close the files; those of a URI go as far as they were published."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._temporary is not None:
            self._temporary.cleanup()

    def _flush(self) -> None:
        self._flushed = self._clock()
        for file in self._files.values():
            file.flush()

    def _file(self, name: str, step: int) -> Any:
        if name not in self._files:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2

            place = os.path.join(self._here, name)
            os.makedirs(place, exist_ok=True)
            self._files[name] = EventsWriter(os.path.join(place, "events"), f".{time.time_ns()}")
            if self._resumed:
                start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._files[name].write_event(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))
        return self._files[name]
