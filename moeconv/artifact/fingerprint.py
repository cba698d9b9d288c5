"""A file's fingerprint: it changes when the file is written, and costs no reading."""

from pathlib import Path

# Size, time of the last change in nanoseconds, and inode: another file at the same place.
Fingerprint = tuple[int, int, int]


def fingerprint(path: Path) -> Fingerprint | None:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
