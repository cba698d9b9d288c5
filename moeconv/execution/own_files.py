"""Files of the staging directory, opened so that nothing leads elsewhere."""

import errno
import os
import stat
from pathlib import Path

from moeconv.untrusted.files import UnsafeFileError


def open_own(path: Path, flags: int, mode: int = 0o644) -> int:
    """Opens a file of the staging directory to write; a descriptor.

    Others may have been there: nothing that leads elsewhere is written through.

    Raises:
        OSError: It cannot be opened; UnsafeFileError for a link or a special file.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeFileError(path, f"{path.name} is a link") from None
        raise
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(fd)
        raise UnsafeFileError(path, f"{path.name} is a link or no regular file")
    return fd


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """`pwrite` until everything is written."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
