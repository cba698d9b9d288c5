"""What lies below a folder, to be compared and put back."""

import os
import stat
from pathlib import Path
from typing import Any

# What lies at a path; a file has its content, or its size where it is large.
Entry = tuple[str, Any]
Tree = dict[str, Entry]

# Larger ones are told from others by their size.
_READ = 8 << 20

# By path: what tells a file from a changed one, and what lies there. Reading is most of the work.
_known: dict[str, tuple[tuple[int, ...], Entry]] = {}


def scan(folder: Path) -> Tree:
    """Everything below a folder."""
    found: Tree = {}
    pending, cut = [str(folder)], len(str(folder)) + 1
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                found[entry.path[cut:]] = _entry(entry.path, status)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
    return found


def _entry(path: str, status: os.stat_result) -> Entry:
    if stat.S_ISDIR(status.st_mode):
        return "folder", None
    if stat.S_ISLNK(status.st_mode):
        return "link", os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        return "special", stat.S_IFMT(status.st_mode)
    if status.st_size > _READ:
        return "file", status.st_size
    mark = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if path not in _known or _known[path][0] != mark:
        _known[path] = mark, ("file", Path(path).read_bytes())
    return _known[path][1]
