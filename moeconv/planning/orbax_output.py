"""A MaxText checkpoint as it is written: arrays in Orbax's layout, cut into chunks.

A chunk is written whole and once. By default it has one layer, and of stacked experts one expert,
so that a tensor of Hugging Face fills whole chunks; arrays of small layers are one chunk, whose
pieces wait in a scratch file. A mesh may ask for more cuts (`--shards`), so that each of its
devices reads only what is its own.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeconv.mapping.edges import Edge
from moeconv.orbax.writer import WrittenArray
from moeconv.tensor.axes import Range, Ranges
from moeconv.tensor.dtypes import DTYPES
from moeconv.tensor.form import Form

# A chunk is no larger, but for an axis that cannot be cut ...
CHUNK_BYTES = 16 << 20
# ... and one layer of one expert is a chunk of its own only from this on.
_SMALL = 256 << 10

# The axes of arrays over which MaxText spreads an axis of its mesh (configs/base.yml
# `logical_axis_rules`: embed, heads and kv_heads, mlp, vocab, exp).
MESH: Mapping[str, tuple[str, ...]] = {
    "fsdp": ("D",),
    "tensor": ("H", "K", "J", "F", "M", "S", "V"),
    "expert": ("E",),
}


@dataclass(frozen=True)
class OrbaxOutput:
    """A MaxText checkpoint.

    Attributes:
        arrays: Every array, by its name below its collection.
        scan_layers: Layers are stacked, as the step's metadata say.
        settings: The model's MaxText settings, for its config.
        zarr3: zarr v3, else v2.
        ocdbt: One database, else a folder for each array.
        kind: As manifests name it.
    """

    arrays: Mapping[str, WrittenArray]
    scan_layers: bool
    settings: Mapping[str, Any]
    zarr3: bool = True
    ocdbt: bool = True
    kind: str = "maxtext"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays before they are compressed."""
        return sum(
            math.prod(array.shape) * DTYPES[array.dtype].itemsize for array in self.arrays.values()
        )

    @property
    def sizes(self) -> dict[str, int]:
        """None: how large a file becomes, compression decides."""
        return {}

    @property
    def identity(self) -> list[Any]:
        """How every array is stored."""
        each = [[a.name, a.dtype, list(a.shape), list(a.chunk)] for a in self.arrays.values()]
        return [self.zarr3, self.ocdbt, dict(self.settings), each]

    def takes(self, target: str, form: Form, ranges: Ranges) -> bool:
        """True if the piece is made of whole chunks."""
        return all(
            start % step == 0 and (stop % step == 0 or stop == size)
            for axis, step, size in zip(
                form.target_axes, self._steps(target, form), form.target_shape, strict=True
            )
            for start, stop in (ranges[axis],)
        )

    def place(self, target: str) -> dict[str, Any]:
        """The chunks of an array."""
        return {"chunk": list(self.arrays[target].chunk)}

    def blocks(self, target: str, form: Form, ranges: Ranges) -> Iterator[dict[str, Range]]:
        """The chunks that a piece of whole chunks has."""
        cuts = [
            [(at, min(at + step, ranges[axis][1])) for at in range(*ranges[axis], step)]
            for axis, step in zip(form.target_axes, self._steps(target, form), strict=True)
        ]
        for box in itertools.product(*cuts):
            yield dict(zip(form.target_axes, box, strict=True))

    def stretches(self, target: str, form: Form) -> Iterator[dict[str, Range]]:
        """All chunks of an array."""
        sizes = zip(form.target_axes, form.target_shape, strict=True)
        return self.blocks(target, form, {axis: (0, size) for axis, size in sizes})

    def _steps(self, target: str, form: Form) -> tuple[int, ...]:
        """Length of a chunk along each of the form's axes; an axis in parts is whole."""
        sizes = dict(zip(form.target_axes, form.target_shape, strict=True))
        steps: list[int] = []
        for group, step in zip(form.rearrange.right, self.arrays[target].chunk, strict=True):
            steps += [step] if len(group) == 1 else [sizes[axis] for axis in group]
        return tuple(steps)


