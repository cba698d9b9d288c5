"""Stored arrays, whatever stores them: shape, dtype, chunks, and what reads a box of one.

A conversion reads from a `Source`. Which format it has, and so in which direction a model is
carried, only those know who open it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from moeconv.tensor.axes import Array, Box
from moeconv.tensor.dtypes import STORED


@dataclass(frozen=True)
class ArrayInfo:
    """One array as stored.

    Attributes:
        path: Key path, below `params.params` in a MaxText checkpoint.
        shape: Its shape.
        dtype: A key of `STORED`.
        chunk: Shape of what is decoded at once (the inner chunk of a sharded zarr3 array), cut to
            the array.
        codec: Compression, for people.
        decoded_bytes: Bytes of one chunk when it is decoded, which is done whole: it may reach
            beyond the array.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    codec: str
    decoded_bytes: int

    @property
    def name(self) -> str:
        """Dotted key path."""
        return ".".join(self.path)

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return STORED[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the array, decoded."""
        return math.prod(self.shape) * self.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the part of one chunk that is inside the array."""
        return math.prod(self.chunk) * self.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))


class Reader(Protocol):
    """Cuts boxes from one array; what it has decoded is kept until it is dropped."""

    def read(self, box: Box) -> Array:
        """Reads a box; the result is C-contiguous and owns its memory.

        Raises:
            TensorError: A chunk is missing, truncated or corrupt; names the array and the place.
            StorageError: A remote store failed.
        """

    def decode(self, box: Sequence[tuple[int, int]]) -> bool:
        """Fetches and decodes the chunk with these bounds, for later reads.

        Returns:
            False if it is not stored, and need not be.

        Raises:
            TensorError: It is missing, truncated or corrupt; names the array and the place.
            StorageError: A remote store failed.
        """


class Source(Protocol):
    """The model that is read: its arrays by name, and a reader for each."""

    @property
    def info(self) -> Mapping[str, ArrayInfo]:
        """How each array is stored."""

    def reader(self, name: str, chunks: int = 1) -> Reader:
        """Opens an array, to keep so many decoded chunks of it."""


class Together:
    """Several sources as one, whose arrays have different names."""

    def __init__(self, *sources: Source) -> None:
        self._of = {name: source for source in sources for name in source.info}
        self.info: dict[str, ArrayInfo] = {
            name: source.info[name] for name, source in self._of.items()
        }

    def reader(self, name: str, chunks: int = 1) -> Reader:
        """See `Source`."""
        return self._of[name].reader(name, chunks)


def payload(array: Array) -> memoryview:
    """The bytes of an array as they are stored: C order, or an error.

    Raises:
        ValueError: The array is not C-contiguous; its memory order is not its logical order.
    """
    if not array.flags.c_contiguous:
        raise ValueError("only C-contiguous arrays have their logical order in memory")
    return memoryview(array.reshape(-1).view("u1"))
