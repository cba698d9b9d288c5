"""`data.json`: what a prepared dataset holds, how it was made, and how MaxText is to read it."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeconv_train.words import first_line
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moeconv.errors import ConfigError
from moeconv.printing import Printable
from moeconv.sizes import format_size
from moeconv.untrusted.files import open_inside, read_inside

NAME = "data.json"
TOKENIZER = "tokenizer"
Split = Literal["train", "validation"]
TRAIN: Split = "train"
VALIDATION: Split = "validation"
SPLITS = (TRAIN, VALIDATION)

_ANEW = "remove the folder and prepare the data anew"


class Record(BaseModel):
    """Read and written whole: nothing unknown, nothing changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StoryOptions(Record):
    """Which stories are taken, and with which tokenizer (`moeconv data prepare --help`)."""

    tokenizer: str = "llama3"
    column: str = "text"
    separator: str = "<|endoftext|>"
    revision: str | None = None
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    seed: int = 0


class PrepareOptions(StoryOptions):
    """How they become rows and shards; by default as the reference run's."""

    sequence_length: int = Field(2048, ge=2)
    shard_characters: int = 1 << 25  # text that goes into a shard, about


class SourceFile(Record):
    """A file that was read, with what distinguishes it from any other content."""

    path: str
    size: int | None
    digest: str | None
    split: Split


class Source(Record):
    """Where the stories came from; a local source by its name only."""

    kind: Literal["hub", "local"]
    name: str
    revision: str | None
    column: str
    separator: str
    files: tuple[SourceFile, ...]


class TokenizerRecord(Record):
    """The tokenizer: `digest` is the SHA-256 of its tokenizer.json, which lies beside the data."""

    source: str
    digest: str
    size: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


class Request(Record):
    """All that decides the bytes of the shards."""

    source: Source
    tokenizer: TokenizerRecord
    layout: Literal["packed"] = "packed"  # 0.1.0 had others
    sequence_length: int
    too_long: Literal["split", "truncate"] = "split"  # 0.1.0 had both
    validation_fraction: float
    seed: int
    shard_characters: int


class Counts(Record):
    """What is in a shard or a split."""

    rows: int = 0
    stories: int = 0  # without the empty ones
    tokens: int = 0  # of the stories, BOS and EOS counted
    targets: int = 0  # positions that count in the loss, once an epoch
    cut: int = 0  # stories longer than a row
    dropped: int = 0  # tokens that 0.1.0 left out where it truncated them
    empty: int = 0  # texts that were null or white space


def total(counts: Iterable[Counts]) -> Counts:
    """Their sum."""
    every = [each.model_dump() for each in counts]
    return Counts(**{name: sum(each[name] for each in every) for name in Counts.model_fields})


class Shard(Record):
    """One ArrayRecord file."""

    name: str
    split: Split
    bytes: int
    sha256: str
    counts: Counts


