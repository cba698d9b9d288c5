"""The lock next to OUT: one process at a time works on it."""

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from moeconv.errors import OutputError

IN_THE_WAY = (
    "is in the way: moeconv keeps a folder or file of its own there, and this one is a link, "
    "another's, open to others or something else; nothing was written to it, look who made it and "
    "remove it"
)


class Lock:
    """A file that one process at a time holds; it is free again when the process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder_fd = -1
        self._fd: int | None = None

    def take(self, folder_fd: int) -> None:
        """Takes the lock.

        Args:
            folder_fd: The open folder that holds it.

        Raises:
            BlockingIOError: Another process holds it.
            OutputError: There is no lock of ours, but something else of its name.
            OSError: It cannot be made.
        """
        self._folder_fd = folder_fd
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while self._fd is None:
            try:
                fd = os.open(self.path.name, flags, 0o600, dir_fd=folder_fd)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                    raise
                raise OutputError(f"{self.path} {IN_THE_WAY}") from None
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OutputError(f"{self.path} {IN_THE_WAY}")
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder may have removed the file between the two calls.
                with contextlib.suppress(FileNotFoundError):
                    here = os.stat(self.path.name, dir_fd=folder_fd, follow_symlinks=False)
                    if os.path.samestat(os.fstat(fd), here):
                        self._fd = fd
            finally:
                if self._fd is None:
                    os.close(fd)

    def release(self) -> None:
        """Gives it back; does nothing where it was not taken."""
        if self._fd is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path.name, dir_fd=self._folder_fd)
            os.close(self._fd)
            self._fd = None
