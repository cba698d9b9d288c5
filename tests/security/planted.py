"""What somebody may put in the place of a file: each way that leads out, and each that never ends.

A plant takes the place of `at`. Whatever moeconv then does, `SECRET` must be in none of its
outputs, the files outside must stay as they are, and it must not wait.
"""

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SECRET = b"ssh-key-of-somebody-0123456789abcdef"
Plant = Callable[[Path, Path], None]


def _free(at: Path) -> None:
    if at.is_dir() and not at.is_symlink():
        shutil.rmtree(at)
    at.unlink(missing_ok=True)


def absolute(at: Path, outside: Path) -> None:
    """An absolute link to the secret."""
    at.symlink_to(outside / "secret")


def relative(at: Path, outside: Path) -> None:
    """A link that climbs out."""
    at.symlink_to(os.path.relpath(outside / "secret", at.parent))


def chain(at: Path, outside: Path) -> None:
    """A link to a link within the folder, which leads out."""
    (at.parent / "zz-hop").symlink_to(outside / "secret")
    at.symlink_to("zz-hop")


def folder(at: Path, outside: Path) -> None:
    """A link to a folder."""
    at.symlink_to(outside)


def zero(at: Path, outside: Path) -> None:
    """A link to a device without an end."""
    at.symlink_to("/dev/zero")


def fifo(at: Path, outside: Path) -> None:
    """A FIFO that nobody writes to."""
    os.mkfifo(at)


def unix_socket(at: Path, outside: Path) -> None:
    """A socket."""
    with contextlib.chdir(at.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(at.name)


def loop(at: Path, outside: Path) -> None:
    """A link to itself."""
    at.symlink_to(at.name)


LINKS: tuple[Plant, ...] = (absolute, relative, chain, folder, zero)
SPECIAL: tuple[Plant, ...] = (fifo, unix_socket)
ALL = (*LINKS, *SPECIAL, loop)


def every(name: str = "plant", plants: tuple[Plant, ...] = ALL) -> pytest.MarkDecorator:
    """Runs a test once with each plant."""
    return pytest.mark.parametrize(name, plants, ids=lambda plant: plant.__name__)


class Outside:
    """A folder of somebody, whose files must neither be read nor changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "secret").write_bytes(SECRET)
        (folder / "sub" / "deep").write_bytes(SECRET)
        self.remember()

    def remember(self) -> None:
        """Everything is right as it lies there now."""
        self._before = self._state()

    def plant(self, plant: Plant, at: Path) -> None:
        """Puts a plant in the place of a file."""
        _free(at)
        plant(at, self.folder)

    def _state(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }

    def untouched(self) -> bool:
        """Whether every file is there as it was."""
        return self._state() == self._before


@contextlib.contextmanager
def at_once(seconds: int = 5) -> Iterator[None]:
    """What stands still is a failure, not a hang."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def holds_secret(folder: Path) -> list[str]:
    """Files below a folder that hold the secret, and links that lead out of it."""
    found = []
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in [*folders, *names]):
            if path.is_symlink() or (path.is_file() and SECRET in path.read_bytes()):
                found.append(str(path))
    return found
