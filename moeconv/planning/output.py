"""What a conversion writes, as data: which files, and the place of each target array in them.

An `Output` is one side of a conversion as far as it is written. The plan asks it what it takes and
how large it is; `execution` opens the sink that belongs to it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moeconv.hf.safetensors import FileLayout, TensorSpec, lay_out
from moeconv.mapping.edges import Edge
from moeconv.planning.units import blocks, stretches
from moeconv.tensor.axes import Range, Ranges
from moeconv.tensor.form import Form


class Output(Protocol):
    """One side of a conversion, as far as it is written."""

    @property
    def kind(self) -> str:
        """What it is: `huggingface`."""

    @property
    def nbytes(self) -> int:
        """Bytes of its files that hold values."""

    @property
    def identity(self) -> Any:
        """Everything that decides its bytes, JSON-able."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file that holds values, by name."""

    def takes(self, target: str, form: Form, ranges: Ranges) -> bool:
        """True if a piece of a target can be written as it comes."""

    def blocks(self, target: str, form: Form, ranges: Ranges) -> Iterator[dict[str, Range]]:
        """Cuts such a piece into blocks that are written one at a time, in order."""

    def stretches(self, target: str, form: Form) -> Iterator[dict[str, Range]]:
        """Cuts all that a form's target has from `base` on into such blocks."""

    def place(self, target: str) -> Mapping[str, Any]:
        """Where a target is stored, for plan.json."""


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file: its tensors in file order and where each begins."""

    name: str
    tensors: tuple[str, ...]
    layout: FileLayout


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: the number of its file, and the byte at which it begins."""

    file: int
    offset: int


@dataclass(frozen=True)
class SafetensorsOutput:
    """A Hugging Face model: safetensors files, in which tensors follow one another.

    Attributes:
        files: The files.
        places: File and offset of every tensor.
        kind: As manifests name it.
    """

    files: tuple[PlannedFile, ...]
    places: Mapping[str, Place]
    kind: str = "huggingface"

    @property
    def nbytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, header included, by name."""
        return {file.name: file.layout.size for file in self.files}

    @property
    def identity(self) -> list[list[str]]:
        """Names and headers of the files."""
        return [[file.name, file.layout.header.decode("latin-1")] for file in self.files]

    def takes(self, target: str, form: Form, ranges: Ranges) -> bool:
        """True if the piece is one run of bytes: short runs of many layers would be slow."""
        return form.is_contiguous(ranges)

    def blocks(self, target: str, form: Form, ranges: Ranges) -> Iterator[dict[str, Range]]:
        """Blocks that stay in the cache and follow each other in the file."""
        return blocks(form, ranges)

    def stretches(self, target: str, form: Form) -> Iterator[dict[str, Range]]:
        """Likewise."""
        return stretches(form)

    def place(self, target: str) -> dict[str, Any]:
        """The file of a tensor, and the byte at which it begins."""
        place = self.places[target]
        return {"file": self.files[place.file].name, "offset": place.offset}


def safetensors_output(
    edges: Mapping[str, Edge], made: Sequence[str], max_shard_bytes: int
) -> SafetensorsOutput:
    """Lays the files out.

    Tensors are assigned to files in the order of the layers, as loaders expect; within a file they
    are stored in the order in which they are made, so that finished parts can be hashed while
    others are read.

    Args:
        edges: Every tensor, by name.
        made: Their names in the order in which they are made.
        max_shard_bytes: Largest file, unless one tensor is larger.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    ordered = sorted(edges, key=lambda name: model_order(edges[name]))
    split = split_state_dict_into_shards_factory(
        {name: edges[name] for name in ordered},
        get_storage_size=lambda edge: edge.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    order = {name: number for number, name in enumerate(made)}
    files: list[PlannedFile] = []
    places: dict[str, Place] = {}
    for number, (file, names) in enumerate(sorted(split.filename_to_tensors.items())):
        tensors = sorted(names, key=order.__getitem__)
        layout = lay_out([TensorSpec(n, edges[n].dtype, edges[n].shape) for n in tensors])
        tensors.sort(key=layout.offsets.__getitem__)
        files.append(PlannedFile(file, tuple(tensors), layout))
        places |= {name: Place(number, layout.offsets[name]) for name in tensors}
    return SafetensorsOutput(tuple(files), places)


def model_order(edge: Edge) -> tuple[Any, ...]:
    """A key that sorts tensors as a model has them: by layer, names in natural order.

    A rule table begins with the embedding; what else belongs to no layer comes behind the layers.
    """
    parts = edge.target.split(".")
    first = -1 if edge.rule == 0 else 10**9
    layer = first if edge.layer is None else edge.layer
    natural = [int(part) if part.isdigit() else 0 for part in parts]
    return (layer, ["" if part.isdigit() else part for part in parts], natural)
