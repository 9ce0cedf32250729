"""The way into a pool that is up, from other threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from raymerge.errors import PoolError
from raymerge.runtime.events import Item


class Inbox:
    """Where other threads put what a pool that is up is to carry out. wake: set when there is a reason to look."""

    def __init__(self) -> None:
        self.wake = threading.Event()
        self._lock = threading.Lock()
        self._items: list[Item] = []
        self._closed = self._given_up = False

    def put(self, items: Sequence[Item]) -> None:
        """Add items. They may wait for each other and for those that were put before."""
        with self._lock:
            self._items += items
        self.wake.set()

    def close(self, *, give_up: bool = False) -> None:
        """Nothing more is put. give_up: what is not settled now need not be either."""
        with self._lock:
            self._closed, self._given_up = True, give_up
        self.wake.set()

    def take(self) -> tuple[Item, ...]:
        """What was put since this was last asked. Raises PoolError where all is given up."""
        with self._lock:
            if self._given_up:
                raise PoolError("the pool is closed")
            items, self._items = tuple(self._items), []
        return items

    @property
    def done(self) -> bool:
        """Nothing is there and nothing will come."""
        with self._lock:
            return self._closed and not self._items
