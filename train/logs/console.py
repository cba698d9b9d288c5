"""`training.log`: everything that MaxText, XLA and their libraries say; the terminal stays ours."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOG_NAME = "training.log"
_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


@contextlib.contextmanager
def logged(path: Path) -> Iterator[IO[str]]:
    """While this is open, what anything writes to stdout or stderr goes to the end of `path`.

    Also what compiled code writes, by the file descriptors, and Python's logging from INFO up.

    Yields:
        What still reaches the user's stderr.
    """
    user, before = sys.stderr, logging.root.level
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(path.open("a", encoding="utf-8", errors="replace", buffering=1))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        saved = {fd: os.dup(fd) for fd in (1, 2)}
        for fd, copy in saved.items():  # called last to first
            stack.callback(os.close, copy)
            stack.callback(os.dup2, copy, fd)
        if _descriptor(user) == 2:
            own = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
            user = stack.enter_context(own)
        for fd in saved:
            os.dup2(log.fileno(), fd)
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logging.root.addHandler(handler)
        stack.callback(logging.root.removeHandler, handler)
        stack.callback(logging.root.setLevel, before)
        logging.root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        stack.callback(logging.captureWarnings, False)
        yield user


def _descriptor(stream: IO[str]) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, io.UnsupportedOperation):
        return None
