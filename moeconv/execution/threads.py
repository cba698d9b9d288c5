"""Threads that can be waited for when Ctrl-C interrupts the waiting."""

import threading
import time
from collections.abc import Callable

_POLL = 0.01  # seconds; a signal that another thread received is seen no sooner


class Thread(threading.Thread):
    """A daemon thread that the main thread waits for.

    `threading.Thread.join` takes a running thread for ended when a signal interrupts it (CPython
    3.12 `Thread._wait_for_tstate_lock`), so the files it writes to
    would be closed too early.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._begun = self._ended = False

    def run(self) -> None:
        """Does the work."""
        self._begun = True
        try:
            self._work()
        finally:
            self._ended = True

    def wait(self) -> None:
        """Waits for the end of a thread that was started.

        Raises:
            KeyboardInterrupt: The user does not want to wait.
        """
        while not self._ended:
            time.sleep(_POLL)

    def wait_uninterrupted(self) -> None:
        """Waits also through Ctrl-C, for a thread that was asked to stop.

        One whose start was interrupted is not waited for: it must find nothing to do.
        """
        while self._begun and not self._ended:
            try:
                self.wait()
            except KeyboardInterrupt:
                continue
