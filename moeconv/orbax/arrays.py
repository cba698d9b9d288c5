"""The arrays of a checkpoint through tensorstore: shapes, chunks, and reading a box of one.

A box is read through a cache that holds just the chunks it touches, so that a chunk is fetched and
decoded once however many boxes are cut from it. The cache is dropped with the reader.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import tensorstore as ts

from moeconv.errors import NotACheckpointError, StorageError, TensorError, UnsupportedError
from moeconv.orbax.database import Database, array_of, gaps, is_chunk
from moeconv.orbax.inventory import ARRAY_LIMIT, inventory
from moeconv.orbax.metadata import Tree
from moeconv.orbax.store import Folder, context, reason
from moeconv.orbax.trees import KeyPath, is_of_training
from moeconv.tensor.axes import Array, Box
from moeconv.tensor.dtypes import STORED, not_converted
from moeconv.tensor.stored import ArrayInfo

# Far more than runs write (a chunk is what one device held), and still counted in a second.
MOST_CHUNKS = 2**20
# Decoded as a stream, so that a chunk takes no more memory than its shape says. blosc is not: its
# chunks say themselves how large they are. Orbax writes zstd.
_CODECS = {"bytes", "transpose", "crc32c", "zstd", "gzip", "zlib", "bz2"}
# How tensorstore begins a message about data that was read but makes no sense.
_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "INVALID_ARGUMENT", "OUT_OF_RANGE")
_MISSING = "NOT_FOUND"
# What tensorstore raises about metadata and data.
_REFUSED = (ValueError, OSError, TypeError, RuntimeError, OverflowError)


@dataclass(frozen=True)
class Window:
    """A part of a stored array.

    Attributes:
        axis: The axis that it is a range of.
        start: Its first entry.
        stop: Behind its last.
        drop: The one entry is taken, and the axis left out.
        order: The axes of the part among those that are left; None keeps their order.
    """

    axis: int
    start: int
    stop: int
    drop: bool = False
    order: tuple[int, ...] | None = None

    def of(self, sizes: tuple[int, ...], size: int) -> tuple[int, ...]:
        """The sizes of the part's axes, with another for this one."""
        own = () if self.drop else (size,)
        left = (*sizes[: self.axis], *own, *sizes[self.axis + 1 :])
        return left if self.order is None else tuple(left[axis] for axis in self.order)

    def view(self, store: Any) -> Any:
        """This part of a tensorstore array, from 0."""
        whole = (slice(None),) * self.axis
        if self.drop:
            part = store[(*whole, self.start)]
        else:
            part = store[(*whole, slice(self.start, self.stop))]
            part = part[ts.d[self.axis].translate_to[0]]
        return part if self.order is None else part.transpose(self.order)


