"""Keeping concurrent work within a byte budget."""

import threading
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path


class Budget:
    """A counting semaphore over bytes; what needs more than all of them waits to be alone."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._used = 0
        self._changed = threading.Condition()
        self._closed = False

    def acquire(self, count: int) -> bool:
        """Waits for room; False when the budget was closed meanwhile."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._used == 0 or self._used + count <= self.total
            )
            if not self._closed:
                self._used += count
            return not self._closed

    def take[Item](self, wanted: list[Item], cost: Callable[[Item], int]) -> Item | None:
        """Removes the first item that there is room for; waits until there is one.

        Args:
            wanted: The most expensive first; while threads share it, only this method changes it.
            cost: Bytes that an item needs, to be released when it is done.

        Returns:
            The item; None when all are taken, or the budget was closed.
        """
        with self._changed:
            while wanted and not self._closed:
                room = self.total - self._used
                first = bisect_left(wanted, -room, key=lambda i: -cost(i)) if self._used else 0
                if first < len(wanted):
                    item = wanted.pop(first)
                    self._used += cost(item)
                    return item
                self._changed.wait()
        return None

    def release(self, count: int) -> None:
        """Gives bytes back."""
        with self._changed:
            self._used -= count
            self._changed.notify_all()

    def close(self) -> None:
        """Wakes everyone who waits, for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    import os

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
