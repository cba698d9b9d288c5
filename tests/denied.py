"""Files that may not be read, for root too."""

import os
from pathlib import Path
from typing import Any

import pytest


def unreadable(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """As chmod 000 does, for whoever opens it by any way."""
    opened = os.open

    def refuses(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> int:
        where = Path(path) if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / path
        if where == file:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, dir_fd=dir_fd, **kwargs)

    monkeypatch.setattr(os, "open", refuses)
