"""Paths that may be local or remote: one small interface over tensorstore's key-value stores.

A remote store is given up after a silence, never after a total: one that sends bytes is waited for.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from moeconv.errors import NotACheckpointError, StorageError
from moeconv.untrusted import native_logs
from moeconv.untrusted.files import inside, is_address, is_file, read_inside, without_access

SCHEMES = ("gs://", "s3://", "http://", "https://", "file://")

# Read by tensorstore when it opens its first connection (its docs/environment.rst); by default none
# of the three has a limit. Who set one knows better.
CURL_LIMITS = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "5",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "256",
}
# tensorstore's own are 32 attempts over a quarter of an hour, also where no server listens.
_RETRIES = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
# While the first files are asked for nothing is lost by giving up; seconds between attempts.
_FIRST_DELAYS = (0.3, 1.0)
# How tensorstore begins a message about an answer that will be the same when asked again.
_DENIED = ("PERMISSION_DENIED", "UNAUTHENTICATED")
_TRANSIENT = ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # ... and that may be another
# An address's, which may be in capitals (RFC 3986, 3.1).
_SCHEME = re.compile(r"(?i)(?:gs|s3|https?|file):(?=/)")
# What of a message is not for people.
_STATUS = re.compile(r"(?:ABORTED: All \d+ retry attempts failed: |[A-Z_]+: )?(?:CURL error )?")
_WHERE = re.compile(r" \[(?:source locations|tensorstore_spec|curl_code)")


class DeniedError(StorageError):
    """The store answered that this may not be read."""


def context(**resources: Any) -> ts.Context:
    """A tensorstore context whose remote stores give up in time.

    Args:
        resources: Further context resources.
    """
    return _context(_RETRIES, **resources)


def _context(retries: Any, **resources: Any) -> ts.Context:
    for name, value in CURL_LIMITS.items():
        os.environ.setdefault(name, value)
    kinds = dict.fromkeys(("gcs", "s3", "http"), retries)
    return ts.Context({**{f"{kind}_request_retries": r for kind, r in kinds.items()}, **resources})


@cache
def _first() -> ts.Context:
    """For metadata, where attempts are counted here."""
    native_logs.filter_stderr()
    return _context({"max_retries": 0, "initial_delay": "1s", "max_delay": "1s"})


_LONGEST = 500  # characters of a foreign message, which may quote all of a file
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
            NotACheckpointError: It can be no path, or is an address of another kind.
        """
        text = _SCHEME.sub(lambda found: found[0].lower(), str(spec), count=1)
        if text.startswith("file:/") and not text.startswith("file://"):
            text = f"file://{text.removeprefix('file:')}"
        if text.startswith(SCHEMES) and not text.startswith("file://"):
            if not re.match(r"[a-z0-9]+://[^/?#]", text):
                what = "server" if text.startswith("http") else "bucket"
                raise NotACheckpointError(f"{text} names no {what}; give the whole address")
            return cls(text.rstrip("/"))
        try:
            if text.startswith("file://"):
                path = Path(unquote(text.removeprefix("file://").removeprefix("localhost")))
                if not path.is_absolute():
                    raise NotACheckpointError(
                        f"{text} names no file of this machine; give file:///PATH, or the path"
                    )
            elif is_address(text) and not Path(text).exists():
                raise NotACheckpointError(
                    f"{without_access(text)} is an address that moeconv cannot read; it "
                    f"reads local paths, {', '.join(SCHEMES)}"
                )
            else:
                path = Path(text).expanduser()
            place = path.resolve()
            str(place).encode()
            return cls(f"file://{place}", place)
        except UnicodeEncodeError:
            raise NotACheckpointError(
                f"{text} has a name that is not UTF-8 in its path, with which tensorstore reads "
                "nothing; rename it"
            ) from None
        # A loop of links, ~name of no user, a NUL.
        except (OSError, RuntimeError, ValueError) as error:
            raise NotACheckpointError(f"{text} is no path that can be read: {error}") from None

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
        return str(self.local or without_access(self.url))

    def kvstore(self) -> dict[str, Any] | str:
        """Spec of a tensorstore key-value store rooted here."""
        if (local := self.local) is not None:
            return {"driver": "file", "path": f"{local}/"}
        return f"{self.url}/"

    def real(self) -> "Folder":
        """The folder without links on the way from its root.

        Raises:
            NotACheckpointError: It is outside.
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
            NotACheckpointError: It is larger than `limit`; or it is on this machine and cannot be
                read, is outside of the root or is no regular file.
            StorageError: The store does not answer, or not with it (`DeniedError`).
        """
        if ".." in PurePosixPath(name).parts or name.startswith("/"):
            raise NotACheckpointError(f"cannot read {self / name}: its name leads out of {self}")
        if self.local is None:
            result = self._ask(name, lambda store: store.read(name.encode()))
            if len(result.value) > limit:
                raise NotACheckpointError(
                    f"cannot read {self / name}: is larger than {limit // 2**20} MiB"
                )
            return bytes(result.value) if result.state == "value" else None
        try:
            return read_inside(*self._below(name), limit=limit)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise NotACheckpointError(f"cannot read {self / name}: {reason(error)}") from None

    def has(self, name: str) -> bool:
        """Returns True if there is a file of this name.

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
        result = self._ask(name, lambda store: store.read(name.encode()))
        return result.state, result.stamp.generation, hashlib.sha256(result.value).digest()

    def children(self) -> Iterator[str]:
        """Names of files and folders directly below.

        Raises:
            NotACheckpointError: The folder cannot be listed.
            StorageError: The store does not answer.
        """
        try:
            if (local := self.real().local) is not None:
                yield from sorted(p.name for p in local.iterdir())
                return
            keys = self._ask("", lambda store: store.list())
        except (OSError, NotImplementedError, DeniedError) as error:
            raise NotACheckpointError(
                f"cannot list {self} ({reason(error)}); give the address of a step"
            ) from None
        yield from sorted({key.decode().split("/", 1)[0] for key in keys})

    def files(self) -> list[str]:
        """Names of all files below a folder of a remote store, relative to it.

        Raises:
            NotACheckpointError: The store cannot list them.
            StorageError: It does not answer.
        """
        try:
            return [key.decode() for key in self._ask("", lambda store: store.list())]
        except (OSError, NotImplementedError, DeniedError) as error:
            raise NotACheckpointError(
                f"cannot list {self} ({reason(error)}), so whether all of it is there cannot be "
                "known"
            ) from None

    def exists(self) -> bool:
        """Returns True if a local folder is there; remote ones are found out by reading."""
        return self.local is None or self.local.is_dir()

    def _ask(self, name: str, question: Any) -> Any:
        """What a remote store answers; a store that says nothing is not asked again."""
        delays = iter(_FIRST_DELAYS)
        while True:
            try:
                return question(ts.KvStore.open(self.kvstore(), context=_first()).result()).result()
            except (OSError, ValueError) as error:
                what = f"{self / name}" if name else str(self)
                kind = DeniedError if str(error).startswith(_DENIED) else StorageError
                delay = next(delays, None)
                if delay is None or not str(error).startswith(_TRANSIENT) or is_silence(error):
                    raise kind(
                        f"cannot read {what}: {reason(error)}; check the address, the network and "
                        "your credentials"
                    ) from None
                time.sleep(delay)


def is_silence(error: BaseException) -> bool:
    """Returns True if an attempt ended because the store said nothing for too long."""
    return "Timeout was reached" in str(error)


def reason(error: BaseException) -> str:
    """The first clause of a tensorstore or OS error, without its source locations."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = _WHERE.split(_STATUS.sub("", str(error)), maxsplit=1)[0]
    line = next(iter(text.splitlines()), type(error).__name__)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
