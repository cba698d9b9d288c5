"""The safetensors files of a conversion: preallocated, filled in any order, hashed as they fill."""

import errno
import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from moeconv.artifact.manifest import FileRecord
from moeconv.errors import OutputError
from moeconv.execution.own_files import open_own, write_all
from moeconv.execution.threads import Thread
from moeconv.planning.output import SafetensorsOutput
from moeconv.sizes import format_size
from moeconv.tensor.axes import Array, Ranges
from moeconv.tensor.form import Form
from moeconv.tensor.stored import payload

_HASH_BLOCK = 1 << 20
_HASHERS = 2  # files hashed at the same moment


class SafetensorsSink:
    """The safetensors files of one conversion, in the staging directory (`sink.Sink`).

    A file is hashed by a background thread up to the first tensor that is not complete, so that
    most of the hashing is done by the time the last tensor arrives.
    """

    def __init__(self, folder: Path, output: SafetensorsOutput, *, keep: bool) -> None:
        """Opens, or with `keep` reopens, and preallocates the files.

        Raises:
            OutputError: The disk has no room, or a file to reopen is not there as it was left.
        """
        self._files, self._places = output.files, output.places
        self._descriptors: list[int] = []
        self._progress = threading.Condition()
        self._complete: list[set[str]] = [set() for _ in output.files]
        self._stopped = False
        self._hashers: list[Thread] = []
        self._slots = threading.BoundedSemaphore(_HASHERS)
        self._digests: dict[str, str] = {}
        self._failure: OSError | None = None
        for file in output.files:
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
        self._hashers = [Thread(partial(self._hash, n)) for n in range(len(output.files))]

    def start(self) -> None:
        """Begins to hash what is complete."""
        for thread in self._hashers:
            thread.start()

    def write(self, target: str, form: Form, ranges: Ranges, values: Array) -> None:
        """Writes a piece: one run of bytes."""
        place = self._places[target]
        offset = place.offset + form.offset(ranges)
        write_all(self._descriptors[place.file], payload(values), offset)

    def fill(self, target: str, values: Array) -> None:
        """Writes a whole tensor."""
        place = self._places[target]
        write_all(self._descriptors[place.file], payload(values), place.offset)

    def checksum(self, target: str, form: Form, ranges: Ranges, size: int, before: int) -> int:
        """CRC-32 of the bytes stored where a piece belongs."""
        place = self._places[target]
        fd, offset = self._descriptors[place.file], place.offset + form.offset(ranges)
        for start in range(offset, offset + size, _HASH_BLOCK):
            part = os.pread(fd, min(_HASH_BLOCK, offset + size - start), start)
            before = zlib.crc32(part, before)
        return before

    def completed(self, target: str) -> None:
        """Notes that every byte of a tensor is written."""
        with self._progress:
            self._complete[self._places[target].file].add(target)
            self._progress.notify_all()

    def sync(self) -> None:
        """Writes back everything written so far (data only)."""
        for fd in self._descriptors:
            os.fdatasync(fd)

    def finish(self) -> dict[str, FileRecord]:
        """Waits for the hashes; every file by its name.

        Raises:
            OSError: A file could not be read back.
        """
        for thread in self._hashers:
            thread.wait()
        if self._failure is not None:
            raise self._failure
        return {
            file.name: FileRecord(size=file.layout.size, sha256=self._digests[file.name])
            for file in self._files
        }

    def close(self) -> None:
        """Stops hashing and closes the files."""
        with self._progress:
            self._stopped = True
            self._progress.notify_all()
        for thread in self._hashers:
            thread.wait_uninterrupted()
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
                        raise OSError(
                            errno.EIO, "another process cut a file that was being written"
                        )
                    digest.update(part[:count])
                    position += count
        if position == self._files[number].layout.size:
            self._digests[self._files[number].name] = digest.hexdigest()
