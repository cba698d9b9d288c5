"""The LoRA adapter that was merged into a candidate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeconv.arch.layout import Layout
from moeconv.artifact.manifest import AdapterRecord
from moeconv.errors import NotACheckpointError
from moeconv.mapping.edges import Edge
from moeconv.mapping.lora import LowRank, merged_edges, update
from moeconv.maxtext.whole import part_of
from moeconv.orbax.arrays import Arrays
from moeconv.orbax.locate import Step, locate
from moeconv.orbax.metadata import read_tree
from moeconv.orbax.store import Folder
from moeconv.planning.adapter import changes_of
from moeconv.tensor.axes import Array


class SourceGoneError(NotACheckpointError):
    """A checkpoint that the manifest names is not there, and the user named no other."""


def other_checkpoint(record: AdapterRecord, manifest: Path, what: str) -> Step:
    """The checkpoint that was read beside the source.

    Args:
        record: Of the manifest.
        manifest: The manifest's file.
        what: What the checkpoint is, for people.

    Raises:
        SourceGoneError: It is not on this machine.
    """
    named = f"the {what} {record.checkpoint}, which {manifest} names,"
    if Folder.open(record.checkpoint).local is None:
        raise SourceGoneError(
            f"{named} is at an address; an address that only OUT names is not contacted: copy "
            "it to this machine, and convert again"
        )
    try:
        return locate(record.checkpoint)
    except NotACheckpointError as error:
        raise SourceGoneError(f"{named} is not there: {error}") from None


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that the manifest of a merged model names.

    Attributes:
        arrays: Its factors, opened.
        scale: alpha / rank.
    """

    arrays: Arrays
    scale: float

    @classmethod
    def open(cls, record: AdapterRecord, manifest: Path) -> "MergedAdapter":
        """Opens it.

        Raises:
            SourceGoneError: It is not on this machine.
            NotACheckpointError: There is no adapter in the checkpoint.
        """
        step = other_checkpoint(record, manifest, "adapter")
        tree = part_of(step, read_tree(step.items), "adapter")
        return cls(Arrays(step.items, tree), record.alpha / record.rank)

    def changes(self, layout: Layout) -> dict[str, LowRank]:
        """What it changes of a model, by the names of the model's arrays.

        Raises:
            TensorError: It is not of this model.
        """
        return changes_of(layout, self.arrays.info)

    def merged(self, edges: Sequence[Edge], layout: Layout) -> tuple[Edge, ...]:
        """The tensors of the merged model, from those of its base."""
        return merged_edges(edges, self.changes(layout), self.scale)

    def added(self, change: LowRank, take: Mapping[str, int | slice]) -> Array:
        """What is added to a parameter, in float64.

        Args:
            change: From `changes`.
            take: The entry, or the entries, taken of its axes; empty for all of it.
        """
        return update(change, self.scale, self._whole, take)

    def _whole(self, name: str) -> Array:
        shape = self.arrays.info[name].shape
        return self.arrays.reader(name).read(tuple(slice(0, size) for size in shape))
