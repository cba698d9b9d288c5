"""Shards on disk: ArrayRecord files of `tf.train.Example`, each whole under its name or absent."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

# Columns of whole numbers. MaxText's own pipeline reads TEXT (`train_data_columns` in base.yml);
# rows of several stories have the other two, so that it refuses what it would read wrongly.
TEXT = "text"
TOKENS = "tokens"
LENGTHS = "lengths"

Row = Mapping[str, Sequence[int] | np.ndarray]


def write_shard(path: Path, rows: Iterable[Row]) -> int:
    """Writes `rows` to `path`: under another name first, forced to disk, then renamed.

    One record a group, as grain wants it for random access (array_record_data_source.py,
    `_check_group_size`).

    Returns:
        The number of rows.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from maxtext.input_pipeline.protos import example_pb2

    count = 0
    with replacing(path) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            for row in rows:
                example = example_pb2.Example()
                for column, values in row.items():
                    numbers = values.tolist() if isinstance(values, np.ndarray) else values
                    example.features.feature[column].int64_list.value.extend(numbers)
                writer.write(example.SerializeToString(deterministic=True))
                count += 1
        finally:
            writer.close()
    return count


def read_shard(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a shard, in order."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        for record in reader.read_all() if reader.num_records() else ():
            yield parse(record)
    finally:
        reader.close()


def parse(record: bytes) -> dict[str, np.ndarray]:
    """The columns of one record."""
    from maxtext.input_pipeline.protos import example_pb2

    example = example_pb2.Example.FromString(record)
    return {
        column: np.asarray(feature.int64_list.value, np.int32)
        for column, feature in example.features.feature.items()
    }


class replacing:  # noqa: N801  (used as a function)
    """A path to write to, which takes the place of `path` when the block ends well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # The process's number, so that a half-written file is never taken up by another.
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._partial

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        _flush(self._partial)
        self._partial.replace(self._path)
        _flush(self._path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file so that it is whole or absent, also after a power cut."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def sha256(path: Path) -> str:
    """The file's digest, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
