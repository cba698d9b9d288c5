"""The way back: a checkpoint's arrays from the converted tensors, by the inverses of the same ops.

Nobody writes the mapping a second time: `restore` walks the very edges that `expand` made. It is
exact wherever the edges are; where a factor rounds, the way back is within one unit of the last
place.
"""

from collections.abc import Callable, Iterable

import numpy as np

from moeconv.errors import TensorError
from moeconv.mapping.axes import Array
from moeconv.mapping.edges import Edge
from moeconv.mapping.ops import DTYPES, Cast, Fill, Pad, Rearrange, Replicate, Scale, Slice


def restore_slice(edge: Edge, tensor: Array) -> Array:
    """Undoes one edge.

    Args:
        edge: How the tensor was made.
        tensor: The tensor, of shape `edge.shape`.

    Returns:
        The entry of the source array that it came from: the source's axes less the sliced ones.

    Raises:
        TensorError: Padding is not zero.
    """
    for op in reversed(edge.ops):
        match op:
            case Scale() | Cast() | Rearrange() | Replicate():
                tensor = op.inverse().apply(tensor, edge.sizes)
            case Pad():
                try:
                    tensor = op.inverse().apply(tensor, edge.sizes)
                except ValueError as error:
                    raise TensorError(f"{edge.target}: {error}") from None
            case Slice() | Fill():
                break
    return tensor


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
        if edge.source is None:
            if not np.array_equal(tensor, edge.apply(np.empty((), tensor.dtype))):
                raise TensorError(f"{edge.target} should be {edge.describe()}")
            continue
        part = restore_slice(edge, tensor)
        name = edge.source.name
        if name not in arrays:
            arrays[name] = np.empty(edge.source.shape, part.dtype)
        place = tuple(
            edge.index[axis] if axis in edge.index else slice(None) for axis in edge.source.axes
        )
        key = (name, tuple(sorted(edge.index.items())))
        if key in seen:
            if not _same_bits(arrays[name][place], part):
                raise TensorError(f"{edge.target} should be a copy of {seen[key]}, but differs")
            continue
        seen[key] = edge.target
        arrays[name][place] = part
    return arrays


def _same_bits(one: Array, other: Array) -> bool:
    bits = f"u{DTYPES[str(one.dtype)].itemsize}"
    left = np.ascontiguousarray(one).view(bits)
    return bool(np.array_equal(left, np.ascontiguousarray(other).view(bits)))
