"""Writing a report: verify.json, verify.md and the plots, and nothing old beside them."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from moeconv.artifact.names import WRITING
from moeconv.errors import OutputError
from moeconv.hf.config import to_json
from moeconv.untrusted.files import read_inside
from moeconv.verification.report.markdown import to_markdown
from moeconv.verification.report.plots import PLOTS, draw_plots
from moeconv.verification.report.report import REPORT_NAME, Report

PAGE_NAME = "verify.md"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_JUST_MADE = 10  # seconds


def earlier_report(folder: Path) -> Report | None:
    """The report in a folder, if it can be read."""
    try:
        return Report.read(read_inside(folder, REPORT_NAME))
    except (OSError, ValueError):
        return None


def demand_writable(folder: Path) -> None:
    """Looks whether a report can be written there, before the work begins.

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
    Others may write to the folder: it is opened once, and everything is named relative to it.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        files = _content(report)
        folder.mkdir(parents=True, exist_ok=True)
        into = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _clear(into)
            with _fresh(into) as fresh:
                for name, content in files.items():
                    _write(name, content, fresh)
                for name in files:
                    os.rename(name, name, src_dir_fd=fresh, dst_dir_fd=into)
            for stale in set(PLOTS) - files.keys():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(stale, dir_fd=into)
            os.fsync(into)
        finally:
            os.close(into)
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{folder} cannot be written: {why}") from None
    return [folder / name for name in reversed(files)]


def _content(report: Report) -> dict[str, bytes]:
    """The files; the verdict last, so that what is interrupted before leaves the earlier one."""
    with TemporaryDirectory() as private:
        plots = draw_plots(report, Path(private))
        files = {path.name: path.read_bytes() for path in plots}
    drawn = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    report = report.model_copy(update={"beside": {**report.beside, **drawn}})
    files[PAGE_NAME] = to_markdown(report, plots).encode()
    files[REPORT_NAME] = to_json(report.model_dump(mode="json"))
    return files


@contextlib.contextmanager
def _fresh(into: int) -> Iterator[int]:
    """A new folder, locked as long as this process works in it."""
    name = WRITING + secrets.token_hex(8)
    os.mkdir(name, 0o700, dir_fd=into)
    descriptor = os.open(name, _FOLDER, dir_fd=into)
    try:
        with contextlib.suppress(OSError):  # some file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        with contextlib.suppress(OSError):  # another process has it now
            _remove(name, descriptor, into)
        os.close(descriptor)


def _write(name: str, content: bytes, folder: int) -> None:
    with os.fdopen(os.open(name, _NEW, 0o666, dir_fd=folder), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _clear(into: int) -> None:
    """Removes what a killed verify left; a folder just made may not be held yet."""
    for name in os.listdir(into):
        if not name.startswith(WRITING):
            continue
        with contextlib.suppress(OSError):  # held, not ours, or gone
            descriptor = os.open(name, _FOLDER, dir_fd=into)
            try:
                if time.time() - os.fstat(descriptor).st_mtime > _JUST_MADE:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(name, descriptor, into)
            finally:
                os.close(descriptor)


def _remove(name: str, folder: int, into: int) -> None:
    """Removes a folder of a report; one with other files in it stays as it is."""
    found = set(os.listdir(folder))
    if found <= {PAGE_NAME, REPORT_NAME, *PLOTS}:
        for file in found:
            os.unlink(file, dir_fd=folder)
        os.rmdir(name, dir_fd=into)
