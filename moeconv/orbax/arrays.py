"""The arrays of a checkpoint through tensorstore: shapes, chunks, and reading a box of one.

A box is read through a cache that holds just the chunks it lies in, so that a chunk is fetched and
decoded once however many boxes are cut from it. The cache is dropped with the reader.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from moeconv.errors import NotACheckpointError, StorageError, TensorError, UnsupportedError
from moeconv.mapping.axes import Array
from moeconv.mapping.ops import DTYPES
from moeconv.orbax.metadata import KeyPath, Tree
from moeconv.orbax.store import Folder, context, reason

# How tensorstore begins a message about data that was read but makes no sense.
_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "INVALID_ARGUMENT", "OUT_OF_RANGE")

Box = tuple[slice | int, ...]


@dataclass(frozen=True)
class ArrayInfo:
    """One array as stored.

    Attributes:
        path: Key path below `params.params`.
        shape: Its shape.
        dtype: A key of `ops.DTYPES`.
        chunk: Shape of the unit that is decoded at once (the inner chunk of a sharded zarr3 array).
        codec: Compression, for people.
    """

    path: KeyPath
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    codec: str

    @property
    def name(self) -> str:
        """Dotted key path."""
        return ".".join(self.path)

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the array, decoded."""
        return math.prod(self.shape) * self.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, decoded."""
        return math.prod(self.chunk) * self.itemsize

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))


class Arrays:
    """The parameters of one checkpoint step."""

    def __init__(self, items: Folder, tree: Tree) -> None:
        self.items = items
        self.tree = tree
        self._context = context(cache_pool={"total_bytes_limit": 0})
        self.info: dict[str, ArrayInfo] = {}
        opened = [(path, self._open(path, self._context)) for path in tree.parameters]
        for path, future in opened:
            info = self._describe(path, self._result(path, future))
            self.info[info.name] = info

    def _spec(self, path: KeyPath) -> dict[str, Any]:
        name = ".".join(("params", "params", *path))
        if self.tree.use_ocdbt:
            kvstore: Any = {"driver": "ocdbt", "base": self.items.kvstore(), "path": f"{name}/"}
        else:
            kvstore = (self.items / name).kvstore()
        return {"driver": "zarr3" if self.tree.use_zarr3 else "zarr", "kvstore": kvstore}

    def _open(self, path: KeyPath, context: Any) -> Any:
        # What is in the cache is not asked for again with every box: a store may be far away.
        spec = {**self._spec(path), "recheck_cached_data": False}
        # A missing chunk reads as zeros unless tensorstore is told that none may be missing.
        if self.tree.zeros_stored:
            spec["fill_missing_data_reads"] = False
        return ts.open(spec, open=True, read=True, context=context)

    def _result(self, path: KeyPath, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            self.check_store(error, f"{self.items}: parameter {'.'.join(path)}")
            raise NotACheckpointError(
                f"{self.items}: parameter {'.'.join(path)} cannot be opened, so the save is "
                f"incomplete or damaged: {reason(error)}"
            ) from None

    def check_store(self, error: Exception, what: str) -> None:
        """Tells a remote store that failed from data that is damaged.

        Raises:
            StorageError: It was the store.
        """
        if self.items.local is None and not str(error).startswith(_DAMAGE):
            raise StorageError(
                f"{what} cannot be read: {reason(error)}; when the store answers again, go on with "
                "--resume"
            ) from None

    def _describe(self, path: KeyPath, store: Any) -> ArrayInfo:
        dtype = str(store.dtype.name)
        if dtype not in DTYPES:
            raise UnsupportedError(
                f"parameter {'.'.join(path)} is stored as {dtype}; moeconv converts "
                f"{', '.join(DTYPES)} (a quantized checkpoint has to be trained or saved in one)"
            )
        chunk = store.chunk_layout.read_chunk.shape or ()  # None for a scalar
        shape = tuple(int(n) for n in store.shape)
        clipped = tuple(min(int(c), n) if n else 1 for c, n in zip(chunk, shape, strict=True))
        return ArrayInfo(path, shape, dtype, clipped, _codec(store))

    def reader(self, name: str, cache_bytes: int) -> "Reader":
        """A reader whose cache holds `cache_bytes` of decoded chunks."""
        info = self.info[name]
        # Local files are mapped, not copied: a chunk may be gigabytes, and new memory is not free.
        chunks = context(
            cache_pool={"total_bytes_limit": cache_bytes}, file_io_mode={"mode": "memmap"}
        )
        return Reader(self, info, self._result(info.path, self._open(info.path, chunks)))


class Reader:
    """Cuts boxes from one array."""

    def __init__(self, arrays: Arrays, info: ArrayInfo, store: Any) -> None:
        self._arrays = arrays
        self._store = store
        self.info = info

    def read(self, box: Box) -> Array:
        """Reads a box; the result is C-contiguous and owns its memory.

        Raises:
            TensorError: A chunk is missing, truncated or corrupt; names the array and the place.
            StorageError: A remote store failed.
        """
        return np.asarray(self._result(box, self._store[box].read(order="C")))

    def decode(self, box: Sequence[tuple[int, int]]) -> None:
        """Fetches and decodes the chunk with these bounds; later reads find it in the cache.

        Raises:
            TensorError: It is missing, truncated or corrupt; names the array and the place.
            StorageError: A remote store failed.
        """
        corner = tuple(slice(start, min(start + 1, stop)) for start, stop in box)
        self._result(tuple(slice(*ends) for ends in box), self._store[corner].read())

    def _result(self, box: Box, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            where = ", ".join(
                f"{s.start}:{s.stop}" if isinstance(s, slice) else str(s) for s in box
            )
            what = f"{self._arrays.items}: parameter {self.info.name} [{where}]"
            self._arrays.check_store(error, what)
            raise TensorError(
                f"{what} is damaged: {reason(error)}; use another step of the run"
            ) from None


def _codec(store: Any) -> str:
    """Name of the compressor, read from the array's metadata."""
    metadata: Mapping[str, Any] = store.spec().to_json().get("metadata", {})
    if compressor := metadata.get("compressor"):
        return str(compressor.get("id"))
    names = []
    codecs = list(metadata.get("codecs", ()))
    while codecs:
        codec = codecs.pop(0)
        if codec["name"] == "sharding_indexed":
            codecs = list(codec["configuration"]["codecs"])
        elif codec["name"] != "bytes":
            names.append(codec["name"])
    return "+".join(names) or "none"