class Manifest(Record):
    """The whole of `data.json`."""

    format: Literal["moeconv-data"] = "moeconv-data"
    version: Literal[1] = 1
    moeconv_version: str
    request: Request
    splits: dict[str, Counts]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class DataSet(Printable):
    """A prepared dataset on disk."""

    directory: Path
    manifest: Manifest

    @classmethod
    def read(cls, directory: Path) -> "DataSet":
        """Opens what `prepare` wrote, checking that every shard is there in its full size.

        Raises:
            ConfigError: There is no whole dataset.
        """
        path = directory / NAME
        try:
            manifest = Manifest.model_validate_json(read_inside(directory, NAME))
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(
                f"{directory}: no prepared dataset, as it has no {NAME}; "
                "run moeconv data prepare --out with it"
            ) from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            raise ConfigError(f"{path}: {first_line(error)}; {_ANEW}") from None
        for shard in manifest.shards:
            try:
                with open_inside(directory, shard.name) as file:
                    if os.fstat(file.fileno()).st_size == shard.bytes:
                        continue
                reason = f"has not the {shard.bytes} bytes that {NAME} says"
            except OSError as error:
                reason = str(error.strerror)
            raise ConfigError(f"{directory / shard.name}: {reason}; {_ANEW}")
        named = {shard.name for shard in manifest.shards}
        # MaxText reads whatever has such a name.
        if strange := sorted({file.name for file in directory.glob("*.array_record")} - named):
            raise ConfigError(f"{directory / strange[0]}: {NAME} does not name it; remove it")
        return cls(directory, manifest)

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv data prepare --json` prints: all of data.json but the shards, and more."""
        return {
            "out": str(self.directory),
            "digest": self.digest,
            **self.manifest.model_dump(mode="json", exclude={"shards"}),
            "fill": {split: self.fill(split) for split in self.manifest.splits},
            "shards": len(self.manifest.shards),
            "bytes": self._bytes(),
            "overrides": self.overrides(),
        }

    def parts(self) -> Iterator[str]:
        """What `moeconv data prepare` prints."""
        request = self.manifest.request
        yield (
            f"{self.directory}: rows of {request.sequence_length} tokens, "
            f"{len(self.manifest.shards)} shards, {format_size(self._bytes())}"
        )
        for split, counts in self.manifest.splits.items():
            if not counts.rows:
                continue
            line = (
                f"{split}: {counts.stories:,} stories, {counts.tokens:,} tokens in {counts.rows:,} "
                f"rows, {self.fill(split):.2%} of the positions are targets"
            )
            if counts.cut:
                line += f"; {counts.cut:,} stories were longer than a row"
            if counts.empty:
                line += f"; {counts.empty:,} empty ones left out"
            yield line
        yield (
            f"one epoch is {self.steps_for_epochs(1, 8):,} steps of 8 rows, two are "
            f"{self.steps_for_epochs(2, 8):,}; vocab_size must be at least {request.tokenizer.size}"
        )

    def _bytes(self) -> int:
        return sum(shard.bytes for shard in self.manifest.shards)

    @property
    def digest(self) -> str:
        """One SHA-256 over how the data was made and every shard's, the same on every machine."""
        request = self.manifest.request.model_dump(mode="json")
        shards = [(shard.name, shard.sha256) for shard in self.manifest.shards]
        content = json.dumps([request, shards], sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()

    def counts(self, split: str = TRAIN) -> Counts:
        """What a split holds; zeros if there is none."""
        return self.manifest.splits.get(split, Counts())

    def fill(self, split: str = TRAIN) -> float:
        """The share of a split's positions that count in the loss."""
        counts = self.counts(split)
        return counts.targets / max(1, counts.rows * self.manifest.request.sequence_length)

    def overrides(self) -> dict[str, str]:
        """The MaxText settings that read this dataset; the rows' order is fixed by the seed."""
        request = self.manifest.request
        settings = {
            "dataset_type": "grain",
            "grain_file_type": "arrayrecord",
            "grain_train_files": str(self.directory / f"{TRAIN}-*.array_record"),
            "grain_worker_count": "0",
            "grain_worker_count_eval": "0",
            "tokenizer_type": "huggingface",
            "tokenizer_path": str(self.directory / TOKENIZER),
            "tokenize_train_data": "false",
            "tokenize_eval_data": "false",
            "packing": "false",
            "max_target_length": str(request.sequence_length),
            "enable_data_shuffling": "true",
            "data_shuffle_seed": str(request.seed),
        }
        if self.counts(VALIDATION).rows:
            settings["grain_eval_files"] = str(self.directory / f"{VALIDATION}-*.array_record")
        return settings

    def check(self, *, max_target_length: int, vocab_size: int) -> None:
        """Refuses a model that these rows do not fit.

        Raises:
            ConfigError: Rows are of another length, or some token has no row in the embedding:
                MaxText then reads the last row for it and gives it no loss, and says nothing.
        """
        request = self.manifest.request
        if max_target_length != request.sequence_length:
            raise ConfigError(
                f"{self.directory}: has rows of {request.sequence_length} tokens and "
                f"max_target_length is {max_target_length}; "
                f"prepare the data with --seq-length {max_target_length}"
            )
        if vocab_size < request.tokenizer.size:
            raise ConfigError(
                f"{self.directory}: its tokenizer has {request.tokenizer.size} ids and vocab_size "
                f"is {vocab_size}; train with vocab_size={request.tokenizer.size}"
            )

    def steps_for_epochs(self, epochs: int, global_batch: int) -> int:
        """The steps in which every training row is seen exactly `epochs` times.

        The last of them may hold rows of padding, which count for nothing. A run of more steps
        would end early and without its last checkpoint.
        """
        return -(-epochs * self.counts(TRAIN).rows // global_batch)

    def shards(self, split: str) -> Iterator[Path]:
        """The files of a split, in the order in which they are read."""
        for shard in self.manifest.shards:
            if shard.split == split:
                yield self.directory / shard.name
