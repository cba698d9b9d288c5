"""`prepare_dataset`: stories from a source to tokenised shards and `data.json`."""

import contextlib
import hashlib
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from moeconv_train.data import records, source, tokens
from moeconv_train.data.manifest import (
    NAME,
    SPLITS,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    Counts,
    DataSet,
    Manifest,
    PrepareOptions,
    Request,
    Shard,
    Source,
    Split,
    TokenizerRecord,
    total,
)
from moeconv_train.data.packing import pack

from moeconv.errors import OutputError, UsageError
from moeconv.untrusted.text import printable


def prepare_dataset(
    name: str,
    out: Path,
    options: PrepareOptions,
    *,
    progress: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    quiet: bool = True,
) -> DataSet:
    """Prepares a dataset in `out`, or opens it where the same was prepared before.

    A dataset on the Hub stays at the commit that it was prepared from.

    Args:
        name: A file or folder, or else the id of a dataset on the Hub.
        out: Becomes the dataset's directory.
        options: How.
        progress: Is called with the progress, as a sentence, after each chunk.
        note: Takes sentences for people.
        quiet: Without the progress bars of downloads.

    Raises:
        UsageError: The source is wrong.
        StorageError: The Hub does not give what is needed.
        TokenizerError: The tokenizer cannot be used.
        OutputError: `out` cannot be written, or holds something else.
    """
    out = out.absolute()
    try:
        # Nothing is written, so it may lie where nothing can be, as Kaggle's inputs do.
        if (out / NAME).exists():
            return _existing(name, out, options)
        if out.exists() and (there := sorted(file.name for file in out.iterdir())):
            raise OutputError(
                f"{out}: is not empty (it holds {there[0]}); choose a new or empty folder"
            )
        found = source.find(name, options, quiet=quiet)
        tokenizer = tokens.load(options.tokenizer)
        request = _request(found.source, tokenizer.record, options)
        for text in tokenizer.notes:
            note(text)
        if found.left:
            note(printable(f"not read: {source.some(found.left)}"))
        if request.validation_fraction:
            note(
                f"{name}: has no validation split; holding out {request.validation_fraction:.2%} "
                "of the stories (--validation-fraction)"
            )
        with _becoming(out) as new:
            for file, content in tokenizer.files.items():
                records.write_bytes(new / TOKENIZER / file, content)
            shards = _shards(new, request, tokenizer, found, progress)
            if found.source.kind == "local" and source.find(name, options).source != found.source:
                raise UsageError(f"{name}: changed while it was read; run again once it is whole")
            if not any(shard.split == TRAIN for shard in shards):
                raise UsageError(f"{name}: holds no story to train on")
            manifest = Manifest(
                moeconv_version=importlib.metadata.version("moeconv"),
                request=request,
                splits={
                    s: total(each.counts for each in shards if each.split == s) for s in SPLITS
                },
                shards=tuple(sorted(shards, key=lambda shard: shard.name)),
            )
            records.write_bytes(new / NAME, (manifest.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(
            f"{error.filename or out}: cannot be written or read ({error.strerror or error})"
        ) from error
    return DataSet.read(out)


def _existing(name: str, out: Path, options: PrepareOptions) -> DataSet:
    """What was prepared before, if it is what is asked for now."""
    dataset = DataSet.read(out)
    then = dataset.manifest.request
    if Path(name).expanduser().exists():
        now = source.find(name, options).source
    else:  # gone since then, or on the Hub, which is not asked
        is_path = source.names_a_file(name) or "/" not in name
        same = {
            "name": Path(name).name if is_path and then.source.kind == "local" else name,
            "column": options.column,
            "revision": options.revision or then.source.revision,
        }
        now = then.source.model_copy(update=same)
    tokenizer = then.tokenizer
    if options.tokenizer != tokenizer.source or Path(options.tokenizer).exists():
        tokenizer = tokens.load(options.tokenizer).record
    asked = _request(now, tokenizer, options)
    other = [key for key in Request.model_fields if getattr(asked, key) != getattr(then, key)]
    if other:
        raise OutputError(
            f"{out}: holds data that was prepared with another {', '.join(other)}; choose another "
            "folder, or remove it"
        )
    return dataset


@contextlib.contextmanager
def _becoming(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which becomes it when the block ends well and else is removed.

    Raises:
        OSError: It cannot be written, or is not empty by now.
    """
    out = out.resolve()  # what a link leads to
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        new = Path(work, "new")
        new.mkdir()
        yield new
        records.flush(new)
        new.rename(out)
        records.flush(out.parent)


def _shards(
    folder: Path,
    request: Request,
    tokenizer: tokens.DataTokenizer,
    found: source.Found,
    progress: Callable[[str], None],
) -> list[Shard]:
    """Writes them: of each chunk of texts one for each split that it has stories of."""
    files, begun = request.source.files, time.monotonic()
    shards: list[Shard] = []
    for index, file in enumerate(files):
        for number, chunk in enumerate(_chunks(found.texts(file), index, request)):
            for split in SPLITS:
                texts = [text for home, text in chunk if home == split]
                if stories := [text for text in texts if text and text.strip()]:
                    # The name sorts as the source is ordered.
                    path = folder / f"{split}-{index:04d}-{number:05d}.array_record"
                    encoded, empty = tokenizer.encode(stories), len(texts) - len(stories)
                    shards.append(_shard(path, split, encoded, empty, request))
            now = total(shard.counts for shard in shards)
            progress(
                f"file {index + 1} of {len(files)}: {now.stories:,} stories, {now.tokens:,} tokens "
                f"({now.tokens / (time.monotonic() - begun):,.0f} tokens/s)"
            )
    return shards


def _chunks(
    texts: Iterable[str | None], file: int, request: Request
) -> Iterator[list[tuple[Split, str | None]]]:
    """A file's texts, each with its split, in chunks that end once the size of a shard is reached.

    Of the train files some are held out for validation, where nothing else is for that.
    """
    held: list[tuple[Split, str | None]] = []
    size = 0
    for number, text in enumerate(texts):
        key = f"{request.seed}:{file}:{number}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64
        home = request.source.files[file].split
        held.append((VALIDATION if drawn < request.validation_fraction else home, text))
        size += len(text or "")
        if size >= request.shard_characters:
            yield held
            held, size = [], 0
    if held:
        yield held


def _shard(
    path: Path, split: Split, stories: list[np.ndarray], empty: int, request: Request
) -> Shard:
    rows = pack(stories, request.sequence_length)
    records.write_shard(path, rows)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = sum(map(len, stories))
    return Shard(
        name=path.name,
        split=split,
        bytes=path.stat().st_size,
        sha256=digest,
        counts=Counts(
            rows=len(rows),
            stories=len(stories),
            tokens=size,
            targets=size - len(stories),  # all but BOS
            cut=sum(len(story) - 1 > request.sequence_length for story in stories),
            empty=empty,
        ),
    )


def _request(found: Source, tokenizer: TokenizerRecord, options: PrepareOptions) -> Request:
    split_off = not any(file.split == VALIDATION for file in found.files)
    kept = options.model_dump(include={"sequence_length", "seed", "shard_characters"})
    fraction = options.validation_fraction if split_off else 0.0
    return Request(source=found, tokenizer=tokenizer, validation_fraction=fraction, **kept)
