"""All or nothing: everything is written to a hidden folder beside OUT, then renamed into place.

Beside OUT lie, while it is being made, `.<OUT>.moeconv-partial` (the folder being filled),
`.<OUT>.moeconv-lock` (held by the process that works on OUT) and, where two folders cannot swap at
once, for a moment `.<OUT>.moeconv-old` (the model being replaced).
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from moeconv.convert.journal import NAME as JOURNAL
from moeconv.convert.out import holds_something, is_replaceable, strangers
from moeconv.convert.sizes import format_size
from moeconv.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Staging:
    """The hidden folder of one conversion.

    Attributes:
        folder: Where everything is written.
        resuming: An earlier process's work is in it, and is taken over.
        published: OUT is whole and new.
        notes: Sentences for people.
    """

    def __init__(self, out: Path, *, overwrite: bool, resume: bool) -> None:
        """Claims OUT, which is absolute and no symbolic link.

        Raises:
            OutputError: OUT is not empty and holds no model or `overwrite` was not given, its
                parent cannot be written, or another process is converting to it.
        """
        self.out = out
        self.folder = out.parent / f".{out.name}.moeconv-partial"
        self.resuming = self.published = False
        self.notes: list[str] = []
        self._old = out.parent / f".{out.name}.moeconv-old"
        self._overwrite = overwrite
        self._lock = _Lock(out.parent / f".{out.name}.moeconv-lock")
        self._made: list[Path] = []
        try:
            self._made = [p for p in out.parents if not p.exists()]
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            self._recover()
            self._check_out()
            found = self.folder.exists()
            self.folder.mkdir(exist_ok=True)
            had = (self.folder / JOURNAL).exists()
            self.resuming = resume and had
            if found and not self.resuming:
                # Without a journal the folder may hold an old model that was swapped out of OUT.
                self._clear()
        except BlockingIOError:
            raise OutputError(
                f"another process is converting to {out} (it holds {self._lock.path})"
            ) from None
        except OSError as error:
            self._release()
            raise OutputError(f"cannot write beside OUT {out}: {error.strerror}") from None
        except OutputError:
            self._release()
            raise
        if had and not resume:
            self.notes.append(
                "an unfinished conversion to this OUT was found and begun anew; --resume would "
                "have gone on with it"
            )
        if resume and not had:
            self.notes.append(
                "there is no unfinished conversion to resume; starting from the first byte"
            )

    def _check_out(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"OUT {self.out} is a file; give a directory")
        if os.path.ismount(self.out):
            raise OutputError(
                f"OUT {self.out} is a mount point, which nothing can be renamed to; give a "
                "directory below it"
            )
        if not holds_something(self.out):
            return
        if not is_replaceable(self.out):
            raise OutputError(
                f"OUT {self.out} is not empty and holds no model, so not even --overwrite replaces "
                "it; choose another directory"
            )
        if not self._overwrite:
            raise OutputError(
                f"OUT {self.out} is not empty; pass --overwrite to replace it once the new model "
                "is whole, or choose another directory"
            )
        if lost := strangers(self.out):
            names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if lost[3:] else "")
            self.notes.append(
                f"warning: --overwrite also removes from OUT what moeconv did not write: {names}"
            )

    def _clear(self) -> None:
        for path in self.folder.iterdir():
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

    def publish(self, names: Collection[str]) -> None:
        """Makes the folder OUT at once: after a crash at any moment OUT is old, whole or absent.

        Where OUT exists, both change places in one system call (`renameat2`); where the file system
        cannot do that, the old one is moved away first, and back again after a crash.

        Args:
            names: The files that belong to the model; what else an earlier process left goes.

        Raises:
            OutputError: Somebody filled OUT meanwhile.
        """
        occupied = holds_something(self.out)
        if occupied and not (self._overwrite and is_replaceable(self.out)):
            raise OutputError(
                f"OUT {self.out} was filled by somebody else during the conversion; the new model "
                f"waits in {self.folder}: go on with --resume once OUT is empty"
            )
        for path in self.folder.iterdir():
            if path.name not in names:
                path.unlink()
        _sync_folder(self.folder)
        if not occupied:
            self.folder.replace(self.out)
        elif not _exchange(self.folder, self.out):
            self.out.replace(self._old)
            self.folder.replace(self.out)
        self.published = True
        _sync_folder(self.out.parent)
        self.discard()

    def keep(self) -> None:
        """Leaves everything for `--resume`."""
        self._recover()
        self._lock.release()

    def discard(self) -> None:
        """Removes everything but OUT."""
        self._recover()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _recover(self) -> None:
        """Undoes, or ends, a replacement that stopped between its two renames."""
        if not self._old.exists():
            return
        if self.out.exists():
            shutil.rmtree(self._old)
        else:
            self._old.replace(self.out)

    def _release(self) -> None:
        self._lock.release()
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()


class _Lock:
    """A file that one process at a time holds; it is free again when the process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def take(self) -> None:
        """Takes the lock.

        Raises:
            BlockingIOError: Another process holds it.
            OSError: It cannot be made.
        """
        while self._fd is None:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder may have removed the file between the two calls.
                if self.path.exists() and os.path.samestat(os.fstat(fd), self.path.stat()):
                    self._fd = fd
            finally:
                if self._fd is None:
                    os.close(fd)

    def release(self) -> None:
        """Gives it back; does nothing where it was not taken."""
        if self._fd is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


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
