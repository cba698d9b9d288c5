"""The files of a checkpoint: what is there, all of it inside, and what shows that it changed."""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moeconv.errors import NotACheckpointError
from moeconv.orbax.store import Folder
from moeconv.untrusted.files import UnsafeFileError, inside

# tensorstore reads these whole before it looks at them, and ends the process where it cannot.
_KIB = 2**10
# An array's metadata have 2 KiB; parsed, lists of nothing take sixty times as much as written.
ARRAY_LIMIT = 64 * _KIB
_LIMITS = {
    "manifest.ocdbt": 128 * 2**10 * _KIB,  # Orbax keeps OCDBT's nodes, the largest, below 100 MB
    **dict.fromkeys(("zarr.json", ".zarray", ".zattrs"), ARRAY_LIMIT),
}

# Size, times of the last change of content and of the entry (which cannot be set back), and inode.
Fingerprint = tuple[int, int, int, int]


def inventory(folder: Path) -> Mapping[str, Fingerprint]:
    """Every file below a folder, by its name relative to it; nothing is opened.

    A link to a file or folder inside is fine (in a snapshot of the Hub's cache: to its blobs), and
    a file's fingerprint is that of what it leads to.

    Raises:
        NotACheckpointError: A link leads out, in a circle or nowhere, there is a FIFO, device or
            socket, metadata are too large, or a folder cannot be listed; names it.
    """
    try:
        return dict(_walk(folder, ""))
    except OSError as error:
        where = error.filename or folder
        raise NotACheckpointError(
            f"{where} {_why(error)}; a checkpoint that holds it is not read"
        ) from None


def fingerprints(path: Path) -> Mapping[str, Fingerprint]:
    """The fingerprint of a file, or of each file directly in a folder; empty without any."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for entry in path.iterdir() if path.is_dir() else [path]:
            with contextlib.suppress(OSError):
                found[str(entry)] = _fingerprint(entry.stat())
    return found


def versions(folder: Folder, names: Iterable[str]) -> dict[str, object]:
    """What changes when files of a remote store do, as far as the store shows.

    Raises:
        StorageError: It failed.
    """
    return {str(folder / name): folder.version(name) for name in names}


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Fingerprint]]:
    pending = [prefix]
    while pending:
        below = pending.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                name = f"{below}{entry.name}"
                status = entry.stat(follow_symlinks=False)
                linked = stat.S_ISLNK(status.st_mode)
                if linked:
                    status = inside(folder, name).stat()
                if stat.S_ISREG(status.st_mode):
                    if status.st_size > (limit := _LIMITS.get(entry.name, status.st_size)):
                        raise UnsafeFileError(
                            Path(entry.path), f"is larger than {limit // _KIB} KiB"
                        )
                    yield name, _fingerprint(status)
                elif not stat.S_ISDIR(status.st_mode):
                    raise UnsafeFileError(Path(entry.path), "is a FIFO, device or socket")
                elif not linked:
                    pending.append(f"{name}/")
                elif not inside(folder, name).is_relative_to(os.path.realpath(folder)):
                    raise UnsafeFileError(Path(entry.path), "is a link to a folder outside")


def _fingerprint(status: os.stat_result) -> Fingerprint:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _why(error: OSError) -> str:
    if isinstance(error, UnsafeFileError):
        return str(error.strerror)
    if isinstance(error, FileNotFoundError):
        return "is not there (a link leads to it, or it was removed just now)"
    return f"cannot be looked at ({error.strerror})"
