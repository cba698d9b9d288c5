"""All or nothing: everything is written to a hidden folder beside OUT, then renamed into place."""

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from moeconv.convert.journal import NAME as JOURNAL
from moeconv.convert.sizes import format_size
from moeconv.errors import OutputError

_LOCK = "lock"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """The hidden folder of one conversion, `.<OUT>.moeconv-partial` beside OUT."""

    def __init__(self, out: Path, *, overwrite: bool, resume: bool) -> None:
        """Claims OUT.

        Raises:
            OutputError: OUT is not empty and `overwrite` was not given, its parent cannot be
                written, or another process is converting to it.
        """
        self.out = out
        self.folder = out.parent / f".{out.name}.moeconv-partial"
        self.notes: list[str] = []
        if out.exists() and not out.is_dir():
            raise OutputError(f"OUT {out} is a file; give a directory")
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise OutputError(
                f"OUT {out} is not empty; pass --overwrite to replace it once the new model is "
                "whole, or choose another directory"
            )
        found = self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise OutputError(f"cannot write beside OUT {out}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise OutputError(
                f"another process is converting to {out} (it holds {self.folder / _LOCK})"
            ) from None
        had = (self.folder / JOURNAL).exists()
        if found and not (resume and had):
            # Without a journal the folder may hold an old model that was swapped out of OUT.
            self._clear()
            if had:
                self.notes.append(
                    "an unfinished conversion to this OUT was found and begun anew; --resume would "
                    "have gone on with it"
                )
        if resume and not had:
            self.notes.append(
                "there is no unfinished conversion to resume; starting from the first byte"
            )

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check_space(self, needed: int) -> None:
        """Refuses to start without room for the whole output.

        Raises:
            OutputError: Names what is needed and what is free.
        """
        kept = sum(p.stat().st_blocks * 512 for p in self.folder.iterdir() if p.is_file())
        free = shutil.disk_usage(self.folder).free + kept
        if free < needed:
            raise OutputError(
                f"the conversion needs {format_size(needed)} beside OUT {self.out}, where "
                f"{format_size(free)} are free; free some space or choose another OUT"
            )

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes small files whole and syncs them."""
        for name, content in files.items():
            with (self.folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Makes the folder OUT at once: after a crash at any moment OUT is old, whole or absent.

        Where OUT exists, both change places in one system call (`renameat2`); where the file system
        cannot do that, the old one is moved away first.
        """
        for name in (JOURNAL, _LOCK):
            (self.folder / name).unlink(missing_ok=True)
        _sync_folder(self.folder)
        if not self.out.exists() or not any(self.out.iterdir()):
            self.folder.replace(self.out)
        else:
            if not _exchange(self.folder, self.out):
                old = self.out.parent / f".{self.out.name}.moeconv-old"
                shutil.rmtree(old, ignore_errors=True)
                self.out.replace(old)
                self.folder.replace(self.out)
                old.replace(self.folder)
            shutil.rmtree(self.folder)
        _sync_folder(self.out.parent)
        os.close(self._lock)

    def keep(self) -> None:
        """Leaves everything for `--resume`."""
        os.close(self._lock)

    def discard(self) -> None:
        """Removes everything."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        os.close(self._lock)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths atomically; False where kernel or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    code = rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    return bool(code == 0)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
