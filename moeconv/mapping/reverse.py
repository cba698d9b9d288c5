"""The way back: a checkpoint's arrays from the converted tensors, by undoing the same forms.

The mapping is not written a second time: `restore` walks the very edges that `expand` made. It is
exact wherever the edges are; where a factor rounds, the way back is within one unit of the last
place.
"""

from collections.abc import Callable, Iterable

import numpy as np

from moeconv.errors import TensorError
from moeconv.mapping.edges import Edge, Part
from moeconv.tensor.axes import Array
from moeconv.tensor.dtypes import bits


def restore_part(edge: Edge, part: Part, tensor: Array) -> Array:
    """Undoes one part of an edge.

    Args:
        edge: How the tensor was made.
        part: One of its parts.
        tensor: The tensor, of shape `edge.shape`.

    Returns:
        The entry of the source array that it came from: the source's axes less the taken ones.

    Raises:
        TensorError: Padding is not zero.
    """
    apart = edge.part_of(tensor, part)
    if any(np.any(apart[box]) for box in part.form.padding()):
        raise TensorError(f"{edge.target}: the padding of an MLP is not zero")
    return part.form.undo(apart[part.form.box(part.form.whole)])


def restore(edges: Iterable[Edge], read: Callable[[str], Array]) -> dict[str, Array]:
    """Rebuilds every source array.

    Args:
        edges: From `expand`.
        read: Gives a target tensor by name.

    Returns:
        Arrays by the checkpoint's dotted names, in the checkpoint's dtypes.

    Raises:
        TensorError: Copies of one tensor differ, or a filled tensor does not hold its value.
    """
    arrays: dict[str, Array] = {}
    seen: dict[tuple[str, tuple[tuple[str, int], ...]], str] = {}
    for edge in edges:
        tensor = read(edge.target)
        if not edge.parts and not np.array_equal(tensor, np.full_like(tensor, edge.fill)):
            raise TensorError(f"{edge.target} should be {edge.describe()}")
        for part in edge.parts:
            values, name, take = restore_part(edge, part, tensor), part.source, part.form.take
            if name not in arrays:
                shape = [part.form.sizes[axis] for axis in part.form.axes]
                arrays[name] = np.empty(shape, values.dtype)
            place = tuple(take.get(axis, slice(None)) for axis in part.form.axes)
            key = (name, tuple(sorted(take.items())))
            if key in seen:
                if not np.array_equal(bits(arrays[name][place]), bits(values)):
                    raise TensorError(f"{edge.target} should be a copy of {seen[key]}, but differs")
                continue
            seen[key] = edge.target
            arrays[name][place] = values
    return arrays
