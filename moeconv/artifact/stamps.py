"""Whether somebody wrote to a file meanwhile, without reading it again."""

from pathlib import Path

# Size, time of the last change in nanoseconds, and inode: another file at the same place.
Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
