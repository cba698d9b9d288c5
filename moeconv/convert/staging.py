"""All or nothing: everything is written to a hidden folder beside OUT, then renamed into place.

Beside OUT lie, while it is being made, `.<OUT>.moeconv-partial` (the folder being filled),
`.<OUT>.moeconv-lock` (held by the process that works on OUT) and, where two folders cannot swap at
once, for a moment `.<OUT>.moeconv-old` (the model being replaced).

Others may write to the folder that OUT lies in. So it is held open, everything in it is named
relative to it, and what has one of these names without being a folder or file is refused.
"""

import contextlib
import ctypes
import os
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from moeconv.convert.journal import NAME as JOURNAL
from moeconv.convert.lock import IN_THE_WAY, Lock
from moeconv.convert.out import holds_something, is_replaceable, strangers
from moeconv.convert.sizes import format_size
from moeconv.errors import OutputError

_RENAME_EXCHANGE = 2
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_REPLACED = "was replaced by somebody else during the conversion; convert again"


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
        self._lock = Lock(out.parent / f".{out.name}.moeconv-lock")
        self._made: list[Path] = []
        self._beside = self._inside = -1  # the folder that OUT lies in, and `folder`
        try:
            self._made = [p for p in out.parents if not p.exists()]
            out.parent.mkdir(parents=True, exist_ok=True)
            self._beside = os.open(out.parent, _FOLDER)
            self._lock.take(self._beside)
            self._recover()
            self._check_out()
            found = self._is_there(self.folder)
            if not found:
                os.mkdir(self.folder.name, dir_fd=self._beside)
            self._inside = os.open(self.folder.name, _FOLDER, dir_fd=self._beside)
            had = JOURNAL in _names(self._inside)
            self.resuming = resume and had
            if found and not self.resuming:
                # Without a journal the folder may hold an old model that was swapped out of OUT.
                for name in _names(self._inside):
                    _remove(name, self._inside)
        except BlockingIOError:
            self._close()
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

    def _is_there(self, folder: Path) -> bool:
        """Whether one of the folders beside OUT is there.

        Raises:
            OutputError: Something else has its name.
        """
        try:
            mode = os.stat(folder.name, dir_fd=self._beside, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(mode):
            raise OutputError(f"{folder} {IN_THE_WAY}")
        return True

    def check_space(self, needed: int) -> None:
        """Refuses to start without room for the whole output.

        Raises:
            OutputError: Names what is needed and what is free.
        """
        with os.scandir(self._inside) as entries:
            kept = sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
        free = shutil.disk_usage(self._inside).free + kept
        if free < needed:
            raise OutputError(
                f"the conversion needs {format_size(needed)} beside OUT {self.out}, where "
                f"{format_size(free)} are free; free some space or choose another OUT"
            )

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes small files whole and syncs them."""
        for name, content in files.items():
            with contextlib.suppress(FileNotFoundError):  # of an earlier process
                os.unlink(name, dir_fd=self._inside)
            with os.fdopen(os.open(name, _NEW, 0o666, dir_fd=self._inside), "wb") as file:
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
        with os.scandir(self._inside) as entries:
            for entry in entries:
                if entry.name not in names:
                    _remove(entry.name, self._inside)
                elif not entry.is_file(follow_symlinks=False):
                    raise OutputError(f"{self.folder / entry.name} {_REPLACED}")
        os.fsync(self._inside)
        if not self._is_there(self.folder) or not os.path.samestat(
            os.stat(self.folder.name, dir_fd=self._beside), os.fstat(self._inside)
        ):
            raise OutputError(f"{self.folder} {_REPLACED}")
        if not occupied:
            self._rename(self.folder, self.out)
        elif not _exchange(self._beside, self.folder.name, self.out.name):
            self._rename(self.out, self._old)
            self._rename(self.folder, self.out)
        self.published = True
        os.fsync(self._beside)
        self.discard()

    def keep(self) -> None:
        """Leaves everything for `--resume`."""
        try:
            self._recover()
        finally:
            self._lock.release()
            self._close()

    def discard(self) -> None:
        """Removes everything but OUT."""
        if self._beside == -1:
            return
        try:
            self._recover()
            shutil.rmtree(self.folder.name, ignore_errors=True, dir_fd=self._beside)
        except Exception:
            self._release()
            raise
        self._release()  # not after an interruption: then this is called once more

    def _recover(self) -> None:
        """Undoes, or ends, a replacement that stopped between its two renames."""
        if not self._is_there(self._old):
            return
        if self._is_there(self.out):
            shutil.rmtree(self._old.name, dir_fd=self._beside)
        else:
            self._rename(self._old, self.out)

    def _rename(self, one: Path, other: Path) -> None:
        os.rename(one.name, other.name, src_dir_fd=self._beside, dst_dir_fd=self._beside)

    def _release(self) -> None:
        self._lock.release()
        self._close()
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()

    def _close(self) -> None:
        for fd in (self._inside, self._beside):
            if fd != -1:
                os.close(fd)
        self._inside = self._beside = -1


def _exchange(beside: int, one: str, other: str) -> bool:
    """Swaps two names of a folder atomically; False where kernel or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    code = rename(
        beside, os.fsencode(one), beside, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    return bool(code == 0)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _remove(name: str, folder: int) -> None:
    """Removes a file, a link (never what it leads to), or a folder with what is in it."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=folder)
