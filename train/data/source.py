"""Where stories come from: parquet, JSON-lines and text files, here or on the Hub."""

import fnmatch
import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moeconv_train.data.formats import FORMATS, format_of, read_texts, some
from moeconv_train.data.manifest import SPLITS, TRAIN, VALIDATION, Source, SourceFile
from moeconv_train.data.options import PrepareOptions

from moeconv.errors import MoeconvError, StorageError, UsageError
from moeconv.untrusted.files import open_inside, open_regular

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
    left: tuple[str, ...]  # files that are not read

    def texts(self, file: SourceFile) -> Iterator[str | None]:
        """The texts of a file, in order; None where there is none.

        Raises:
            UsageError: It cannot be read, or has no texts under that column.
        """
        source = self.source
        label = str(self.place / file.path if self.place.is_dir() else self.place)
        if source.kind == "hub":
            label = f"{source.name}: {file.path}"
        with _open(self.place, file.path) as stream:
            yield from read_texts(stream, label, column=source.column, separator=source.separator)


def find(name: str, options: PrepareOptions, *, quiet: bool = True) -> Found:
    """A file or folder of this machine, or else a dataset on the Hub, fetched at its commit.

    Raises:
        StorageError: The Hub does not answer, or not with this dataset.
        UsageError: There is nothing that can be read.
    """
    patterns = options.splits
    place, commit = Path(name).expanduser(), None
    on_hub = not place.exists()
    if on_hub and names_a_file(name):
        raise UsageError(
            f"{name}: no such file or folder; give one, or the id of a dataset on the Hub"
        )
    if on_hub:
        names, chosen, commit, place = _fetched(name, options, quiet)
    elif place.is_dir():
        below = [file.relative_to(place) for file in place.rglob("*") if not file.is_dir()]
        names = _shown(file.as_posix() for file in below)
        chosen = choose(names, patterns, name, several=False)
    elif format_of(name) is None:
        raise UsageError(
            f"{name}: is no parquet, jsonl or text file by its name; name it .parquet, .jsonl or "
            ".txt (the last two also with .gz or .zst)"
        )
    else:
        names = [place.name]
        chosen = {TRAIN: names}
    files = [_described(place, each, split) for split in SPLITS for each in chosen.get(split, ())]
    source = Source(
        kind="hub" if on_hub else "local",
        name=name if on_hub else place.resolve().name,
        revision=commit,
        column=options.column,
        separator=options.separator,
        files=tuple(files),
    )
    return Found(source, place, tuple(sorted({*names}.difference(*chosen.values()))))


def _fetched(
    name: str, options: PrepareOptions, quiet: bool
) -> tuple[list[str], dict[str, list[str]], str, Path]:
    """All files of a dataset on the Hub, those to read, the commit, and the folder they are in.

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
            info = HfApi().dataset_info(name, revision=options.revision)
        local = None  # there is such a dataset
        names = _shown(file.rfilename for file in info.siblings or ())
        chosen = choose(names, options.splits, f"{name} on the Hub", several=True)
        wanted = [glob.escape(each) for found in chosen.values() for each in found]
        place = snapshot_download(
            name, repo_type="dataset", revision=info.sha, allow_patterns=wanted
        )
    except MoeconvError:
        raise
    except Exception as error:  # its transport's own errors have no stable name to catch
        raise StorageError(f"{name}: {hub_trouble(error, name, 'dataset', local)}") from error
    return names, chosen, info.sha, Path(place)


def _shown(names: Iterable[str]) -> list[str]:
    """The names that are not hidden."""
    return [name for name in names if "/." not in f"/{name}"]


def choose(
    names: Iterable[str], patterns: Mapping[str, str], source: str, *, several: bool
) -> dict[str, list[str]]:
    """Which files are read for which split, in the order of their names.

    Without `patterns` (split to glob) their names tell format and split. On the Hub the same may be
    there in `several` formats, of which one is read.

    Raises:
        UsageError: Nothing can be read, a pattern matches nothing, or it is not clear what to read.
    """
    readable = sorted(name for name in names if format_of(name))
    chosen = {split: fnmatch.filter(readable, glob_) for split, glob_ in patterns.items()}
    for split, found in chosen.items():
        if not found:
            raise UsageError(
                f"{source}: --split {split}={patterns[split]} matches no parquet, jsonl or text "
                f"file; there are {some(readable)}"
            )
    if both := {*chosen.get(TRAIN, ())} & {*chosen.get(VALIDATION, ())}:
        raise UsageError(f"{source}: --split takes {min(both)} for train and for validation")
    for split in () if patterns else SPLITS:
        told = [name for name in readable if split_of(name) == split]
        formats = [f for f in FORMATS if any(format_of(name) == f for name in told)]
        if len(formats) > 1 and not several:
            kinds = [next(name for name in told if format_of(name) == f) for f in formats]
            raise UsageError(
                f"{source}: has files of several formats for {split} ({some(kinds)}); say which "
                f"to read, such as --split {split}='*{Path(kinds[0]).suffix}', or '*' for all"
            )
        chosen[split] = [name for name in told if format_of(name) in formats[:1]]
    if not chosen.get(TRAIN):
        there = f"; there are {some(readable)}, name them with --split train=GLOB"
        raise UsageError(
            f"{source}: has no parquet, jsonl or text file to train on{there * bool(readable)}"
        )
    return chosen


def names_a_file(name: str) -> bool:
    """Whether a source is meant as a path, there or not: no dataset of the Hub is called so."""
    return name.startswith(("/", "./", "../", "~")) or format_of(name) is not None


def split_of(name: str) -> str:
    """The split that a file's name tells, as the Hub does it: a word of its path, or train."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), TRAIN)


def _open(place: Path, name: str) -> BinaryIO:
    """A file that the user named, or one of a folder, which no link leads out of."""
    return open_inside(place, name) if place.is_dir() else open_regular(place)


def _described(place: Path, name: str, split: Any) -> SourceFile:
    try:
        with _open(place, name) as file:
            raw: Any = file  # a BufferedReader
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
            return SourceFile(path=name, size=file.tell(), digest=digest, split=split)
    except OSError as error:
        raise UsageError(f"{error.filename or place}: {error.strerror}") from None
