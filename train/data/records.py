"""Shards on disk: ArrayRecord files of `tf.train.Example`."""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

# Columns of whole numbers. MaxText's own pipeline reads `text` (`train_data_columns` in base.yml),
# so it refuses rows of several stories, which it would read wrongly.
TOKENS = "tokens"
LENGTHS = "lengths"

Row = Mapping[str, Sequence[int] | np.ndarray]


def write_shard(path: Path, rows: Iterable[Row]) -> None:
    """Writes `rows` to `path`, forced to disk.

    One record a group, as grain wants it for random access (array_record_data_source.py,
    `_check_group_size`).

    Raises:
        OSError: They cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from maxtext.input_pipeline.protos import example_pb2

    try:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            example = example_pb2.Example()
            for column, values in row.items():
                numbers = np.asarray(values).tolist()
                example.features.feature[column].int64_list.value.extend(numbers)
            writer.write(example.SerializeToString(deterministic=True))
        writer.close()
    except RuntimeError as error:  # riegeli's; it holds no errno
        reason = str(error).splitlines()[0][:300]
        raise OSError(errno.EIO, reason, str(path)) from None
    flush(path)


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


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file so that it is whole or absent, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process's number, so that a half-written file is never taken up by another.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
