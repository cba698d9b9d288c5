"""`prepare_dataset`: stories from a source to tokenised shards and `data.json`."""

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeconv_train.data import folder, records, source, tokens
from moeconv_train.data.manifest import (
    NAME,
    SPLITS,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    Counts,
    DataSet,
    Manifest,
    Record,
    Request,
    Shard,
    Source,
    TokenizerRecord,
)
from moeconv_train.data.options import PrepareOptions
from moeconv_train.data.work import Chunk, Job, chunks, write_all

from moeconv.errors import OutputError, UsageError
from moeconv.untrusted.text import printable

DEFAULT_SOURCE = "roneneldan/TinyStories"


@dataclass
class Progress:
    """How far a preparation is."""

    files: int = 0
    of_files: int = 0
    stories: int = 0
    tokens: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(1e-6, time.monotonic() - self.begun)


def _ignore(_: object) -> None:
    pass


def prepare_dataset(
    name: str,
    out: Path,
    options: PrepareOptions,
    *,
    progress: Callable[[Progress], None] = _ignore,
    note: Callable[[str], None] = _ignore,
    quiet: bool = True,
) -> DataSet:
    """Prepares a dataset in `out`, or opens it where the same was prepared before.

    A dataset on the Hub stays at the commit that it was prepared from.

    Args:
        name: A file or folder, or else the id of a dataset on the Hub.
        out: Becomes the dataset's directory.
        options: How.
        progress: Is told after each shard.
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
        if (out / NAME).exists() and not options.overwrite:
            dataset = _existing(name, out, options)
            note(f"{out}: is prepared already")
            return dataset
        folder.check(out, overwrite=options.overwrite)
        found = source.find(name, options, quiet=quiet)
        tokenizer = tokens.load(options.tokenizer)
        request = _request(found.source, _record(tokenizer), options)
        for text in (*tokenizer.notes, *_remarks(found, request)):
            note(text)
        with folder.becoming(out, overwrite=options.overwrite) as new:
            job = Job(new, request, tokenizer)
            manifest = _write(job, found, options.workers, progress)
            local = found.source.kind == "local"
            if local and source.find(name, options).source != found.source:
                raise UsageError(f"{name}: changed while it was read; run again once it is whole")
            if not manifest.splits[TRAIN].rows:
                raise UsageError(f"{name}: holds no story to train on")
            records.write_bytes(new / NAME, (manifest.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(
            f"{error.filename or out}: cannot be written or read ({error.strerror or error})"
        ) from error
    if not manifest.splits[VALIDATION].rows:
        note(f"{name}: no story is left for validation, so there is no such split")
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
        tokenizer = _record(tokens.load(options.tokenizer))
    asked = _request(now, tokenizer, options)
    if other := _differences(asked, then):
        if "source" in other:
            other[0] = f"source ({', '.join(_differences(asked.source, then.source))})"
        raise OutputError(
            f"{out}: holds data that was prepared with another {', '.join(other)}; "
            "choose another --out, or pass --overwrite"
        )
    return dataset


def _differences[R: Record](one: R, other: R) -> list[str]:
    return [key for key in type(one).model_fields if getattr(one, key) != getattr(other, key)]


def _write(
    job: Job, found: source.Found, workers: int, progress: Callable[[Progress], None]
) -> Manifest:
    """Writes tokenizer and shards."""
    request, files = job.request, job.request.source.files
    for file, content in job.tokenizer.files.items():
        records.write_bytes(job.folder / TOKENIZER / file, content)

    def texts() -> Iterator[Chunk]:
        for index, file in enumerate(files):
            yield from chunks(index, found.texts(file), request.shard_characters)

    state = Progress(of_files=len(files))
    shards: list[Shard] = []
    for state.files, shard in write_all(job, texts(), workers):
        shards.append(shard)
        state.stories += shard.counts.stories
        state.tokens += shard.counts.tokens
        progress(state)
    state.files = state.of_files
    progress(state)
    counts = {
        split: sum((s.counts for s in shards if s.split == split), Counts()) for split in SPLITS
    }
    return Manifest(
        moeconv_version=importlib.metadata.version("moeconv"),
        request=request,
        splits=counts,
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
    )


def _record(tokenizer: tokens.DataTokenizer) -> TokenizerRecord:
    """A tokenizer; of a local one the name only."""
    path = Path(tokenizer.source)
    return TokenizerRecord(
        source=path.name if path.exists() else tokenizer.source,
        digest=tokenizer.digest,
        size=tokenizer.size,
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )


def _request(found: Source, tokenizer: TokenizerRecord, options: PrepareOptions) -> Request:
    split_off = not any(file.split == VALIDATION for file in found.files)
    return Request(
        source=found,
        tokenizer=tokenizer,
        sequence_length=options.sequence_length,
        too_long=options.too_long,
        validation_fraction=options.validation_fraction if split_off else 0.0,
        seed=options.seed,
        shard_characters=options.shard_characters,
    )


def _remarks(found: source.Found, request: Request) -> Iterator[str]:
    """What is read and what is not, for people."""
    for split in SPLITS:
        if names := [file.path for file in found.source.files if file.split == split]:
            yield printable(f"{split}: {', '.join(names[:3])}") + _more(names[3:])
    if found.left:
        yield printable(f"not read: {', '.join(found.left[:3])}") + _more(found.left[3:])
    if request.validation_fraction:
        yield (
            f"{found.source.name}: has no validation split; holding out "
            f"{request.validation_fraction:.2%} of the stories (--validation-fraction)"
        )


def _more(rest: Sequence[str]) -> str:
    return f" and {len(rest)} more" if rest else ""
