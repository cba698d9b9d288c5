"""Opening files of a folder with untrusted content.

`open_inside` is for every file that is found by its name in a run, a checkpoint, a tokenizer
directory or a converted model: a link, a `..` or an absolute name must not lead out of the folder,
and nothing but a regular file is opened, so that no FIFO or device blocks or never ends.
`open_regular` is for a path that the user typed: a link there is the user's own.
"""

import errno
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

# Far more than any metadata, tokenizer or report that a person has; far less than the memory.
READ_LIMIT = 512 * 2**20

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
_SPECIAL = "is a FIFO, device or socket, not a regular file"
# `<cache>/models--NAME/snapshots/REVISION`: its files are links to `<cache>/models--NAME/blobs`
# (huggingface_hub/file_download.py, `_create_symlink`).
_HUB_REPO = ("models--", "datasets--", "spaces--")


# `gs://bucket/x`, or `gs:/bucket/x` as pathlib writes it; a store's scheme without a slash (a local
# name may have a colon otherwise); `user@host:x` of scp and rsync; a share of Windows.
_SCHEMES = "abfss?|adl|az|dbfs|file|ftps?|gcs|gs|hdfs|hf|https?|oss|s3[an]?|sftp|wasbs?"
_ADDRESS = re.compile(
    rf"\s*(?:[A-Za-z][A-Za-z0-9+.-]+:/|(?i:{_SCHEMES}):|[^/\\\s:@]+@[^/\\\s:]+:|\\\\)"
)


def is_address(text: object) -> bool:
    """Returns True if a path is the address of a store, not of a file of this machine."""
    return _ADDRESS.match(str(text)) is not None


def without_access(text: object) -> str:
    """An address without user, password, query and fragment, for people; a path as it is."""
    if not is_address(text):
        return str(text)
    return re.sub(r"[?#].*", "", re.sub(r"^([^/]*:/{1,2})[^/]*@", r"\1", str(text)))


class UnsafeFileError(OSError):
    """The file is no regular file, too large, or is outside its folder; `strerror` says which.

    An OSError, so that it becomes a sentence wherever an unreadable file does.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EPERM, why, str(path))


def open_regular(path: Path) -> BinaryIO:
    """Opens a file that the user named.

    Args:
        path: Links are followed.

    Returns:
        The file, open for reading.

    Raises:
        UnsafeFileError: It is a FIFO, a device or a socket.
        OSError: It cannot be opened; IsADirectoryError for a folder.
    """
    return _checked(os.open(_encodable(path), _FLAGS), path)


def open_inside(folder: Path, name: str, *, links: bool = True) -> BinaryIO:
    """Opens a file by its name in a folder that others may have filled.

    Links are followed as long as they stay in the folder (in a snapshot of the Hub's cache: in
    the snapshot, or lead to its repository's blobs). The path is resolved once and
    then walked without following links, so that a link made meanwhile is refused too.

    Args:
        folder: The folder that the user named, or one found in it by `inside`.
        name: Relative, parts separated by `/`.
        links: False where not even a link within the folder is followed.

    Returns:
        The file, open for reading.

    Raises:
        UnsafeFileError: The name or a link leads out of the folder, or it is no regular file.
        OSError: It cannot be opened; FileNotFoundError where there is none.
    """
    boundary, real = _resolve(folder, name, links=links)
    path = folder / name
    parts = real.relative_to(boundary).parts
    if not parts:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    parent = os.open(boundary, _FOLDER)
    try:
        for part in parts[:-1]:
            below = os.open(part, _FOLDER, dir_fd=parent)
            os.close(parent)
            parent = below
        return _checked(os.open(parts[-1], _FLAGS | os.O_NOFOLLOW, dir_fd=parent), path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeFileError(path, "was replaced by a link while it was opened") from None
        raise
    finally:
        os.close(parent)


def read_regular(path: Path, *, limit: int = READ_LIMIT) -> bytes:
    """Content of a file that the user named; raises as `open_regular`, or where it is too large."""
    with open_regular(path) as file:
        return read_whole(file, path, limit=limit)


def read_inside(folder: Path, name: str, *, links: bool = True, limit: int = READ_LIMIT) -> bytes:
    """Content of a file of a folder; raises as `open_inside`, or where it is too large."""
    with open_inside(folder, name, links=links) as file:
        return read_whole(file, folder / name, limit=limit)


def read_whole(file: BinaryIO, path: Path, *, limit: int = READ_LIMIT) -> bytes:
    """What is left of an open file; UnsafeFileError where that is too much."""
    size = os.fstat(file.fileno()).st_size
    if size <= limit:
        content = file.read(size + 1)  # not `limit`, which would be reserved for the smallest file
        while len(content) <= limit and (more := file.read(2**20)):  # it has grown
            content += more
        if len(content) <= limit:
            return content
    raise UnsafeFileError(path, f"is larger than {limit // 2**20} MiB")


def inside(folder: Path, name: str) -> Path:
    """The path of a file or folder by its name in a folder, links resolved.

    Raises:
        UnsafeFileError: The name or a link leads out of the folder.
        OSError: There is a loop of links.
    """
    return _resolve(folder, name)[1]


def is_file(folder: Path, name: str, *, links: bool = True) -> bool:
    """True if `open_inside` would find a regular file; False where there is nothing or a folder.

    Raises:
        UnsafeFileError: The name or a link leads out of the folder, or it is a special file.
    """
    try:
        open_inside(folder, name, links=links).close()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    return True


def demand_inside(folder: Path) -> None:
    """Looks at a folder before a library gets it that opens its files by name.

    Folders below it are not looked at.

    Raises:
        UnsafeFileError: A link leads out, or there is a FIFO, a device or a socket.
        OSError: There is a loop of links, or it cannot be listed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                inside(folder, entry.name)
            if not (entry.is_file() or entry.is_dir()) and Path(entry).exists():
                raise UnsafeFileError(Path(entry), _SPECIAL)


def _resolve(folder: Path, name: str, *, links: bool = True) -> tuple[Path, Path]:
    """The folder that must not be left, and the path without links."""
    parts = PurePosixPath(name).parts
    path = folder / name
    if not parts or parts[0] == "/" or ".." in parts:
        raise UnsafeFileError(path, f"the name {name!r} leads out of {folder}")
    real = Path(os.path.realpath(_encodable(path)))
    base = Path(os.path.realpath(folder))
    if not links and real != base / name:
        raise UnsafeFileError(path, "is a link; put the file itself there")
    boundary = next((b for b in _boundaries(base) if real.is_relative_to(b)), None)
    if boundary is None:
        raise UnsafeFileError(
            path, f"is a link that leads out of {folder}; put there what it leads to, or name that"
        )
    if real.is_symlink():  # `realpath` leaves a loop as it is
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return boundary, real


def _boundaries(folder: Path) -> tuple[Path, ...]:
    """The folder itself; in the Hub's cache the whole snapshot, and its repository's blobs."""
    for above in (folder, *folder.parents):
        if above.parent.name == "snapshots" and above.parent.parent.name.startswith(_HUB_REPO):
            return above, above.parent.parent / "blobs"
    return (folder,)


def _checked(fd: int, path: Path) -> BinaryIO:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise UnsafeFileError(path, _SPECIAL)


def _encodable(path: Path) -> Path:
    """The path, where the system can be asked for it (no NUL, no lone surrogate of JSON)."""
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError
    except ValueError:
        raise UnsafeFileError(path, "its name can be no file's") from None
    return path
