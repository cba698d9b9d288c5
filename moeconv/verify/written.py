"""Writing a report: verify.json, verify.md and the plots, and nothing old beside them."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from moeconv.convert.beside import WRITING, is_leftover
from moeconv.errors import OutputError
from moeconv.hf.config import to_json
from moeconv.untrusted.files import read_inside
from moeconv.verify.markdown import to_markdown
from moeconv.verify.plots import PLOTS, draw_plots
from moeconv.verify.report import REPORT_NAME, Report
from moeconv.verify.structure import sha256

PAGE_NAME = "verify.md"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_JUST_MADE = 10  # seconds


def earlier_report(folder: Path) -> Report | None:
    """The report that lies in a folder, if it can be read."""
    try:
        return Report.read(read_inside(folder, REPORT_NAME))
    except (OSError, ValueError):
        return None


def demand_writable(folder: Path) -> None:
    """Whether a report can be written there.

    Raises:
        OutputError: It cannot.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OutputError(
            f"the report cannot be written to {folder}; give another folder with --report"
        )


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes the files of a report; returns their paths.

    They are made beside and then renamed: an earlier report is there until this one is whole.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        with TemporaryDirectory(prefix=WRITING, dir=folder) as name, _held(fresh := Path(name)):
            plots = draw_plots(report, fresh)
            drawn = {path.name: sha256(path) for path in plots}
            report = report.model_copy(update={"beside": {**report.beside, **drawn}})
            page = to_markdown(report, plots)
            (fresh / PAGE_NAME).write_text(page, encoding="utf-8")
            (fresh / REPORT_NAME).write_bytes(to_json(report.model_dump(mode="json")))
            # The verdict last: what is interrupted before leaves the earlier one.
            written = [*plots, fresh / PAGE_NAME, fresh / REPORT_NAME]
            for path in written:
                _sync(path)
            for path in written:
                path.replace(folder / path.name)
        for stale in set(PLOTS) - {path.name for path in plots}:
            (folder / stale).unlink(missing_ok=True)
        _sync(folder)
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{folder} cannot be written: {why}") from None
    return [folder / path.name for path in reversed(written)]


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Tells other processes that somebody is at work here, until this one ends or dies."""
    descriptor = os.open(folder, _FOLDER)
    try:
        with contextlib.suppress(OSError):  # some file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Removes what a killed verify left; a folder just made may not be held yet."""
    for path in filter(is_leftover, folder.iterdir()):
        with contextlib.suppress(OSError):  # held, not ours, or gone
            descriptor = os.open(path, _FOLDER)
            try:
                if time.time() - os.fstat(descriptor).st_mtime > _JUST_MADE:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _sync(path: Path) -> None:
    """Waits until the disk has a file, or the names of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
