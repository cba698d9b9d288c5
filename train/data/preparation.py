"""`prepare_dataset`: stories from a source to tokenised shards and `data.json`, resumable.

While it works, OUT/.prepare holds the request, a lock and a receipt for each chunk that is done; a
shard counts only with its receipt. `data.json` comes last: without it there is no dataset.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moeconv_train.data import hub, journal, records, source, tokens
from moeconv_train.data.manifest import (
    NAME,
    SPLITS,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    Counts,
    DataSet,
    Manifest,
    Request,
    Shard,
    Source,
    TokenizerRecord,
)
from moeconv_train.data.packing import LAYOUTS, Layout, TooLong
from moeconv_train.data.work import Chunk, Crew, Job, Receipt, chunks, version

from moeconv.errors import MoeconvError, OutputError, UsageError

DEFAULT_SOURCE = "roneneldan/TinyStories"


@dataclass(frozen=True)
class PrepareOptions:
    """How stories become rows; every default is the reference run's.

    Attributes:
        tokenizer: `llama3`, a directory, a file of ranks, or a repository on the Hub.
        sequence_length: Positions of a row (`max_target_length`).
        layout: See docs/data.md.
        too_long: What becomes of a story that is longer than a row.
        splits: Split to glob of the source's files; without, names tell.
        validation_fraction: Share of the stories that is held out, where the source has no
            validation split.
        seed: Chooses them, and is MaxText's `data_shuffle_seed`.
        column: The texts' column or field.
        separator: What stands between the stories of a text file.
        revision: Commit, branch or tag of a dataset on the Hub.
        workers: Processes; 0 works in this one. The shards do not depend on it.
        shard_characters: Text that goes into one shard, about.
    """

    tokenizer: str = tokens.LLAMA3
    sequence_length: int = 2048
    layout: Layout = "packed"
    too_long: TooLong = "split"
    splits: Mapping[str, str] = field(default_factory=dict)
    validation_fraction: float = 0.01
    seed: int = 0
    column: str = "text"
    separator: str = "<|endoftext|>"
    revision: str | None = None
    workers: int = 0
    shard_characters: int = 1 << 25
    overwrite: bool = False


@dataclass
class Progress:
    """How far a preparation is; counts include what was done before it was interrupted."""

    files: int = 0
    of_files: int = 0
    stories: int = 0
    tokens: int = 0
    fresh_tokens: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Tokens a second of this process's own work."""
        return self.fresh_tokens / max(1e-6, time.monotonic() - self.begun)


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

    An interrupted preparation goes on with the chunks that are missing, and ends with the same
    bytes. A complete one is not read again: a dataset on the Hub stays at the commit it had.

    Args:
        name: A file or folder, or else the id of a dataset on the Hub.
        out: Becomes the dataset's directory.
        options: How.
        progress: Is told after each chunk.
        note: Takes sentences for people.
        quiet: Without the progress bars of downloads.

    Raises:
        UsageError: The options or the source are wrong.
        StorageError: The Hub does not give what is needed.
        TokenizerError: The tokenizer cannot be used.
        OutputError: `out` cannot be written, or holds something else.
    """
    _check(options)
    out = out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (out / NAME).exists() and not options.overwrite:
            # Nothing is written, so it may lie where nothing can be, as Kaggle's inputs do.
            return _prepare(name, out, options, progress, note, quiet)
        with journal.locked(out):
            if options.overwrite:
                journal.clear(out)
            return _prepare(name, out, options, progress, note, quiet)
    except MoeconvError:
        with contextlib.suppress(OSError):
            out.rmdir()  # only if nothing was put there
        raise
    except OSError as error:
        raise OutputError(
            f"{error.filename or out}: cannot be written or read ({error.strerror or error})"
        ) from error


def _check(options: PrepareOptions) -> None:
    if options.layout not in LAYOUTS:
        raise UsageError(f"--layout: {options.layout!r} is none of {', '.join(LAYOUTS)}")
    if options.sequence_length < 2:
        raise UsageError("--seq-length: a row needs at least 2 tokens")
    if not 0 <= options.validation_fraction < 1:
        raise UsageError("--validation-fraction: must be from 0 to below 1")
    if options.workers < 0:
        raise UsageError("--workers: must be 0 or more")
    if options.shard_characters < 1:
        raise UsageError("--shard-characters: must be 1 or more")
    if not options.separator:
        raise UsageError("--separator: must not be empty")
    if wrong := set(options.splits) - set(SPLITS):
        raise UsageError(f"--split: {min(wrong)!r} is neither train nor validation")


def _prepare(
    name: str,
    out: Path,
    options: PrepareOptions,
    progress: Callable[[Progress], None],
    note: Callable[[str], None],
    quiet: bool,
) -> DataSet:
    places: dict[str, Path] | None = None
    found: Source | None = None
    if Path(name).expanduser().exists():
        found, places = source.local_source(
            Path(name).expanduser(),
            column=options.column,
            separator=options.separator,
            patterns=options.splits,
        )
    if (out / NAME).exists():
        return _existing(out, name, options, found, note)
    before = journal.interrupted(out)
    if found is None and before is not None and _goes_on(before.source, name, options):
        found = before.source
    if found is None and source.names_a_file(name):
        raise UsageError(
            f"{name}: no such file or folder; give one, or the id of a dataset on the Hub"
        )
    if found is None:
        found = hub.hub_source(
            name,
            revision=options.revision,
            column=options.column,
            separator=options.separator,
            patterns=options.splits,
        )
    tokenizer = tokens.load(options.tokenizer, options.layout)
    for text in tokenizer.notes:
        note(text)
    split_off = not any(file.split == VALIDATION for file in found.files)
    if split_off and options.validation_fraction:
        note(
            f"{found.name}: has no validation split; holding out "
            f"{options.validation_fraction:.2%} of the stories (--validation-fraction)"
        )
    request = Request(
        source=found,
        tokenizer=TokenizerRecord(
            source=Path(tokenizer.source).name
            if Path(tokenizer.source).exists()
            else tokenizer.source,
            digest=tokenizer.digest,
            size=tokenizer.size,
            bos_token_id=tokenizer.bos,
            eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.pad,
        ),
        layout=options.layout,
        sequence_length=options.sequence_length,
        too_long=options.too_long,
        validation_fraction=options.validation_fraction if split_off else 0.0,
        seed=options.seed,
        shard_characters=options.shard_characters,
    )
    if journal.begin(out, request):
        note(f"{out}: going on with an interrupted preparation")
    for split in SPLITS:
        if paths := [file.path for file in found.files if file.split == split]:
            rest = f" … {paths[-1]} ({len(paths)} files)" if len(paths) > 1 else ""
            note(f"{split}: {paths[0]}{rest}")
    for file, content in tokenizer.files.items():
        records.write_bytes(out / TOKENIZER / file, content)
    job = Job(out, out / journal.JOURNAL, request, tokenizer)
    shards = _work(job, places, options.workers, progress, quiet)
    splits = {
        split: sum((s.counts for s in shards if s.split == split), Counts()) for split in SPLITS
    }
    if not splits[TRAIN].rows:
        raise UsageError(f"{name}: holds no story to train on")
    if not splits[VALIDATION].rows:
        note(f"{name}: no story is left for validation, so there is no such split")
    manifest = Manifest(moeconv_version=version(), request=request, splits=splits, shards=shards)
    records.write_bytes(out / NAME, (manifest.model_dump_json(indent=1) + "\n").encode())
    shutil.rmtree(out / journal.JOURNAL)
    return DataSet.read(out)


def _work(
    job: Job,
    places: Mapping[str, Path] | None,
    workers: int,
    progress: Callable[[Progress], None],
    quiet: bool,
) -> tuple[Shard, ...]:
    """Does every chunk that has no receipt; gives the shards of all, in the source's order."""
    found = job.request.source
    receipts: dict[str, Receipt] = {}
    state = Progress(of_files=len(found.files))
    downloads = job.receipts / "download"
    open_chunks: dict[int, set[int]] = {}
    read: set[int] = set()

    def settle(file: int) -> None:
        """Once all of a file is on disk as shards, it is not needed again."""
        if file in read and not open_chunks[file]:
            count = sum(key.startswith(f"{file:04d}-") for key in receipts)
            records.write_bytes(job.receipts / f"{file:04d}.done", str(count).encode())
            if places is None:
                shutil.rmtree(downloads / str(file), ignore_errors=True)
            state.files += 1
            progress(state)

    def done(chunk: Chunk, receipt: Receipt, *, fresh: bool) -> None:
        receipts[chunk.name] = receipt
        made = sum(shard.counts.tokens for shard in receipt.shards)
        state.stories += receipt.stories_read
        state.tokens += made
        state.fresh_tokens += made * fresh
        progress(state)
        open_chunks[chunk.file].discard(chunk.number)
        settle(chunk.file)

    with Crew(job, workers) as crew:
        for index, file in enumerate(found.files):
            open_chunks[index] = set()
            if (kept := journal.finished(job, index)) is not None:
                for number, receipt in enumerate(kept):
                    done(Chunk(index, number, 0, ()), receipt, fresh=False)
                state.files += 1
                progress(state)
                continue
            if places is not None:
                path = places[file.path]
            else:
                path = hub.fetch(found, file, downloads / str(index), quiet=quiet)
            texts = source.read_texts(path, column=found.column, separator=found.separator)
            for chunk in chunks(index, texts, job.request.shard_characters):
                open_chunks[index].add(chunk.number)
                if (old := journal.receipt(job, chunk.name)) is not None:
                    done(chunk, old, fresh=False)
                    continue
                for finished, receipt in crew.give(chunk):
                    done(finished, receipt, fresh=True)
            read.add(index)
            settle(index)
        for finished, receipt in crew.rest():
            done(finished, receipt, fresh=True)
    ordered = [shard for key in sorted(receipts) for shard in receipts[key].shards]
    return tuple(sorted(ordered, key=lambda shard: shard.name))


