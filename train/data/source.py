"""Where stories come from: local parquet, JSON-lines and text files, read one text at a time."""

import contextlib
import fnmatch
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from moeconv_train.data.manifest import SPLITS, TRAIN, VALIDATION, Source, SourceFile
from moeconv_train.data.records import sha256
from moeconv_train.words import first_line

from moeconv.errors import MissingPackageError, MoeconvError, UsageError

# In the order of preference, where a dataset offers a split in several.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "json": (".jsonl", ".ndjson", ".json"),
    "text": (".txt",),
}
_COMPRESSED = (".gz", ".zst")
_SPLIT_WORDS = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "test": "test",
}
_ROWS_AT_A_TIME = 4096
_BLOCK = 1 << 20


def format_of(name: str) -> str | None:
    """The format that a file's name tells, compressed or not."""
    stem = name.lower()
    for suffix in _COMPRESSED:
        stem = stem.removesuffix(suffix)
    plain = stem == name.lower()
    for format_, suffixes in FORMATS.items():
        if stem.endswith(suffixes) and (plain or format_ != "parquet"):
            return format_
    return None


def names_a_file(name: str) -> bool:
    """Whether a source is meant as a path, there or not: no dataset of the Hub is called so."""
    return name.startswith(("/", "./", "../", "~")) or format_of(name) is not None


def split_of(name: str) -> str:
    """The split that a file's name tells, as the Hub does it: a word of its path, or train."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), TRAIN)


def choose(names: Iterable[str], patterns: Mapping[str, str], source: str) -> dict[str, list[str]]:
    """Which files are read for which split, in the order of their names.

    Args:
        names: All files of the source.
        patterns: Split to glob, as the user said it; without any, names tell format and split.
        source: What to call it in an error.

    Raises:
        UsageError: Nothing can be read, or a pattern matches nothing.
    """
    readable = sorted(name for name in names if format_of(name))
    if patterns:
        chosen = {s: [n for n in readable if fnmatch.fnmatch(n, p)] for s, p in patterns.items()}
        for split, pattern in patterns.items():
            if not chosen[split]:
                raise UsageError(
                    f"{source}: --split {split}={pattern} matches no parquet, jsonl or text file; "
                    f"there are {_some(readable)}"
                )
        both = set(chosen.get(TRAIN, ())) & set(chosen.get(VALIDATION, ()))
        if both:
            raise UsageError(f"{source}: --split takes {min(both)} for train and for validation")
    else:
        chosen = {}
        for split in SPLITS:
            told = [name for name in readable if split_of(name) == split]
            best = next((f for f in FORMATS if any(format_of(n) == f for n in told)), None)
            chosen[split] = [name for name in told if format_of(name) == best]
    if not chosen.get(TRAIN):
        raise UsageError(
            f"{source}: has no parquet, jsonl or text file to train on"
            + (f"; there are {_some(readable)}, name them with --split train=GLOB" * bool(readable))
        )
    return chosen


def local_source(
    path: Path, *, column: str, separator: str, patterns: Mapping[str, str]
) -> tuple[Source, dict[str, Path]]:
    """Describes a file or a folder, and where each of its files lies."""
    root = path if path.is_dir() else path.parent
    if path.is_dir():
        names = [
            file.relative_to(root).as_posix()
            for file in path.rglob("*")
            if file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts)
        ]
        chosen = choose(names, patterns, str(path))
    elif format_of(path.name) is None:
        raise UsageError(
            f"{path}: is no parquet, jsonl or text file by its name; name it .parquet, .jsonl or "
            ".txt (the last two also with .gz or .zst)"
        )
    else:
        chosen = {TRAIN: [path.name]}
    files = tuple(
        SourceFile(
            path=name, size=(root / name).stat().st_size, digest=sha256(root / name), split=split
        )
        for split in SPLITS
        for name in chosen.get(split, ())
    )
    source = Source(
        kind="local",
        name=path.resolve().name,
        revision=None,
        column=column,
        separator=separator,
        files=files,
    )
    return source, {file.path: root / file.path for file in files}


def read_texts(path: Path, *, column: str, separator: str) -> Iterator[str | None]:
    """The texts of a file, in order; None where there is none.

    Raises:
        UsageError: The file cannot be read, or has no texts under that column.
    """
    format_ = format_of(path.name)
    try:
        if format_ == "parquet":
            yield from _parquet(path, column)
        elif format_ == "json":
            yield from _json_lines(path, column)
        else:
            yield from _text(path, separator)
    except MoeconvError:
        raise
    except (OSError, EOFError, ValueError) as error:  # pyarrow's errors are among them
        reason = first_line(error)
        raise UsageError(f"{path}: cannot be read as {format_} ({reason})") from error


def _parquet(path: Path, column: str) -> Iterator[str | None]:
    pa = _pyarrow()
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            raise UsageError(
                f"{path}: has no column {column!r}; name one of {_some(schema.names)} with --column"
            )
        kind = schema.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UsageError(f"{path}: column {column!r} holds {kind}, not text")
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[column], use_threads=False):
            yield from batch.column(0).to_pylist()


def _json_lines(path: Path, column: str) -> Iterator[str | None]:
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                value: Any = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}: line {number} is not JSON ({error})") from None
            if not isinstance(value, dict) or column not in value:
                raise UsageError(
                    f"{path}: line {number} is no object with a field {column!r}"
                    + (f"; name one of {_some(list(value))} with --column" if value else "")
                )
            text = value[column]
            if text is not None and not isinstance(text, str):
                raise UsageError(f"{path}: line {number}: {column!r} is not text")
            # A lone surrogate, which JSON can spell and UTF-8 cannot, becomes U+FFFD.
            yield text and text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _text(path: Path, separator: str) -> Iterator[str]:
    with _opened(path) as stream:
        rest = ""
        while block := stream.read(_BLOCK):
            *whole, rest = (rest + block).split(separator)
            yield from whole
        yield rest


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    with contextlib.ExitStack() as opened:
        raw: Any = opened.enter_context(path.open("rb"))
        if path.suffix.lower() == ".gz":
            raw = opened.enter_context(gzip.GzipFile(fileobj=raw))
        elif path.suffix.lower() == ".zst":
            raw = io.BufferedReader(_pyarrow().input_stream(raw, compression="zstd"))
        # Only "\n" ends a line, as JSON lines want it; a text keeps its "\r".
        yield opened.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline="\n"))


def _pyarrow() -> Any:
    """pyarrow, which reads parquet and zstd."""
    try:
        import pyarrow
    except ImportError:
        raise MissingPackageError(
            'reading parquet or .zst needs pyarrow: pip install "moeconv[train]"'
        ) from None
    return pyarrow


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown}, …" if len(names) > 8 else shown or "none"
