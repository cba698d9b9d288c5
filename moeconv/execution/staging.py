"""All or nothing: everything is written to a hidden folder next to OUT, then renamed into place.

Next to OUT, while it is being made, are `.<OUT>.moeconv-partial` (the folder being filled),
`.<OUT>.moeconv-lock` (held by the process that works on OUT) and, where two folders cannot swap at
once, for a moment `.<OUT>.moeconv-old` (the model being replaced).

Other users may write to OUT's parent folder. So it is held open, everything in it is named
relative to it, and what has one of these names without being ours is refused: a folder must belong
to us and be closed to others, and it is emptied only where it holds our journal or a model.
"""

import contextlib
import ctypes
import os
import shutil
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from moeconv.artifact.destination import foreign_entries, holds_something, is_replaceable
from moeconv.errors import OutputError
from moeconv.execution.journal import NAME as JOURNAL
from moeconv.execution.lock import IN_THE_WAY, Lock
from moeconv.sizes import format_size

_RENAME_EXCHANGE = 2
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_PROBE = "moeconv-mode"
_REPLACED = "was replaced by another process during the conversion; convert again"


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
        # OUT's parent folder, `folder`, and what OUT was before a swap.
        self._beside = self._inside = self._replaced = -1
        try:
            self._made = [p for p in out.parents if not p.exists()]
            out.parent.mkdir(parents=True, exist_ok=True)
            self._beside = os.open(out.parent, _FOLDER)
            self._lock.take(self._beside)
            self._recover()
            self._check_out()
            found = self._is_there(self.folder)
            if not found:
                os.mkdir(self.folder.name, 0o700, dir_fd=self._beside)
            self._inside = os.open(self.folder.name, _FOLDER, dir_fd=self._beside)
            status = os.fstat(self._inside)
            if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
                raise OutputError(f"{self.folder} {IN_THE_WAY}")
            had = JOURNAL in _names(self._inside)
            # Without a journal the folder may hold an old model that was swapped out of OUT.
            if not had and not is_replaceable(self.folder):
                raise OutputError(f"{self.folder} {IN_THE_WAY}")
            os.fchmod(self._inside, 0o700)
            self.resuming = resume and had
            if not self.resuming:
                _empty(self._inside)
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
                f"OUT {self.out} is not empty and holds no model, or a run or a folder beside one, "
                "so not even --overwrite replaces it; choose another directory"
            )
        if not self._overwrite:
            raise OutputError(
                f"OUT {self.out} is not empty; pass --overwrite to replace it once the new model "
                "is whole, or choose another directory"
            )
        if lost := foreign_entries(self.out):
            names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if lost[3:] else "")
            self.notes.append(
                f"warning: --overwrite also removes from OUT what moeconv did not write: {names}"
            )

    def _is_there(self, folder: Path) -> bool:
        """Returns True if one of the folders next to OUT is there.

        Raises:
            OutputError: Something else has its name.
        """
        try:
            mode = _lstat(folder.name, self._beside).st_mode
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
        """Writes small files whole and syncs them; a name may have folders in it."""
        for name, content in files.items():
            for folder in list(PurePosixPath(name).parents)[-2::-1]:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=self._inside)
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
            OutputError: Another process filled OUT meanwhile.
        """
        occupied = holds_something(self.out)
        if occupied and not (self._overwrite and is_replaceable(self.out)):
            raise OutputError(
                f"OUT {self.out} was filled by another process during the conversion; the new "
                f"model waits in {self.folder}: go on with --resume once OUT is empty"
            )
        mode = _mode_of_a_new_folder(self._inside)
        tops = {name.partition("/")[0] for name in names}
        for name in _journal_last(self._inside):
            if name not in tops:
                _remove(name, self._inside)
        for name in names:
            if not stat.S_ISREG(_lstat(name, self._inside).st_mode):
                raise OutputError(f"{self.folder / name} {_REPLACED}")
        os.fsync(self._inside)
        if not self._holds_ours():
            raise OutputError(f"{self.folder} {_REPLACED}")
        # What others may write to would not be taken for ours after a crash.
        os.fchmod(self._inside, mode & ~_OTHERS_WRITE)
        if not occupied:
            self._rename(self.folder, self.out)
        elif not self._swap():
            self._rename(self.out, self._old)
            self._rename(self.folder, self.out)
        self.published = True
        os.fchmod(self._inside, mode)
        if self._replaced != -1:  # what has the name of `folder` now
            self._inside, self._replaced = self._replaced, self._inside
        os.fsync(self._beside)
        self.discard()

    def _swap(self) -> bool:
        """Swaps `folder` and OUT; False where kernel or file system cannot."""
        old = os.open(self.out.name, _FOLDER, dir_fd=self._beside)
        with contextlib.suppress(PermissionError):  # another user's
            os.fchmod(old, stat.S_IMODE(os.fstat(old).st_mode) & ~_OTHERS_WRITE)
        if _exchange(self._beside, self.folder.name, self.out.name):
            self._replaced = old
            return True
        os.close(old)
        return False

    def _holds_ours(self) -> bool:
        """Returns True if the folder that was opened still has its name."""
        try:
            here = _lstat(self.folder.name, self._beside)
        except FileNotFoundError:
            return False
        return os.path.samestat(here, os.fstat(self._inside))

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
            if self._holds_ours():
                with contextlib.suppress(OSError):
                    _empty(self._inside)
                    os.rmdir(self.folder.name, dir_fd=self._beside)
        except Exception:
            self._release()
            raise
        self._release()  # not after an interruption: then this is called once more

    def _recover(self) -> None:
        """Undoes, or ends, a replacement that stopped between its two renames."""
        if not self._is_there(self._old):
            return
        old = os.open(self._old.name, _FOLDER, dir_fd=self._beside)
        try:
            half = JOURNAL in _names(old)  # of an `_empty` that was killed
            if not half and not is_replaceable(self._old):
                raise OutputError(f"{self._old} {IN_THE_WAY}")
            if half or self._is_there(self.out):
                _empty(old)
                os.rmdir(self._old.name, dir_fd=self._beside)
            else:
                self._rename(self._old, self.out)
        finally:
            os.close(old)

    def _rename(self, one: Path, other: Path) -> None:
        os.rename(one.name, other.name, src_dir_fd=self._beside, dst_dir_fd=self._beside)

    def _release(self) -> None:
        self._lock.release()
        self._close()
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()

    def _close(self) -> None:
        for fd in (self._inside, self._replaced, self._beside):
            if fd != -1:
                os.close(fd)
        self._inside = self._replaced = self._beside = -1


def _exchange(folder: int, one: str, other: str) -> bool:
    """Swaps two names of a folder atomically; False where kernel or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    code = rename(
        folder, os.fsencode(one), folder, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    return bool(code == 0)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _lstat(name: str, folder: int) -> os.stat_result:
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _journal_last(folder: int) -> list[str]:
    """The names in a folder, the journal last, so that a killed process leaves the journal."""
    return sorted(_names(folder), key=lambda name: name == JOURNAL)


def _empty(folder: int) -> None:
    """Removes what is in a folder; half done, it has a journal and is known for ours."""
    if _names(folder):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(JOURNAL, _NEW, 0o600, dir_fd=folder))
    for name in _journal_last(folder):
        _remove(name, folder)


def _mode_of_a_new_folder(inside: int) -> int:
    """What umask, set-group-ID bit and default ACL make of it: it is tried, and left there."""
    if _PROBE in _names(inside):
        _remove(_PROBE, inside)
    os.mkdir(_PROBE, dir_fd=inside)
    return stat.S_IMODE(_lstat(_PROBE, inside).st_mode)


def _remove(name: str, folder: int) -> None:
    """Removes a file, a link (never what it leads to), or a folder with what is in it."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=folder)
