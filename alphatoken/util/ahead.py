"""Work on the host while a device is busy."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class Ahead(Generic[ItemT]):
    """Items by number, of which the next is made in a thread once one is taken.

    `make` must be a pure function of the number that neither communicates nor uses a device. What
    it raises reaches who takes the item.
    """

    def __init__(self, make: Callable[[int], ItemT]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._next: tuple[int, Future[ItemT]] | None = None

    def take(self, number: int) -> ItemT:
        """Item `number`, which is there already if the one before was the last that was taken."""
        following, self._next = self._next, None
        ready = following is not None and following[0] == number
        item = following[1].result() if following and ready else self._make(number)
        self._next = (number + 1, self._thread.submit(self._make, number + 1))
        return item
