"""The arrays of a MaxText checkpoint, in the staging directory: chunks put by tensorstore.

Every block that comes is one chunk or several, whole (`OrbaxOutput.blocks`), so that nothing is
read back to be completed. Chunks of one moment are committed together: OCDBT writes a new version
of its tree with every commit.
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from moeconv.artifact.manifest import FileRecord
from moeconv.errors import OutputError
from moeconv.orbax.writer import (
    COMMITTED,
    array_spec,
    step_metadata,
    tree_metadata,
)
from moeconv.planning.orbax_output import OrbaxOutput
from moeconv.tensor.axes import Array, Ranges
from moeconv.tensor.form import Form
from moeconv.tensor.stored import payload

STEP = "checkpoints/0"
_ITEMS = f"{STEP}/items"
_HASH_BLOCK = 1 << 20
# What waits to be committed, before who writes more has to wait.
_PENDING_BYTES = 64 << 20
_FAILED = (ValueError, OSError, TypeError, RuntimeError, OverflowError)


class OrbaxSink:
    """The checkpoint of one conversion (`sink.Sink`)."""

    def __init__(self, folder: Path, output: OrbaxOutput, *, keep: bool) -> None:
        """Creates, or with `keep` opens, every array.

        Raises:
            OutputError: One cannot be created, or is not there as it was left.
        """
        self._folder, self._output = folder, output
        self._lock = threading.Lock()
        self._pending: list[Any] = []
        self._pending_bytes = 0
        items = folder / _ITEMS
        items.mkdir(parents=True, exist_ok=True)
        context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        transaction = ts.Transaction() if output.ocdbt and not keep else None
        try:
            opened = {
                name: ts.open(
                    array_spec(items, array, zarr3=output.zarr3, ocdbt=output.ocdbt),
                    create=not keep,
                    open=True,
                    context=context,
                    transaction=transaction,
                )
                for name, array in output.arrays.items()
            }
            stores = {name: future.result() for name, future in opened.items()}
            if transaction is not None:
                transaction.commit_sync()
        except _FAILED as error:
            raise OutputError(
                f"{items} of the conversion cannot be {'opened' if keep else 'created'}: {error}"
                + ("; begin anew without --resume" if keep else "")
            ) from None
        self._stores = {name: store.with_transaction(None) for name, store in stores.items()}

    def start(self) -> None:
        """Nothing: files are hashed when they are complete."""

    def write(self, target: str, form: Form, ranges: Ranges, values: Array) -> None:
        """Writes whole chunks."""
        self._put(target, _box(form, ranges), values.reshape(_shape(form, ranges)))

    def fill(self, target: str, values: Array) -> None:
        """Writes a whole array."""
        self._put(target, (...,), values)

    def _put(self, target: str, box: tuple[Any, ...], values: Array) -> None:
        future = self._stores[target][box].write(
            values, can_reference_source_data_indefinitely=True
        )
        with self._lock:
            self._pending.append(future)
            self._pending_bytes += values.nbytes
            full = self._pending_bytes >= _PENDING_BYTES
        if full:
            self.sync()

    def checksum(self, target: str, form: Form, ranges: Ranges, size: int, before: int) -> int:
        """CRC-32 of the chunks stored where a piece belongs, one after the other."""
        for block in self._output.blocks(target, form, ranges):
            try:
                stored = self._stores[target][_box(form, block)].read(order="C").result()
            except _FAILED:
                return ~before
            before = zlib.crc32(payload(np.ascontiguousarray(stored)), before)
        return before

    def completed(self, target: str) -> None:
        """Nothing: files hold chunks of many arrays."""

    def sync(self) -> None:
        """Waits until everything written so far is on disk.

        Raises:
            OSError: It cannot be written.
        """
        with self._lock:
            pending, self._pending = self._pending, []
            self._pending_bytes = 0
        for future in pending:
            try:
                future.result()
            except _FAILED as error:
                raise OSError(None, str(error)) from None

    def finish(self) -> dict[str, FileRecord]:
        """Writes the tree's metadata and the marker of a finished save; hashes all files.

        Raises:
            OSError: A file cannot be written or read back.
        """
        self.sync()
        output, step = self._output, self._folder / STEP
        _write(
            self._folder / _ITEMS / "_METADATA",
            tree_metadata(output.arrays, zarr3=output.zarr3, ocdbt=output.ocdbt),
        )
        _write(step / "_CHECKPOINT_METADATA", step_metadata(scan_layers=output.scan_layers))
        _write(step / "commit_success.txt", COMMITTED)
        return {str(path.relative_to(self._folder)): _record(path) for path in _files(step)}

    def close(self) -> None:
        """Forgets the arrays."""
        self._stores = {}


def _box(form: Form, ranges: Ranges) -> tuple[slice, ...]:
    """Ranges as an index into the array; an axis in parts is whole."""
    return tuple(
        slice(*ranges[group[0]]) if len(group) == 1 else slice(None)
        for group in form.rearrange.right
    )


def _shape(form: Form, ranges: Ranges) -> tuple[int, ...]:
    """Of the values, with the array's axes."""
    sizes = dict(zip(form.target_axes, form.piece_shape(ranges), strict=True))
    return form.rearrange.right_shape(sizes)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, in order."""
    for base, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(base) / name for name in sorted(names))


def _record(path: Path) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while part := file.read(_HASH_BLOCK):
            digest.update(part)
            size += len(part)
        os.fsync(file.fileno())
    return FileRecord(size=size, sha256=digest.hexdigest())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
