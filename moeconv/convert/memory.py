"""Keeping concurrent work within a byte budget."""

import threading
from pathlib import Path


class Budget:
    """A counting semaphore over bytes; a request larger than all of it waits to be alone."""

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
