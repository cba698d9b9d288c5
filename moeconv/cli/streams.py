"""stdout and stderr that may be closed, full or without a reader: a command's work goes on."""

import errno
import io
import os
import sys
from collections.abc import Buffer, Iterator
from contextlib import contextmanager

from moeconv.cli.start import INTERRUPTED
from moeconv.untrusted import native_logs
from moeconv.untrusted.text import printable


class _Raw(io.FileIO):
    """Remembers what could not be written, and lets it go."""

    failure: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


def guard() -> _Raw | None:
    """Puts such streams in the places of this process's own; letters it does not know become `?`.

    Returns:
        What is below stdout; None where a caller has put something else there.
    """
    below = None
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed, so that the next file to be opened would get its number
            while (fd := os.open(os.devnull, os.O_RDONLY)) < number:
                pass
        elif isinstance(stream, io.TextIOWrapper):
            fd = stream.fileno()
        else:
            continue
        if name == "stderr":
            fd = os.dup(fd)  # native code goes on writing to 2
            native_logs.words_go_to(fd)
        raw = _Raw(fd, "w", closefd=False)
        fresh = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding if stream else "utf-8",
            errors="replace",
            line_buffering=number == 2 or bool(stream and stream.line_buffering),
        )
        setattr(sys, name, fresh)
        if name == "stdout":
            below = raw
    return below


def lost(below: _Raw | None) -> str | None:
    """Why the answer on stdout is lost; a reader that went away has read what it wanted."""
    sys.stdout.flush()
    failure = below.failure if below is not None else None
    if failure is None or failure.errno == errno.EPIPE:
        return None
    return "it is closed" if failure.errno == errno.EBADF else failure.strerror


def say(text: str) -> None:
    """A line on stderr; control characters in foreign text are escaped."""
    sys.stderr.write(f"{printable(text)}\n")


@contextmanager
def interruptible(words: str) -> Iterator[None]:
    """Ends the process with a line on stderr when Ctrl-C or a signal interrupts what is inside.

    Args:
        words: What is left behind, and how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted: {words}")
        sys.exit(INTERRUPTED)
