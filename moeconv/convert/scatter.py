"""Turning a block of a source array into a block of a target tensor: values first, then placement.

Everything here works on one block of at most a few MiB, so that it stays in the cache.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from moeconv.arch.layout import listing
from moeconv.convert.work import Range, Route
from moeconv.errors import TensorError
from moeconv.mapping.axes import Array
from moeconv.mapping.ops import DTYPES
from moeconv.orbax.arrays import ArrayInfo

# Rows of the source's outermost axis moved at a time when it becomes the target's innermost one:
# 16 values of 4 bytes are a cache line, which makes a transposition four to eight times as fast.
_STRIP = 16

_EXPONENT = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


def arrange(block: Array, route: Route, ranges: Mapping[str, Range]) -> Array:
    """Makes the target's block from the source's.

    Args:
        block: Source values, C order, axes `route.free`, cut to `ranges`.
        route: Where it goes.
        ranges: Ranges on the target's unfused axes that the block holds.

    Returns:
        C-contiguous array of the target's dtype, axes `route.target_axes`, with the zeros of a
        padded axis behind its last values.
    """
    values = block
    if route.scale is not None:
        values = route.scale.apply(values, {})
    if route.cast is not None:
        values = route.cast.apply(values, {})
    values = values.reshape([n for axis in route.free for n in _split(route, axis, values)])
    values = values.transpose(route.place.by.permutation)
    sizes = route.edges[0].sizes
    shape = [
        full - ranges[a][0] if ranges[a][1] == sizes[a] else ranges[a][1] - ranges[a][0]
        for a, full in zip(route.target_axes, route.target_shape, strict=True)
    ]
    out = np.zeros(shape, values.dtype) if tuple(shape) != values.shape else None
    if out is None:
        if route.place.by.is_identity:
            return np.ascontiguousarray(values)
        out = np.empty(shape, values.dtype)
    _transpose(values, out[tuple(slice(0, n) for n in values.shape)])
    return out


def _split(route: Route, axis: str, values: Array) -> tuple[int, ...]:
    if axis in route.split:
        return tuple(route.edges[0].sizes[sub] for sub in route.split[axis])
    return (values.shape[route.free.index(axis)],)


def _transpose(source: Array, target: Array) -> None:
    """Copies between two layouts of the same shape, strip by strip."""
    last = source.ndim - 1
    if source.ndim < 2 or source.strides[last] == source.itemsize:
        np.copyto(target, source)
        return
    for start in range(0, source.shape[last], _STRIP):
        strip = (..., slice(start, start + _STRIP))
        np.copyto(target[strip], source[strip])


def check_finite(array: Array, dtype: str, what: str) -> None:
    """Refuses NaN and Inf.

    Raises:
        TensorError: Names what holds them.
    """
    if any(_nonfinite(array, dtype)):
        raise TensorError(what)


def check_overflow(
    source: Array, info: ArrayInfo, values: Array, route: Route, *, copied: bool
) -> None:
    """Refuses numbers that became Inf in the target's dtype.

    Args:
        source: The block as read.
        info: Its array.
        values: What `arrange` made of it.
        route: Where it goes.
        copied: NaN and Inf of the source are allowed, so that only new ones count.

    Raises:
        TensorError: Names the parameter and the tensors.
    """
    dtype = route.edges[0].dtype
    found = sum(_nonfinite(values, dtype)) if copied else any(_nonfinite(values, dtype))
    if found and not (copied and found == sum(_nonfinite(source, info.dtype))):
        targets = listing([edge.target for edge in route.edges])
        raise TensorError(
            f"values of parameter {info.name} overflow {dtype}; convert with --dtype bfloat16 or "
            f"float32. Tensors:{targets}"
        )


def _nonfinite(array: Array, dtype: str) -> Iterator[int]:
    """Number of NaN and Inf, part by part, by the bits of the exponent: fast for every dtype."""
    bits = array.reshape(-1).view(f"u{DTYPES[dtype].itemsize}")
    mask = bits.dtype.type(_EXPONENT[dtype])
    for start in range(0, bits.size, 1 << 18):
        yield int(np.count_nonzero((bits[start : start + (1 << 18)] & mask) == mask))


def nonfinite_message(source: str, where: str) -> str:
    """The sentence for a NaN or Inf in the checkpoint."""
    return (
        f"parameter {source} holds NaN or Inf{where}; the run diverged or overflowed. Convert an "
        "earlier step, or pass --allow-nonfinite to copy the values as they are"
    )
