"""The folder that becomes a dataset: filled beside it, renamed into place once it is whole.

Beside OUT lie, meanwhile, `.<OUT>.moeconv-data` and a lock, which a dead process does not hold.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from moeconv_train.data.manifest import NAME, TOKENIZER
from moeconv_train.data.records import flush

from moeconv.convert.lock import Lock
from moeconv.errors import OutputError

_OURS = re.compile(rf"{NAME}|{TOKENIZER}|(train|validation)-\d+-\d+\.array_record")


@contextlib.contextmanager
def becoming(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder, which takes the place of `out` when the block ends well and else is removed.

    Raises:
        OutputError: `out` must not be replaced, or another process is preparing it.
        OSError: It cannot be written.
    """
    out = out.resolve()  # what a link leads to
    work = out.with_name(f".{out.name}.moeconv-data")
    new = work / "new"
    lock = Lock(out.with_name(f"{work.name}-lock"))
    with contextlib.ExitStack() as stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, beside)
        try:
            lock.take(beside)
        except BlockingIOError:
            raise OutputError(f"{out}: another process is preparing data there") from None
        stack.callback(lock.release)
        check(out, overwrite=overwrite)
        _remove(work)  # of a process that died
        work.mkdir(mode=0o700)
        stack.callback(_remove, work)
        new.mkdir()
        yield new
        flush(new)
        check(out, overwrite=overwrite)
        old = work / "old"
        try:
            if out.exists():
                out.rename(old)
            new.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        flush(out.parent)


def check(out: Path, *, overwrite: bool) -> None:
    """Refuses to replace what is no dataset of ours, or one that is not to be replaced.

    Raises:
        OutputError: It is so.
    """
    names = sorted(file.name for file in out.iterdir()) if out.exists() else []
    strangers = [name for name in names if NAME not in names or not _OURS.fullmatch(name)]
    if strangers:
        raise OutputError(
            f"{out}: is not empty (it holds {strangers[0]}); choose a new or empty folder as --out"
        )
    if names and not overwrite:
        raise OutputError(f"{out}: holds a dataset already; choose another --out, or --overwrite")


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
