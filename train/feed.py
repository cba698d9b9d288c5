"""Where a run's rows come from: prepared by us, or whatever MaxText itself is told to read."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from moeconv_train.data import DataSet, Progress, prepare_dataset
from moeconv_train.data.manifest import NAME, TOKENIZER, TRAIN, VALIDATION
from moeconv_train.data.records import LENGTHS, TOKENS, read_shard
from moeconv_train.settings import EMBEDDED, DataSettings
from moeconv_train.tokenizer import CORPUS, read_stories, save_tokenizer, train_tokenizer

from moeconv.errors import ConfigError, OutputError, UsageError
from moeconv.untrusted.files import read_inside

# Documents of the corpus that lie beside the run, for `moeconv verify`.
SAMPLED = 32
# Of the embedded corpus, which has 400 stories.
_EMBEDDED = {"separator": "\n\n", "validation_fraction": 0.05}


@dataclass(frozen=True)
class Feed:
    """The rows of a run.

    Attributes:
        kind: `prepared` by us, streamed from the Hub by MaxText (`hf`), or `maxtext`: anything
            else that its own settings name.
        settings: What is to be prepared.
        directory: Where the prepared rows lie or will lie.
        dataset: They, once they are there.
        named: The dataset on the Hub that MaxText's own `hf_path` names.
    """

    kind: Literal["prepared", "hf", "maxtext"]
    settings: DataSettings
    directory: Path | None = None
    dataset: DataSet | None = None
    named: str | None = None

    @property
    def packed(self) -> bool:
        """Whether rows are read by our stage, which masks by segments."""
        return self.kind == "prepared"

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The block in which MaxText makes its iterators."""
        return self.dataset.reading() if self.dataset else contextlib.nullcontext()


def find(
    config: Mapping[str, Any],
    given: Mapping[str, str],
    settings: DataSettings,
    output: Path,
    told: Collection[str] = (),
) -> Feed:
    """Decides, without reading anything but what is prepared already.

    Args:
        config: All MaxText settings.
        given: Those of the command line.
        settings: The run's `data` section.
        output: MaxText's base_output_directory.
        told: The `run.…` settings of the command line.

    Raises:
        ConfigError: What lies in the directory is no whole dataset.
        UsageError: Two settings name different data.
    """
    kind = config["dataset_type"]
    if kind == "hf":
        if not _named_by(("hf_path", "hf_train_files"), config, given, settings, told):
            return Feed("hf", settings)
        named = None if config["hf_train_files"] else str(config["hf_path"])
        return Feed("hf", settings.model_copy(update={"source": None}), named=named)
    if kind != "grain":
        return Feed("maxtext", settings)
    if _named_by(("grain_train_files",), config, given, settings, told):
        files = Path(str(config["grain_train_files"]))
        if not ((files.parent / NAME).is_file() and files.name.startswith(TRAIN)):
            return Feed("maxtext", settings)
        settings = settings.model_copy(update={"source": None})
        return Feed("prepared", settings, files.parent, DataSet.read(files.parent))
    if not (settings.source or settings.directory):
        raise UsageError(
            "there is no data to train on: set run.data.source (a dataset on the Hub, a local file "
            "or folder), run.data.directory (what moeconv data prepare wrote), or "
            "grain_train_files"
        )
    length = int(config["max_target_length"])
    directory = Path(settings.directory or output / "data" / _slug(settings, length))
    directory = directory.expanduser().absolute()
    there = (directory / NAME).exists() or not settings.source
    return Feed("prepared", settings, directory, DataSet.read(directory) if there else None)


def _named_by(
    keys: tuple[str, ...],
    config: Mapping[str, Any],
    given: Mapping[str, str],
    settings: DataSettings,
    told: Collection[str],
) -> bool:
    """Whether MaxText's own settings name the data; on the command line they win over a file's.

    Raises:
        UsageError: `run.data` names some too.
    """
    naming = [key for key in keys if config[key]]
    ours = [f"data.{key}" for key in ("source", "directory") if getattr(settings, key)]
    if not naming or not ours:
        return bool(naming)
    if any(key in given for key in naming) and not any(key in told for key in ours):
        return True
    raise UsageError(f"{naming[0]} and run.{ours[0]}: both name data; leave one of them out")


def _slug(settings: DataSettings, length: int) -> str:
    """A folder's name for a source, at this row length."""
    name = Path(str(settings.source)).name
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.').lower() or 'data'}-{length}"


def prepare(
    feed: Feed,
    length: int,
    *,
    progress: Callable[[Progress], None],
    note: Callable[[str], None],
    quiet: bool = True,
) -> Feed:
    """The same feed with its dataset, prepared now if it is not there.

    Raises:
        ConfigError: What is there was prepared from something else, or otherwise.
        MoeconvError: It cannot be prepared.
    """
    source, settings = feed.settings.source, feed.settings
    if feed.kind != "prepared" or feed.directory is None or source is None:
        return feed
    if feed.dataset is None:
        note(f"preparing {source} in {feed.directory} (once; docs/data.md)")
    with contextlib.ExitStack() as stack:
        if source == EMBEDDED:
            source, settings = str(CORPUS), settings.model_copy(update=_EMBEDDED)
        tokenizer = settings.tokenizer
        if tokenizer == EMBEDDED:
            tokenizer = str(stack.enter_context(embedded_tokenizer()))
        workers = (os.cpu_count() or 1) if source != str(CORPUS) else 0
        try:
            dataset = prepare_dataset(
                source,
                feed.directory,
                settings.options(length, tokenizer, workers),
                progress=progress,
                note=note if feed.dataset is None else lambda _: None,
                quiet=quiet,
            )
        except OutputError as error:
            if feed.dataset is None:
                raise
            reason = str(error).split(";")[0]
            raise ConfigError(f"{reason}; give another run.data.directory") from None
    return replace(feed, dataset=dataset)


@contextlib.contextmanager
def embedded_tokenizer() -> Iterator[Path]:
    """The tokenizer of the embedded corpus, learnt from it: the same bytes each time."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch, EMBEDDED)
        save_tokenizer(train_tokenizer(read_stories()), directory)
        yield directory


def hub_id(feed: Feed) -> str | None:
    """The dataset on the Hub that a run is trained on; a local path is nobody else's business."""
    if feed.dataset is not None:
        source = feed.dataset.manifest.request.source
        return source.name if source.kind == "hub" else None
    name = feed.named or (feed.settings.source if feed.kind == "hf" else None)
    return name if name and not Path(name).expanduser().exists() else None


def sample(feed: Feed) -> list[str]:
    """Some documents of the corpus, of its validation split if it has one."""
    if feed.dataset is None:
        return []
    from tokenizers import Tokenizer

    dataset = feed.dataset
    raw = read_inside(dataset.directory / TOKENIZER, "tokenizer.json")
    tokenizer = Tokenizer.from_buffer(raw)
    split = VALIDATION if dataset.counts(VALIDATION).rows else TRAIN
    found: list[str] = []
    for shard in dataset.shards(split):
        for row in read_shard(shard):
            for story in np.split(row[TOKENS], np.cumsum(row[LENGTHS])[:-1]):
                found.append(tokenizer.decode(story.tolist()).strip())
            if len(found) >= SAMPLED:
                return found[:SAMPLED]
    return found
