"""Where stories come from: parquet, JSON-lines and text files, here or on the Hub.

Not read by `datasets` 5.2: where a line of JSON has no such field it gives an empty text, where it
has a number it gives that; it cuts a text file into lines; and of a folder it reads the commonest
format. It says so of none of these.
"""

import glob
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from moeconv_train.data.manifest import (
    SPLITS,
    TRAIN,
    VALIDATION,
    PrepareOptions,
    Source,
    SourceFile,
    Split,
)
from moeconv_train.words import first_line

from moeconv.errors import MoeconvError, StorageError, UsageError
from moeconv.untrusted.files import open_inside, open_regular

# By their files' endings, in the order of preference where a dataset on the Hub has several.
_FORMATS: Mapping[str, str] = {".parquet": "parquet", ".jsonl": "json", ".txt": "text"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_ROWS_AT_A_TIME = 4096
_BLOCK = 1 << 20
# Characters. What is longer is no story, but a file that is separated otherwise.
_LONGEST = 1 << 26
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    "test": "test",
}


@dataclass(frozen=True)
class Found:
    """A source on this machine."""

    source: Source
    place: Path  # file or folder; for a dataset on the Hub, its folder in the Hub's cache
    left: list[str]  # files that are not read

    def texts(self, file: SourceFile) -> Iterator[str | None]:
        """The texts of a file, in order; None where there is none.

        Raises:
            UsageError: It cannot be read, or has no texts under that column.
        """
        source = self.source
        label = f"{source.name}: {file.path}" if self.place.is_dir() else str(self.place)
        with _open(self.place, file.path) as stream:
            yield from _read_texts(stream, label, source.column, source.separator)


def find(name: str, options: PrepareOptions, *, quiet: bool = True) -> Found:
    """A file or folder of this machine, or else a dataset on the Hub, fetched at its commit.

    Raises:
        StorageError: The Hub does not answer, or not with this dataset.
        UsageError: There is nothing that can be read.
    """
    place, commit = Path(name).expanduser(), None
    on_hub = not place.exists()
    if on_hub and names_a_file(name):
        raise UsageError(
            f"{name}: no such file or folder; give one, or the id of a dataset on the Hub"
        )
    left: list[str] = []
    if on_hub:
        chosen, left, commit, place = _fetched(name, options.revision, quiet)
    elif place.is_dir():
        below = (file.relative_to(place) for file in place.rglob("*") if not file.is_dir())
        chosen, left = choose((file.as_posix() for file in below), name, several=False)
    elif format_of(name) is None:
        raise UsageError(
            f"{name}: is no parquet, jsonl or text file by its name; name it .parquet, .jsonl or "
            ".txt (the last two also with .gz or .zst)"
        )
    else:
        chosen = {TRAIN: [place.name]}
    files = [_described(place, each, split) for split in chosen for each in chosen[split]]
    source = Source(
        kind="hub" if on_hub else "local",
        name=name if on_hub else place.resolve().name,
        revision=commit,
        column=options.column,
        separator=options.separator,
        files=tuple(files),
    )
    return Found(source, place, left)


def _fetched(
    name: str, revision: str | None, quiet: bool
) -> tuple[dict[Split, list[str]], list[str], str, Path]:
    """What to read of a dataset on the Hub and what not, the commit, and the folder it is in.

    Token, address and cache are huggingface_hub's (HF_TOKEN, HF_ENDPOINT, HF_HOME).
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    from moeconv.hf.hub_address import read_address
    from moeconv.hf.hub_client import hub_client
    from moeconv.hf.hub_trouble import hub_trouble

    (disable_progress_bars if quiet else enable_progress_bars)()
    local: str | None = "file or folder"
    try:
        with hub_client(read_address(None)):
            info = HfApi().dataset_info(name, revision=revision)
        local = None  # there is such a dataset
        names = [file.rfilename for file in info.siblings or ()]
        chosen, left = choose(names, f"{name} on the Hub", several=True)
        wanted = [glob.escape(each) for found in chosen.values() for each in found]
        place = snapshot_download(
            name, repo_type="dataset", revision=info.sha, allow_patterns=wanted
        )
    except MoeconvError:
        raise
    except Exception as error:  # its transport's own errors have no stable name to catch
        raise StorageError(f"{name}: {hub_trouble(error, name, 'dataset', local)}") from error
    return chosen, left, info.sha, Path(place)


def choose(
    names: Iterable[str], source: str, *, several: bool
) -> tuple[dict[Split, list[str]], list[str]]:
    """Which files are read for which split, and which are not; hidden ones do not count.

    On the Hub the same may be there in `several` formats, of which one is read.

    Raises:
        UsageError: There is nothing to train on, or it is not clear what to read.
    """
    left = sorted(name for name in names if "/." not in f"/{name}")
    chosen = {}
    for split in SPLITS:
        told = [name for name in left if format_of(name) and split_of(name) == split]
        first = {format_of(name): name for name in reversed(told)}
        if len(first) > 1 and not several:
            raise UsageError(
                f"{source}: has files of several formats for {split} ({some(first.values())}); "
                "keep those that are to be read in a folder of their own"
            )
        best = next((format_ for format_ in _FORMATS.values() if format_ in first), None)
        chosen[split] = [name for name in told if format_of(name) == best]
        left = [name for name in left if name not in chosen[split]]
    if not chosen[TRAIN]:
        raise UsageError(f"{source}: has no parquet, jsonl or text file to train on")
    return chosen, left


def names_a_file(name: str) -> bool:
    """Whether a source is meant as a path, there or not: no dataset of the Hub is called so."""
    return name.startswith(("/", "./", "../", "~")) or format_of(name) is not None


def split_of(name: str) -> str:
    """The split that a file's name shows, by the Hub's rule: a word of its path, or train."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), TRAIN)


def _open(place: Path, name: str) -> BinaryIO:
    """A file that the user named, or one of a folder, which no link leads out of."""
    return open_inside(place, name) if place.is_dir() else open_regular(place)


def _described(place: Path, name: str, split: Split) -> SourceFile:
    try:
        with _open(place, name) as file:
            raw: Any = file  # a BufferedReader
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
            return SourceFile(path=name, size=file.tell(), digest=digest, split=split)
    except OSError as error:
        raise UsageError(f"{error.filename or place}: {error.strerror}") from None


def format_of(name: str) -> str | None:
    """The format that a file's name shows, compressed or not."""
    path = Path(name.lower())
    if path.suffix not in _COMPRESSIONS:
        return _FORMATS.get(path.suffix)
    suffix = Path(path.stem).suffix
    return None if suffix == ".parquet" else _FORMATS.get(suffix)


def _read_texts(stream: BinaryIO, name: str, column: str, separator: str) -> Iterator[str | None]:
    """The texts of a file, whose name shows the format, in order; None where there is none.

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
        texts = {
            field.name
            for field in file.schema_arrow
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        }
        if column not in texts:
            raise UsageError(
                f"{name}: has no column {column!r} of text; name one of {some(sorted(texts))} with "
                "--column"
            )
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=[column], use_threads=False):
            yield from batch.column(0).to_pylist()


def _json_lines(stream: IO[str], name: str, column: str) -> Iterator[str | None]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text: Any = json.loads(line)[column]
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{name}: line {number} is not JSON ({error})") from None
        except (LookupError, TypeError):
            text = False
        if text is not None and not isinstance(text, str):
            raise UsageError(
                f"{name}: line {number} is no object with a text {column!r}; name its field with "
                "--column"
            )
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
