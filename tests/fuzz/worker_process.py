"""A `worker.py` from the outside: started, asked, killed."""

import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

# Seconds that a command may take on a busy machine.
WALL = 60.0
_WORKER = Path(__file__).with_name("worker.py")


class Process:
    """A `worker.py`, started when it is needed, and anew when it died."""

    def __init__(self, hidden: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._hidden, self._environment, self._log = hidden, environment, log
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, name: str, *args: object, wall: float = WALL) -> Any:
        """The worker's answer.

        Raises:
            AssertionError: It died, or took too long.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        self._connection.send((name, args))
        try:
            if self._connection.poll(wall):
                return self._connection.recv()
            why = f"no end after {wall:.0f} s"
        except (EOFError, ConnectionError):
            why = f"died with {self._process.wait()}"
        said = self.said()
        self.stop()
        raise AssertionError(f"{why}: {said[max(0, said.rfind('Timeout (')) :][:4000]}")

    def _start(self) -> None:
        here, there = Pipe()
        self._connection = here
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, _WORKER, str(there.fileno()), str(WALL), *self._hidden],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
                pass_fds=[there.fileno()],
            )
        there.close()

    def said(self) -> str:
        """What came past Python's streams."""
        return self._log.read_text(errors="replace") if self._process else ""

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
