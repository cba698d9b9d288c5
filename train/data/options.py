"""How data are prepared."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moeconv_train.data.manifest import SPLITS
from moeconv_train.data.packing import TooLong
from moeconv_train.data.tokens import LLAMA3

from moeconv.errors import UsageError


@dataclass(frozen=True)
class PrepareOptions:
    """How stories become rows (`moeconv data prepare --help`), by default as the reference run's.

    Attributes:
        splits: Split to glob of the source's files.
        workers: Processes; 0 works in this one. The shards do not depend on it.
        shard_characters: Text that goes into one shard, about.
    """

    tokenizer: str = LLAMA3
    sequence_length: int = 2048
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

    def __post_init__(self) -> None:
        """Refuses what nothing can be prepared with."""
        if self.sequence_length < 2:
            raise UsageError("--seq-length: a row needs at least 2 tokens")
        if not 0 <= self.validation_fraction < 1:
            raise UsageError("--validation-fraction: must be from 0 to below 1")
        if self.workers < 0:
            raise UsageError("--workers: must be 0 or more")
        if not self.separator:
            raise UsageError("--separator: must not be empty")
        if wrong := set(self.splits) - set(SPLITS):
            raise UsageError(f"--split: {min(wrong)!r} is neither train nor validation")
