"""A file of weights as it was hashed: what is read of it later is compared, block by block.

It is far too large to be kept in memory between the gate and the upload, and meanwhile another
file may be put in its place. So nothing is handed out before its block is known to be the one that
was hashed.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moeconv.errors import OutputError
from moeconv.untrusted.files import open_inside

BLOCK = 1 << 22
# As much as a header of safetensors may be long.
_HEADER = 100_000_000

# Device, inode, size, and the times of the last change of content and of anything.
_Identity = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Weights:
    """A file of OUT.

    Attributes:
        folder: OUT.
        name: The file's.
        size: In bytes.
        sha256: Of all of it.
        header: Its first bytes, up to the end of the header of safetensors.
        blocks: A digest of each `BLOCK` bytes.
        identity: What distinguishes it from another file in its place.
    """

    folder: Path
    name: str
    size: int
    sha256: str
    header: bytes = field(repr=False)
    blocks: tuple[bytes, ...] = field(repr=False)
    identity: _Identity

    @classmethod
    def read(cls, folder: Path, name: str) -> "Weights":
        """Hashes a file.

        Raises:
            OutputError: It cannot be read, or changes meanwhile.
        """
        whole, blocks, header, size, wanted = hashlib.sha256(), list[bytes](), bytearray(), 0, 8
        try:
            with open_inside(folder, name, links=False) as file:
                identity = _identity(file.fileno())
                while block := file.read(BLOCK):
                    whole.update(block)
                    blocks.append(_digest(block))
                    if size == 0:
                        wanted += min(int.from_bytes(block[:8], "little"), _HEADER)
                    header += block[: max(0, wanted - size)]
                    size += len(block)
                after = _identity(file.fileno())
        except OSError as error:
            raise OutputError(f"{folder / name} cannot be read: {error.strerror}") from None
        if after != identity:
            raise _changed(folder / name)
        return cls(folder, name, size, whole.hexdigest(), bytes(header), tuple(blocks), identity)

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The file that was hashed, open.

        Raises:
            OutputError: It cannot be opened, is another one, or has changed.
        """
        try:
            file = open_inside(self.folder, self.name, links=False)
        except OSError as error:
            raise OutputError(f"{self.folder / self.name}: {error.strerror}") from None
        with file:
            self.demand_unchanged(file.fileno())
            yield file.fileno()

    def demand_unchanged(self, descriptor: int) -> None:
        """Makes sure that the file has not changed since it was hashed.

        Raises:
            OutputError: It has.
        """
        if _identity(descriptor) != self.identity:
            raise _changed(self.folder / self.name)

    def reader(self, descriptor: int) -> io.BufferedReader:
        """The content, which raises OutputError where it is no longer what was hashed."""
        return io.BufferedReader(_Checked(self, descriptor))

    def chunks(self) -> Iterator[bytes]:
        """The content, as `reader` has it."""
        with self.descriptor() as descriptor, self.reader(descriptor) as file:
            while block := file.read(BLOCK):
                yield block


class _Checked(io.RawIOBase):
    """A file that is read by blocks, each compared with its digest."""

    def __init__(self, weights: Weights, descriptor: int) -> None:
        super().__init__()
        self.weights, self.descriptor = weights, descriptor
        self.at = 0
        self.held: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.weights.size}[whence]
        self.at = max(0, base + offset)
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        number, start = divmod(self.at, BLOCK)
        piece = self._block(number)[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)

    def _block(self, number: int) -> bytes:
        if number >= len(self.weights.blocks):
            return b""
        if self.held[0] != number:
            block = b""
            while len(block) < BLOCK:
                more = os.pread(self.descriptor, BLOCK - len(block), number * BLOCK + len(block))
                if not more:
                    break
                block += more
            if _digest(block) != self.weights.blocks[number]:
                raise _changed(self.weights.folder / self.weights.name)
            self.held = (number, block)
        return self.held[1]


def _identity(descriptor: int) -> _Identity:
    at = os.fstat(descriptor)
    return at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns


def _digest(block: bytes) -> bytes:
    return hashlib.blake2b(block, digest_size=32).digest()


def _changed(path: Path) -> OutputError:
    return OutputError(
        f"{path} was changed while it was being pushed; nothing was committed, verify and push "
        "again"
    )
