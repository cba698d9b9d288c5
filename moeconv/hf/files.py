"""The files of a Hugging Face model by their names, wherever they are: a folder, or the Hub."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from moeconv.errors import ConfigError, TensorError
from moeconv.hf.safetensors import Header, read_header
from moeconv.tensor.axes import Array, Box, Range
from moeconv.tensor.stored import Reader, payload
from moeconv.untrusted.files import inside, read_inside

Ranges = Sequence[Range]
Dtype = np.dtype[Any]


class Files(Protocol):
    """The files of a model."""

    @property
    def name(self) -> str:
        """Where they are, for people and for the manifest."""

    @property
    def remote(self) -> bool:
        """True if they are not on this machine."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file directly in it, by name."""

    def read(self, name: str, limit: int) -> bytes:
        """Content of a small file.

        Raises:
            FileNotFoundError: There is none.
            ConfigError: It cannot be read, is outside of the folder, or larger than `limit`.
            StorageError: The Hub failed.
        """

    def header(self, name: str) -> Header:
        """The header of a safetensors file, as `safetensors.read_header`.

        Raises:
            FileNotFoundError: There is none.
            TensorError: It is not a whole safetensors file, or outside of the folder.
            StorageError: The Hub failed.
        """

    def reader(self, name: str, dtype: Dtype, offset: int, shape: tuple[int, ...]) -> Reader:
        """Opens an array of a file.

        Args:
            name: The file.
            dtype: Of its values.
            offset: Bytes before the first.
            shape: Its shape.

        Raises:
            TensorError: The file is not as long any more.
        """

    def version(self, name: str) -> str:
        """What changes when a file does."""

    def connected(self) -> AbstractContextManager[None]:
        """Everything is read while this is open."""


@dataclass(frozen=True)
class LocalFiles:
    """A folder of this machine; no link leads out of it."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder as the user named it."""
        return str(self.folder)

    @property
    def remote(self) -> bool:
        """See `Files`."""
        return False

    def sizes(self) -> dict[str, int]:
        """See `Files`."""
        found = {}
        with suppress(OSError):
            for path in sorted(self.folder.iterdir()):
                with suppress(OSError):
                    if path.is_file():
                        found[path.name] = path.stat().st_size
        return found

    def read(self, name: str, limit: int) -> bytes:
        """See `Files`."""
        try:
            return read_inside(self.folder, name, limit=limit)
        except FileNotFoundError:
            raise
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"{self.folder / name} cannot be read: {why}") from None

    def header(self, name: str) -> Header:
        """See `Files`."""
        path = self._path(name)
        if not path.exists():
            raise FileNotFoundError(name)
        return read_header(path, foreign=True)

    def reader(self, name: str, dtype: Dtype, offset: int, shape: tuple[int, ...]) -> Reader:
        """See `Files`."""
        path = self._path(name)
        try:
            return MappedReader(np.memmap(path, dtype, mode="r", offset=offset, shape=shape))
        except (OSError, ValueError) as error:
            raise TensorError(f"{path} was cut or removed: {error}") from None

    def version(self, name: str) -> str:
        """Its size and time."""
        status = self._path(name).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def connected(self) -> AbstractContextManager[None]:
        """See `Files`."""
        return nullcontext()

    def _path(self, name: str) -> Path:
        try:
            return inside(self.folder, name)
        except OSError as error:
            why = error.strerror or error
            raise TensorError(f"{self.folder / name} cannot be read: {why}") from None


class MappedReader:
    """Cuts boxes from an array that is mapped into memory."""

    def __init__(self, values: Array) -> None:
        self._values = values

    def read(self, box: Box) -> Array:
        """Reads a box; the result is C-contiguous and owns its memory."""
        return np.array(self._values[box], order="C", subok=False)

    def decode(self, box: Ranges) -> bool:
        """Nothing is compressed."""
        return True


class FetchedReader:
    """Cuts boxes from an array of which each chunk is fetched once, and held until it is dropped.

    Args:
        fill: Gets bytes from the array's first one on, and where to put what follows them.
        dtype: Of its values.
        shape: Its shape.
    """

    def __init__(
        self, fill: Callable[[int, memoryview], None], dtype: DTypeLike, shape: tuple[int, ...]
    ) -> None:
        self._fill, self._dtype, self._shape = fill, np.dtype(dtype), shape
        self._held: dict[tuple[Range, ...], Array] = {}

    def decode(self, box: Ranges) -> bool:
        """Fetches a chunk."""
        key = tuple(box)
        if key not in self._held:
            self._held[key] = self._fetch(key)
        return True

    def read(self, box: Box) -> Array:
        """Reads a box; the result is C-contiguous and owns its memory."""
        slices = [slice(e, e + 1) if isinstance(e, int) else e for e in box]
        slices += [slice(None)] * (len(self._shape) - len(slices))
        wanted = tuple(s.indices(n)[:2] for s, n in zip(slices, self._shape, strict=True))
        lost = tuple(n for n, each in enumerate(box) if isinstance(each, int))
        return np.ascontiguousarray(np.squeeze(self._joined(wanted), lost))

    def _joined(self, wanted: tuple[Range, ...]) -> Array:
        """A box from the chunks that are held; fetched anew where they do not have all of it."""
        made = np.empty([stop - start for start, stop in wanted], self._dtype)
        count = 0
        for held, values in self._held.items():
            both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, held, strict=True)]
            if all(start < stop for start, stop in both):
                made[_relative(both, wanted)] = values[_relative(both, held)]
                count += prod(stop - start for start, stop in both)
        return made if count == made.size else self._fetch(wanted)

    def _fetch(self, box: tuple[Range, ...]) -> Array:
        """Fetches a box, each run of bytes at once."""
        made = np.empty([stop - start for start, stop in box], self._dtype)
        cut = [n for n, size in enumerate(self._shape) if box[n] != (0, size)]
        last = cut[-1] if cut else 0
        run = prod(made.shape[last:]) * self._dtype.itemsize
        strides = [prod(self._shape[n + 1 :]) for n in range(len(self._shape))]
        into = payload(made)
        for number, corner in enumerate(product(*(range(*ends) for ends in box[:last]))):
            place = (*corner, *(start for start, _ in box[last:]))
            begin = sum(p * s for p, s in zip(place, strides, strict=True)) * self._dtype.itemsize
            self._fill(begin, into[number * run : (number + 1) * run])
        return made


def _relative(box: Ranges, whole: Ranges) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, whole, strict=True))