def _existing(
    out: Path,
    name: str,
    options: PrepareOptions,
    found: Source | None,
    note: Callable[[str], None],
) -> DataSet:
    """What was prepared before, if it is what is asked for now."""
    dataset = DataSet.read(out)
    request = dataset.manifest.request
    asked = {
        "source": (found.name if found else name, request.source.name),
        "layout": (options.layout, request.layout),
        "sequence_length": (options.sequence_length, request.sequence_length),
        "too_long": (options.too_long, request.too_long),
        "seed": (options.seed, request.seed),
        "column": (options.column, request.source.column),
    }
    if found is not None:
        asked["content of the source"] = (found, request.source)
    elif options.revision is not None:
        asked["revision"] = (options.revision, request.source.revision or "")
    tokenizer = options.tokenizer
    if tokenizer == tokens.LLAMA3 or Path(tokenizer).exists():
        digest = tokens.load(tokenizer, options.layout).digest
        asked["tokenizer"] = (digest, request.tokenizer.digest)
    else:
        asked["tokenizer"] = (tokenizer, request.tokenizer.source)
    if not any(file.split == VALIDATION for file in request.source.files):
        asked["validation_fraction"] = (options.validation_fraction, request.validation_fraction)
    if other := [field_ for field_, (now, then) in asked.items() if now != then]:
        raise OutputError(
            f"{out}: holds data that was prepared with another {', '.join(other)}; "
            "choose another --out, or pass --overwrite"
        )
    note(f"{out}: is prepared already")
    return dataset


def _goes_on(before: Source, name: str, options: PrepareOptions) -> bool:
    """Whether a dataset on the Hub is to be read on at the commit it was begun at."""
    same = (before.kind, before.name, before.column) == ("hub", name, options.column)
    return same and not options.splits and options.revision in (None, before.revision)
