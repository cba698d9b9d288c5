"""What a conversion is asked for, and what its first step gives to the second."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from moeconv.arch.layout import Layout
from moeconv.hf.tokenizer import TokenizerFiles
from moeconv.maxtext.checkpoint import StoredCheckpoint
from moeconv.maxtext.unchanged import Unchanged
from moeconv.planning.plan import Plan, PlannedSource
from moeconv.tensor.stored import Source, Together

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `moeconv convert`; see the command's help.

    Attributes:
        config: MaxText YAML.
        sets: `key=value` pairs.
        accept: Settings of the config that no known MaxText has, and that decide nothing.
        target: A family's name, or `auto`.
        dtype: Output dtype, or `keep`.
        max_shard_bytes: Largest safetensors file.
        untie: Write an explicit output head.
        tokenizer: Directory, tiktoken ranks file or Hub id.
        jobs: Workers.
        max_memory: Bytes the process may use.
        overwrite: Replace a non-empty OUT.
        resume: Go on with an interrupted conversion.
        allow_nonfinite: Copy NaN and Inf instead of refusing them.
        allow_missing_chunks: Read chunks that are not stored as zeros, where the checkpoint's
            format leaves out chunks of zeros.
        base: The checkpoint that a LoRA adapter was trained on; the adapter is converted then.
        base_model: How PEFT finds the converted base.
        merge_lora: The checkpoint with a LoRA adapter that is merged into the model.
        block: Of a Hugging Face model: MaxText's decoder block; None for the first that holds it.
        scan_layers: Likewise: layers are stacked; None for stacked where MaxText can.
        scan_axis: Likewise: the axis of the layers.
        shards: Likewise: in how many parts a mesh cuts arrays, by the name of its axis.
        zarr3: Likewise: arrays are zarr v3, else v2.
        ocdbt: Likewise: arrays are one database, else a folder each.
    """

    config: Path | None = None
    sets: Sequence[str] = ()
    accept: Sequence[str] = ()
    target: str = "auto"
    dtype: str = "keep"
    max_shard_bytes: int = 5 * GB
    untie: bool = False
    tokenizer: str | None = None
    jobs: int = 1
    max_memory: int = 4 * GIB
    overwrite: bool = False
    resume: bool = False
    allow_nonfinite: bool = False
    allow_missing_chunks: bool = False
    base: str | None = None
    base_model: str | None = None
    merge_lora: str | None = None
    block: str | None = None
    scan_layers: bool | None = None
    scan_axis: int = 1
    shards: Mapping[str, int] = field(default_factory=dict)
    zarr3: bool = True
    ocdbt: bool = True


class Input(Protocol):
    """What is read, opened: a checkpoint, or a Hugging Face model."""

    @property
    def arrays(self) -> Source:
        """Its arrays."""

    @property
    def files(self) -> str | None:
        """Digest of the names, sizes and times of all its files; None where it is remote."""

    @property
    def unchanged(self) -> Unchanged:
        """Looks for changes since before it was read."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where it is on this machine: OUT may be in none of them, and holds not the first."""

    def connected(self) -> AbstractContextManager[None]:
        """It is read while this is open."""


@dataclass(frozen=True)
class Prepared:
    """A plan, and what it reads, opened.

    Attributes:
        plan: What to do.
        source: The checkpoint.
        tokenizer: Its tokenizer.
        options: What is allowed while it is done.
        beside: The adapter that is merged into the model of `source`; None where none is.
    """

    plan: Plan
    source: Input
    tokenizer: TokenizerFiles | None
    options: ConvertOptions
    beside: Input | None = None

    @property
    def read(self) -> tuple[Input, ...]:
        """All that is read."""
        return (self.source,) if self.beside is None else (self.source, self.beside)

    @property
    def arrays(self) -> Source:
        """All arrays that are read."""
        return Together(*(stored.arrays for stored in self.read))

    def demand_unchanged(self) -> None:
        """Looks whether what is read is as it was when it was opened.

        Raises:
            TensorError: It was written meanwhile.
        """
        for stored in self.read:
            stored.unchanged.check()


def planned_source(stored: StoredCheckpoint, layout: Layout) -> PlannedSource:
    """What a plan says of what it reads.

    Args:
        stored: What is read.
        layout: How its model keeps its layers; of an adapter that of its base.
    """
    return PlannedSource(
        kind="maxtext",
        path=str(stored.step.items),
        step=stored.step.number,
        format=stored.tree.describe(),
        layout=layout.describe(),
        scan_axis=layout.scan_axis,
        metadata=stored.metadata,
        files=stored.files,
        may_lack=stored.arrays.may_lack,
        arrays=stored.arrays.info,
        collections={".".join(path): kind for path, kind in stored.tree.collections.items()},
    )
