"""Paths that may be local or remote: one small interface over tensorstore's key-value stores."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from moeconv.errors import NotACheckpointError, StorageError
from moeconv.untrusted.files import inside, is_file, read_inside

SCHEMES = ("gs://", "s3://", "http://", "https://", "file://")


_LONGEST = 500  # characters of somebody else's message, which may quote all of a file
# The largest metadata that runs write have some MB; parsed they take up to twenty times as much.
LIMIT = 32 * 2**20


@dataclass(frozen=True)
class Folder:
    """A folder of a checkpoint, local or below a URL that tensorstore reads.

    Attributes:
        url: `file://PATH` (the path as it is, without escapes), `gs://…`, `s3://…`, `http://…`,
            without a slash at the end.
        root: Of a local one, the folder that the user named (or one above it): neither a link nor
            a name found in a file may lead out of it. By default the folder itself.
    """

    url: str
    root: Path | None = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, spec: str | Path) -> "Folder":
        """From what the user typed: a path, or one of `SCHEMES`.

        Raises:
            NotACheckpointError: It can be no path.
        """
        text = str(spec)
        if text.startswith(SCHEMES) and not text.startswith("file://"):
            return cls(text.rstrip("/"))
        try:
            if text.startswith("file://"):
                path = Path(unquote(text.removeprefix("file://").removeprefix("localhost")))
            else:
                path = Path(text).expanduser()
            url = f"file://{path.resolve()}"
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, ~name of no user
            raise NotACheckpointError(f"{text} is no path that can be read: {error}") from None
        try:
            url.encode()
        except UnicodeEncodeError:
            raise NotACheckpointError(
                f"{text} has a name that is not UTF-8 in its path, with which tensorstore reads "
                "nothing; rename it"
            ) from None
        return cls(url, path.resolve())

    @property
    def local(self) -> Path | None:
        """The path, when the folder is on this machine."""
        path = self.url.removeprefix("file://")
        return None if path == self.url else Path("/" + path.lstrip("/"))

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Folder":
        """The folder above."""
        above = Folder(self.url.rsplit("/", 1)[0], self.root)
        if above.local is None or self.root is None or above.local.is_relative_to(self.root):
            return above
        return Folder(above.url, above.local)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}", self.root or self.local)

    def __str__(self) -> str:
        return str(self.local or self.url)

    def kvstore(self) -> dict[str, Any] | str:
        """Spec of a tensorstore key-value store rooted here."""
        if (local := self.local) is not None:
            return {"driver": "file", "path": f"{local}/"}
        return f"{self.url}/"

    def real(self) -> "Folder":
        """The folder without links on the way from its root.

        Raises:
            NotACheckpointError: It lies outside.
        """
        if self.local is None or self.root in (None, self.local):
            return self
        try:
            found = inside(*self._below(""))
        except OSError as error:
            raise NotACheckpointError(f"cannot read {self}: {reason(error)}") from None
        if not found.is_relative_to(self.root):
            raise NotACheckpointError(f"cannot read {self}: it leads out of {self.root}")
        return Folder(f"file://{found}", self.root)

    def _below(self, name: str) -> tuple[Path, str]:
        """The root, and the way from there to a file."""
        local = self.local
        assert local is not None
        root = self.root or local
        return root, f"{local.relative_to(root).as_posix()}/{name}"

    def read(self, name: str, *, limit: int = LIMIT) -> bytes | None:
        """Content of a file, None when there is none.

        Raises:
            NotACheckpointError: The store cannot be read (permissions, network, …), the file lies
                outside of the root, is no regular one, or is larger than `limit`.
        """
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise NotACheckpointError(f"cannot read {self / name}: its name leads out of {self}")
        try:
            if self.local is not None:
                return read_inside(*self._below(name), limit=limit)
            result = _kvstore(self.kvstore()).read(name.encode()).result()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise NotACheckpointError(f"cannot read {self / name}: {reason(error)}") from None
        return bytes(result.value) if result.state == "value" else None

    def has(self, name: str) -> bool:
        """Whether there is a file of this name.

        Raises:
            NotACheckpointError: As `read`.
        """
        if self.local is None:
            return self.read(name) is not None
        try:
            return is_file(*self._below(name))
        except OSError as error:
            raise NotACheckpointError(f"cannot read {self / name}: {reason(error)}") from None

    def version(self, name: str) -> object:
        """What changes when a file of a remote store does: its generation and its content.

        Raises:
            StorageError: The store cannot be read.
        """
        try:
            result = _kvstore(self.kvstore()).read(name.encode()).result()
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {self / name}: {reason(error)}") from None
        return result.state, result.stamp.generation, hashlib.sha256(result.value).digest()

    def children(self) -> Iterator[str]:
        """Names of files and folders directly below.

        Raises:
            NotACheckpointError: The store cannot be listed.
        """
        try:
            if (local := self.real().local) is not None:
                yield from sorted(p.name for p in local.iterdir())
                return
            keys = _kvstore(self.kvstore()).list().result()
        except (OSError, ValueError, NotImplementedError) as error:
            raise NotACheckpointError(
                f"cannot list {self} ({reason(error)}); give the address of a step"
            ) from None
        yield from sorted({key.decode().split("/", 1)[0] for key in keys})

    def exists(self) -> bool:
        """Whether a local folder is there; remote ones are found out by reading."""
        return self.local is None or self.local.is_dir()


def _kvstore(spec: Any) -> Any:
    return ts.KvStore.open(spec).result()


def reason(error: BaseException) -> str:
    """The first clause of a tensorstore or OS error, without its source locations."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).split(" [source locations")[0].split(" [tensorstore_spec")[0]
    line = next(iter(text.splitlines()), type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