def chunk_of(edge: Edge, shards: Mapping[str, int], limit: int = CHUNK_BYTES) -> tuple[int, ...]:
    """The shape of an array's chunks.

    Args:
        edge: How the array is made; its parts are alike but for their entries.
        shards: In how many parts a mesh cuts an axis, by its letter; an axis that it does not
            divide is not cut, as MaxText replicates it then.
        limit: The largest chunk in bytes.
    """
    form, shape = edge.parts[0].form, edge.shape
    itemsize = form.dtype.itemsize
    position = {group[0]: n for n, group in enumerate(form.rearrange.right) if len(group) == 1}
    most = list(shape)
    for axis, count in shards.items():
        if axis in position and shape[position[axis]] % count == 0:
            most[position[axis]] //= count
    chunk = [1 if n in {position[axis] for axis in form.place} else m for n, m in enumerate(most)]

    def size() -> int:
        return math.prod(chunk) * itemsize

    for axis in reversed(list(form.place)):  # an expert before a layer
        if size() < _SMALL:
            chunk[position[axis]] = most[position[axis]]
    # Along the axes that the tensor has outermost, so that its bytes are read in a row.
    for axis in (axis for axis in form.axes if axis in position and axis not in form.take):
        if size() > limit:
            rest = size() // chunk[position[axis]]
            chunk[position[axis]] = max(1, limit // rest)
    return tuple(chunk)


def orbax_output(
    edges: Sequence[Edge],
    shards: Mapping[str, int],
    *,
    collections: Mapping[str, tuple[str, ...]],
    scan_layers: bool,
    settings: Mapping[str, Any],
    zarr3: bool = True,
    ocdbt: bool = True,
    limit: int = CHUNK_BYTES,
) -> OrbaxOutput:
    """Lays a checkpoint out.

    Args:
        edges: Every array.
        shards: As in `chunk_of`.
        collections: The key path above that of each array.
        scan_layers: As in `OrbaxOutput`.
        settings: As there.
        zarr3: As in `OrbaxOutput`.
        ocdbt: As there.
        limit: As in `chunk_of`.
    """
    arrays = {
        edge.target: WrittenArray(
            (*collections[edge.target], *edge.target.split(".")),
            edge.shape,
            edge.dtype,
            chunk_of(edge, shards, limit),
        )
        for edge in edges
    }
    return OrbaxOutput(arrays, scan_layers, settings, zarr3, ocdbt)


def source_chunk(form: Form, chunk: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """How much of a tensor to read at once, so that it makes whole chunks of an array.

    Args:
        form: Of the part that comes from the tensor.
        chunk: The array's chunk.
        shape: The tensor's, with the form's axes.
    """
    groups = form.rearrange.right
    steps = {g[0]: step for g, step in zip(groups, chunk, strict=True) if len(g) == 1}
    return tuple(
        min(size, steps.get(axis, size)) for axis, size in zip(form.axes, shape, strict=True)
    )


def in_a_row(chunk: Sequence[int], shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """A chunk whose bytes follow each other: beyond the first axis of several entries it is whole.

    Along that axis it has as many entries, of whole chunks where it can, as make `CHUNK_BYTES`.

    Args:
        chunk: Its shape.
        shape: That of the array.
        itemsize: Bytes of a value.
    """
    lead = next((n for n, step in enumerate(chunk) if step > 1), 0)
    while True:
        step, behind = chunk[lead], tuple(shape[lead + 1 :])
        most = max(1, CHUNK_BYTES // max(1, math.prod(behind) * itemsize))
        if step <= most:
            step = min(shape[lead], most // step * step)
        elif tuple(chunk[lead + 1 :]) != behind:
            step = most
        if step < shape[lead] or lead == 0:
            return (*chunk[:lead], step, *behind)
        lead -= 1  # all of it fits: several of these
