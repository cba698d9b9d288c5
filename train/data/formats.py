"""The texts of a parquet, JSON-lines or text file.

Not read by `datasets` 5.2: where a line of JSON has no such field it gives an empty text, where it
has a number it gives that; it cuts a text file into lines; and of a folder it reads the commonest
format. It says so of none of these.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from moeconv_train.words import first_line

from moeconv.errors import MoeconvError, UsageError

# In the order of preference, where a dataset on the Hub has a split in several.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".ndjson", ".json"),
    "text": (".txt",),
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_ROWS_AT_A_TIME = 4096
_BLOCK = 1 << 20
# Characters. What is longer is no story, but a file that is separated otherwise.
_LONGEST = 1 << 26


def format_of(name: str) -> str | None:
    """The format that a file's name tells, compressed or not."""
    path = Path(name.lower())
    packed = path.suffix in _COMPRESSIONS
    suffix = Path(path.stem).suffix if packed else path.suffix
    found = next((f for f, suffixes in FORMATS.items() if suffix in suffixes), None)
    return None if packed and found == "parquet" else found


def read_texts(stream: BinaryIO, name: str, *, column: str, separator: str) -> Iterator[str | None]:
    """The texts of a file, whose name tells the format, in order; None where there is none.

    Raises:
        UsageError: It cannot be read, or has no texts under that column.
    """
    format_ = format_of(name)
    try:
        if format_ == "parquet":
            yield from _parquet(stream, name, column)
        elif format_ == "json":
            yield from _json_lines(_unpacked(stream, name), name, column)
        else:
            yield from _stories(_unpacked(stream, name), name, separator)
    except MoeconvError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        reason = first_line(error)
        raise UsageError(f"{name}: cannot be read as {format_} ({reason})") from error


def _parquet(stream: BinaryIO, name: str, column: str) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(stream) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise UsageError(
                f"{name}: has no column {column!r}; name one of {some(schema.names)} with --column"
            )
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UsageError(f"{name}: column {column!r} holds {kind}, not text")
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[column], use_threads=False):
            yield from batch.column(0).to_pylist()


def _json_lines(stream: IO[str], name: str, column: str) -> Iterator[str | None]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{name}: line {number} is not JSON ({error})") from None
        if not isinstance(value, dict) or column not in value:
            there = f"; name one of {some(value)} with --column" if isinstance(value, dict) else ""
            raise UsageError(f"{name}: line {number} is no object with a field {column!r}{there}")
        text = value[column]
        if text is not None and not isinstance(text, str):
            raise UsageError(f"{name}: line {number}: {column!r} is not text")
        # A lone surrogate, which JSON can spell and UTF-8 cannot, becomes U+FFFD.
        yield text and text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _stories(stream: IO[str], name: str, separator: str) -> Iterator[str]:
    """What stands between separators; these may have lines of their own, as in TinyStories."""
    rest = ""
    while block := stream.read(_BLOCK):
        *whole, rest = (rest + block).split(separator)
        for story in whole:
            yield story.strip("\n")
        if len(rest) > _LONGEST:
            raise UsageError(
                f"{name}: no {separator!r} in {len(rest):,} characters; say with --separator what "
                "stands between its stories"
            )
    yield rest.strip("\n")


def _unpacked(stream: BinaryIO, name: str) -> IO[str]:
    """A file as text. Only a line feed ends a line, as JSON lines want it; a text keeps its CR."""
    import pyarrow as pa

    raw: Any = stream
    if kind := _COMPRESSIONS.get(Path(name.lower()).suffix):
        # Whatever the damage, pyarrow raises OSError; gzip has three unrelated kinds.
        raw = io.BufferedReader(pa.input_stream(stream, compression=kind))
    return io.TextIOWrapper(raw, encoding="utf-8", newline="\n")


def some(names: Iterable[str]) -> str:
    """The first of some names, for a sentence."""
    shown = list(names)
    return ", ".join(shown[:8]) + ", …" * (len(shown) > 8) or "none"
