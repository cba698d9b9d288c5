"""What the public functions take alike: paths, sizes, fields, and who listens meanwhile."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from moeconv.errors import UsageError
from moeconv.sizes import parse_size

StrPath = str | os.PathLike[str]
Size = int | str
Fields = str | Sequence[str] | Mapping[str, object]
# Called with one sentence; those about something to worry about begin with "warning: ".
Note = Callable[[str], None]
# Called with the bytes to be read and to be written; the context manager that it returns gives the
# function to be called with the bytes read and written since the last call, from any thread.
Progress = Callable[[int, int], AbstractContextManager[Callable[[int, int], None]]]

_LOG = logging.getLogger("moeconv")
_WARNING = "warning: "


def log(text: str) -> None:
    """Passes a sentence on to the logger `moeconv`, which shows warnings by default."""
    level = logging.WARNING if text.startswith(_WARNING) else logging.INFO
    _LOG.log(level, "%s", text.removeprefix(_WARNING))


@contextmanager
def unseen(read_bytes: int, write_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """A progress display that shows nothing."""
    yield lambda read, written: None


def optional_path(path: StrPath | None) -> Path | None:
    """A path, or None."""
    return None if path is None else Path(path)


def size_of(size: Size) -> int:
    """Bytes of a number, or of a text such as `5GB` or `4GiB`.

    Raises:
        UsageError: It is no size above zero.
    """
    return parse_size(str(size))


def jobs_of(jobs: int | None) -> int:
    """How many chunks are worked on at the same time; None for the number of processors.

    Raises:
        UsageError: It is below one.
    """
    if jobs is None:
        return os.cpu_count() or 1
    if not isinstance(jobs, int) or jobs < 1:
        raise UsageError("--jobs takes a whole number from 1")
    return jobs


def pairs_of(fields: Fields) -> tuple[str, ...]:
    """Fields as `KEY=VALUE`, as `--set` takes them."""
    if isinstance(fields, str):
        return (fields,)
    if isinstance(fields, Mapping):
        return tuple(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in fields.items()
        )
    return tuple(fields)
