"""Cutting a box into slabs of a few MiB that follow each other in C order, so in the cache."""

import itertools
import math
from collections.abc import Iterator, Sequence

from moeconv.tensor.axes import Range

MIB = 2**20
BLOCK_BYTES = 8 * MIB  # moved, hashed or assembled at a time


def slabs(
    box: Sequence[Range], itemsize: int, *, deepest: int | None = None
) -> Iterator[tuple[Range, ...]]:
    """Cuts a box.

    Args:
        box: Range on each axis.
        itemsize: Bytes that one value takes while it is worked on.
        deepest: The last axis that may be cut; a slab holds all of every axis behind it. None
            allows all.

    Yields:
        One entry of each outer axis, a range on the axis that is cut, all of each inner one. A slab
        is larger than `BLOCK_BYTES` only where `deepest` forbids to cut it further.
    """
    if not box:
        yield ()
        return
    cut, inner = len(box) - 1, itemsize
    while cut > 0 and inner * _length(box[cut]) <= BLOCK_BYTES:
        inner *= _length(box[cut])
        cut -= 1
    if deepest is not None and cut > deepest:
        cut = deepest
        inner = itemsize * math.prod(map(_length, box[cut + 1 :]))
    step = max(1, BLOCK_BYTES // max(1, inner))
    outer = [[(i, i + 1) for i in range(*ends)] for ends in box[:cut]]
    start, stop = box[cut]
    for head in itertools.product(*outer):
        for first in range(start, stop, step):
            yield (*head, (first, min(first + step, stop)), *box[cut + 1 :])


def _length(ends: Range) -> int:
    return ends[1] - ends[0]
