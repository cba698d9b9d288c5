"""The files being written: preallocated, filled in any order, hashed and synced as they fill."""

import contextlib
import errno
import hashlib
import os
import stat
import threading
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from moeconv.errors import OutputError
from moeconv.execution.threads import Thread
from moeconv.planning.plan import PlannedFile
from moeconv.sizes import format_size
from moeconv.untrusted.files import UnsafeFileError

_HASH_BLOCK = 1 << 20
_HASHERS = 2  # files hashed at the same moment


class OutputFiles:
    """The safetensors files of one conversion, in the staging directory.

    Tensors may be written in parts, in any order, from several threads. A file is hashed by a
    background thread up to the first tensor that is not complete, so that most of the hashing is
    done by the time the last tensor arrives.
    """

    def __init__(self, folder: Path, files: Sequence[PlannedFile], *, keep: bool) -> None:
        """Opens, or with `keep` reopens, and preallocates the files.

        Raises:
            OutputError: The disk has no room, or a file to reopen is not there as it was left.
        """
        self._files = files
        self._descriptors: list[int] = []
        self._progress = threading.Condition()
        self._complete: list[set[str]] = [set() for _ in files]
        self._stopped = False
        self._hashers: list[Thread] = []
        self._slots = threading.BoundedSemaphore(_HASHERS)
        self._digests: dict[str, str] = {}
        self._failure: OSError | None = None
        for file in files:
            path = folder / file.name
            if keep and not (path.is_file() and path.stat().st_size == file.layout.size):
                self.close()
                raise OutputError(
                    f"{path} of the unfinished conversion is gone or cut; begin anew without "
                    "--resume"
                )
            try:
                fd = open_own(path, os.O_RDWR | os.O_CREAT)
            except OSError:
                self.close()
                raise
            self._descriptors.append(fd)
            if not keep:
                os.ftruncate(fd, 0)
            try:
                os.posix_fallocate(fd, 0, file.layout.size)
            except OSError as error:
                self.close()
                raise OutputError(
                    f"cannot reserve {format_size(file.layout.size)} for {path}: "
                    f"{error.strerror}; free some space or choose another OUT"
                ) from None
            os.ftruncate(fd, file.layout.size)
            os.pwrite(fd, file.layout.header, 0)
        self._hashers = [Thread(partial(self._hash, n)) for n in range(len(files))]

    def start_hashing(self) -> None:
        """Begins to hash what is complete."""
        for thread in self._hashers:
            thread.start()

    def write(self, file: int, offset: int, data: memoryview) -> None:
        """Writes bytes at an absolute offset."""
        write_all(self._descriptors[file], data, offset)

    def checksum(self, file: int, offset: int, size: int, before: int = 0) -> int:
        """CRC-32 of bytes that lie in a file; `before` is that of bytes that come before them."""
        for start in range(offset, offset + size, _HASH_BLOCK):
            part = os.pread(self._descriptors[file], min(_HASH_BLOCK, offset + size - start), start)
            before = zlib.crc32(part, before)
        return before

    def completed(self, file: int, tensor: str) -> None:
        """Notes that every byte of a tensor is written."""
        with self._progress:
            self._complete[file].add(tensor)
            self._progress.notify_all()

    def sync(self) -> None:
        """Writes back everything written so far (data only)."""
        for fd in self._descriptors:
            os.fdatasync(fd)

    def finish(self) -> dict[str, str]:
        """Waits for the hashes; SHA-256 of every file by name.

        Raises:
            OSError: A file could not be read back.
        """
        for thread in self._hashers:
            thread.wait()
        if self._failure is not None:
            raise self._failure
        return self._digests

    def close(self) -> None:
        """Stops hashing and closes the files."""
        with self._progress:
            self._stopped = True
            self._progress.notify_all()
        for thread in self._hashers:
            thread.see_off()
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _ready(self, number: int) -> Iterator[int]:
        """Ends of the file's growing complete prefix."""
        file = self._files[number]
        ends = [*(file.layout.offsets[t] for t in file.tensors[1:]), file.layout.size]
        for tensor, end in zip(file.tensors, ends, strict=True):
            with self._progress:
                while not self._stopped and tensor not in self._complete[number]:
                    self._progress.wait()
                if self._stopped:
                    return
            yield end

    def _hash(self, number: int) -> None:
        try:
            self._digest(number)
        except OSError as error:
            self._failure = error

    def _digest(self, number: int) -> None:
        digest = hashlib.sha256()
        position = 0
        for end in self._ready(number):
            with self._slots:
                buffer = memoryview(bytearray(min(_HASH_BLOCK, max(1, end - position))))
                while position < end:
                    part = buffer[: min(len(buffer), end - position)]
                    count = os.preadv(self._descriptors[number], [part], position)
                    if count == 0:
                        raise OSError(errno.EIO, "a file being written was cut by somebody else")
                    digest.update(part[:count])
                    position += count
        if position == self._files[number].layout.size:
            self._digests[self._files[number].name] = digest.hexdigest()


class Scratch:
    """A file for the pieces of one array that cannot go to their place yet."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._fd = open_own(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(self._fd, 0)
            os.posix_fallocate(self._fd, 0, max(1, size))
        except OSError as error:
            self.close()
            raise OutputError(
                f"cannot reserve {format_size(size)} for {path}: {error.strerror}; free some space "
                "or choose another OUT"
            ) from None

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes at an offset."""
        write_all(self._fd, data, offset)

    def read(self, offset: int, count: int) -> bytearray:
        """Reads bytes."""
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        while done < count:
            done += os.preadv(self._fd, [view[done:]], offset + done)
        return data

    def close(self) -> None:
        """Closes and removes it."""
        os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


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