class Arrays:
    """The parameters of one checkpoint step.

    Attributes:
        info: How each is stored, by name.
        may_lack: A chunk that is not stored counts as the fill value, where the format leaves out
            chunks that hold nothing else; by default it is an error.
    """

    def __init__(self, items: Folder, tree: Tree, *, allow_missing: bool = False) -> None:
        """Opens them.

        Args:
            items: Where they are stored.
            tree: What its `_METADATA` says.
            allow_missing: See `may_lack`.

        Raises:
            NotACheckpointError: One is not there.
            TensorError: One has an axis without entries, is stored and not named by `_METADATA`, or
                would be read as something else than zeros where a chunk is missing; or there are
                too many chunks.
            UnsupportedError: One is stored in a dtype or compression that is not supported.
            StorageError: A remote store failed.
        """
        self.items = items
        self.tree = tree
        self.may_lack = allow_missing and not tree.zeros_stored
        self._context = context(cache_pool={"total_bytes_limit": 0})
        self.info: dict[str, ArrayInfo] = {}
        self._leaves = {leaf.path: leaf for leaf in tree.model}
        self._grids: dict[KeyPath, int] = {}
        self._windows: dict[str, Window] = {}
        self._database = Database(items, self._context) if tree.use_ocdbt else None
        if self._database is not None and items.local is not None:
            self._check_metadata(self._database)
        opened = [(path, self._open(path, self._context)) for path in self._leaves]
        self._demand_named()
        chunks = 0
        for path, future in opened:
            info = self._describe(path, self._result(path, future))
            self.info[info.name] = info
            chunks += math.prod(info.grid)
        if chunks > MOST_CHUNKS:
            raise TensorError(
                f"{items} has {chunks} chunks, of which no run writes more than {MOST_CHUNKS}; its "
                "metadata are damaged"
            )

    def _demand_named(self) -> None:
        """Refuses arrays of the model that are stored, and that `_METADATA` does not name."""
        named = {".".join(leaf) for leaf in self.tree.leaves}
        lost = {n for n in self._stored() - named if not is_of_training(tuple(n.split(".")))}
        if lost:
            raise TensorError(
                f"{self.items} stores arrays that its _METADATA does not name, so converting it "
                f"might drop a part of the model: {', '.join(sorted(lost)[:20])}"
            )

    def _stored(self) -> set[str]:
        """Names of all stored arrays; none where a remote store would have to list its files."""
        return {array_of(key)[0] for key in self._keys if not is_chunk(array_of(key)[1])}

    @cached_property
    def _keys(self) -> list[str]:
        """All keys of the item; none where a remote store would have to list its files."""
        if self._database is not None:
            try:
                return self._database.keys()
            except _REFUSED as error:
                self.check_store(error, str(self.items))
                raise NotACheckpointError(
                    f"{self.items} cannot be listed, so the save is damaged: {reason(error)}"
                ) from None
        return list(inventory(self.items.local)) if self.items.local is not None else []

    @cached_property
    def missing(self) -> Mapping[str, tuple[int, int]]:
        """Arrays of which not all chunks are stored: how many are, and of how many.

        Raises:
            NotACheckpointError: The store cannot list its files.
        """
        keys = self._keys
        if not keys:  # files, in a remote store
            keys = [
                f"{leaf.stored_name}/{key}"
                for leaf in self.tree.model
                for key in (self.items / leaf.stored_name).files()
            ]
        stored = Counter(name for name, rest in map(array_of, keys) if is_chunk(rest))
        counts = {
            path: (stored[self._leaves[path].stored_name], count)
            for path, count in self._grids.items()
        }
        return {".".join(path): count for path, count in counts.items() if count[0] < count[1]}

    @property
    def unmerged(self) -> tuple[str, ...]:
        """The parts of a save that Orbax never merged."""
        return self._database.parts if self._database is not None else ()

    def _check_metadata(self, database: Database) -> None:
        """Looks at the size of what tensorstore parses; where they are files `inventory` does."""
        file = "zarr.json" if self.tree.use_zarr3 else ".zarray"
        for leaf in self.tree.model:
            try:
                future = database.read(f"{leaf.stored_name}/{file}")
            except _REFUSED:
                return  # opening the arrays says why
            if future.exception() is None and len(future.result().value) > ARRAY_LIMIT:
                raise TensorError(
                    f"{self.items}: parameter {leaf.name}: its {file} is larger than "
                    f"{ARRAY_LIMIT // 2**10} KiB; use another step of the run"
                )

    def _spec(self, path: KeyPath) -> dict[str, Any]:
        name = self._leaves[path].stored_name
        if self._database is not None:
            kvstore: Any = self._database.kvstore(name)
        else:
            kvstore = (self.items / name).kvstore()
        return {"driver": "zarr3" if self.tree.use_zarr3 else "zarr", "kvstore": kvstore}

    def _open(self, path: KeyPath, context: Any, *, fill: bool = False) -> Any:
        spec = {
            **self._spec(path),
            # What is in the cache is not asked for again with every box: a store may be far away.
            "recheck_cached_data": False,
            # A missing chunk reads as zeros unless tensorstore is asked to fail on missing ones.
            "fill_missing_data_reads": fill,
        }
        try:
            return ts.open(spec, open=True, read=True, context=context)
        except _REFUSED as error:
            raise self._unopened(path, error) from None

    def _result(self, path: KeyPath, future: Any) -> Any:
        try:
            return future.result()
        except _REFUSED as error:
            raise self._unopened(path, error) from None

    def _unopened(self, path: KeyPath, error: Exception) -> NotACheckpointError:
        name = ".".join(path)
        self.check_store(error, f"{self.items}: parameter {name}")
        missing = gaps(self.unmerged)
        lost = f"; {missing}" if missing else ""
        return NotACheckpointError(
            f"{self.items}: parameter {name} cannot be opened, so the save is incomplete or "
            f"damaged: {reason(error)}{lost}"
        )

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
        name, dtype = ".".join(path), str(store.dtype.name)
        if dtype not in STORED:
            raise UnsupportedError(not_converted(name, dtype))
        codecs, sharded = _codecs(store)
        if unknown := [codec for codec in codecs if codec not in _CODECS]:
            raise UnsupportedError(
                f"parameter {name} is compressed with {', '.join(unknown)}, which no MaxText run "
                "writes; save it with zstd or gzip"
            )
        shape = tuple(int(n) for n in store.shape)
        if 0 in shape:
            raise TensorError(f"parameter {name} has shape {list(shape)}, so it holds nothing")
        # Where a chunk is missing, which may be allowed, this is read instead.
        if store.fill_value is not None and np.any(store.fill_value != 0):
            raise TensorError(
                f"parameter {name} has the fill value {store.fill_value}, which no MaxText run "
                "writes; its metadata are damaged"
            )
        layout = store.chunk_layout  # its shapes are None for a scalar
        chunk = tuple(int(n) for n in layout.read_chunk.shape or ())
        written = tuple(int(n) for n in layout.write_chunk.shape or ())
        # What a shard holds is listed in its index, which is read whole.
        if sharded and math.prod(written) > MOST_CHUNKS * math.prod(chunk):
            raise TensorError(
                f"parameter {name} has shards of {math.prod(written) // math.prod(chunk)} chunks; "
                "its metadata are damaged"
            )
        grid = (-(-n // c) for n, c in zip(shape, written, strict=True))
        self._grids[path] = math.prod(grid)
        clipped = tuple(min(c, n) for c, n in zip(chunk, shape, strict=True))
        decoded = math.prod(chunk if sharded else written) * STORED[dtype].itemsize
        codec = "+".join(c for c in codecs if c != "bytes") or "none"
        return ArrayInfo(path, shape, dtype, clipped, codec, decoded)

    def split(self, name: str, parts: Mapping[KeyPath, Window]) -> None:
        """Takes an array apart: its parts are read instead of it, by names of their own.

        Args:
            name: The array's, which it loses.
            parts: The parts by their key paths; together all of it.
        """
        whole = self.info.pop(name)
        for path, window in parts.items():
            # So that a chunk of the part is inside one that is stored.
            along = math.gcd(whole.chunk[window.axis], window.start)
            self._leaves[path] = self._leaves[whole.path]
            part = replace(
                whole,
                path=path,
                shape=window.of(whole.shape, window.stop - window.start),
                chunk=window.of(whole.chunk, min(along, window.stop - window.start)),
            )
            self.info[part.name], self._windows[part.name] = part, window

    def reader(self, name: str, chunks: int = 1) -> "Reader":
        """A reader whose cache holds so many decoded chunks."""
        info = self.info[name]
        # The cache counts more than the values: what manages them, and OCDBT's nodes.
        size = chunks * info.decoded_bytes
        size += size // 4 + (64 << 20)
        # Local files are mapped, not copied: a chunk may be gigabytes, and new memory is not free.
        opening = context(cache_pool={"total_bytes_limit": size}, file_io_mode={"mode": "memmap"})
        stores = [
            self._result(info.path, self._open(info.path, opening, fill=fill))
            for fill in (False, True)[: 1 + self.may_lack]
        ]
        if (window := self._windows.get(name)) is not None:
            stores = [window.view(store) for store in stores]
        return Reader(self, info, stores[0], stores[-1])


class Reader:
    """Cuts boxes from one array."""

    def __init__(self, arrays: Arrays, info: ArrayInfo, strict: Any, store: Any) -> None:
        self._arrays = arrays
        self._strict = strict
        self._store = store
        self.info = info

    def read(self, box: Box) -> Array:
        """Reads a box; the result is C-contiguous and owns its memory.

        Raises:
            TensorError: A chunk is missing, truncated or corrupt; names the array and the place.
            StorageError: A remote store failed.
        """
        return np.asarray(self._result(box, self._store[box].read(order="C")))

    def decode(self, box: Sequence[tuple[int, int]]) -> bool:
        """Fetches and decodes the chunk with these bounds; later reads find it in the cache.

        Returns:
            False if it is not stored, and need not be.

        Raises:
            TensorError: It is missing, truncated or corrupt; names the array and the place.
            StorageError: A remote store failed.
        """
        corner = tuple(slice(start, min(start + 1, stop)) for start, stop in box)
        future = self._strict[corner].read()
        if self._store is not self._strict and _is_missing(future):
            return False
        self._result(tuple(slice(*ends) for ends in box), future)
        return True

    def _result(self, box: Box, future: Any) -> Any:
        try:
            return future.result()
        except _REFUSED as error:
            where = ", ".join(
                f"{s.start}:{s.stop}" if isinstance(s, slice) else str(s) for s in box
            )
            what = f"{self._arrays.items}: parameter {self.info.name} [{where}]"
            self._arrays.check_store(error, what)
            if not self._arrays.tree.zeros_stored and str(error).startswith(_MISSING):
                raise TensorError(
                    f"{what} is not stored; the Orbax that wrote the checkpoint left out chunks of "
                    "nothing but zeros, and a lost one looks the same: compare with another copy "
                    "or step, or pass --allow-missing-chunks to read it as zeros"
                ) from None
            raise TensorError(
                f"{what} is damaged: {reason(error)}; use another step of the run"
            ) from None


def _is_missing(future: Any) -> bool:
    """Returns True if a read failed because nothing is there."""
    error = future.exception()
    return error is not None and str(error).startswith(_MISSING)


def _codecs(store: Any) -> tuple[list[str], bool]:
    """Names of an array's codecs, read from its metadata, and whether its chunks are in shards."""
    metadata: Mapping[str, Any] = store.spec().to_json().get("metadata", {})
    if compressor := metadata.get("compressor"):
        return [str(compressor.get("id"))], False
    names, sharded = [], False
    codecs = list(metadata.get("codecs", ()))
    while codecs:
        codec = codecs.pop(0)
        if codec["name"] == "sharding_indexed":
            codecs, sharded = list(codec["configuration"]["codecs"]), True
        else:
            names.append(str(codec["name"]))
    return names, sharded
