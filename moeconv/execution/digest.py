"""Digests of what is read, which do not depend on how it is read."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from moeconv.hf.safetensors import payload
from moeconv.orbax.arrays import Reader
from moeconv.planning.units import BLOCK_BYTES, Unit
from moeconv.tensor.axes import Array
from moeconv.tensor.form import Range

Part = tuple[slice, ...]
Position = tuple[int, ...]


def chunk_digests(
    unit: Unit,
    reader: Reader,
    see: Callable[[Position, Part, Array], bool] = lambda position, part, data: True,
) -> dict[tuple[int, ...], str]:
    """SHA-256 of every chunk of a unit, decoded, in C order, by the chunk's place in the grid.

    Args:
        unit: Whole chunks of one array.
        reader: Reads it.
        see: Is shown every part that is hashed, with its chunk's place; ends the work when it
            returns False, after which the digests are of no use.
    """
    digests: dict[Position, str] = {}
    for position, box in unit.chunks():
        digest = hashlib.sha256()
        for part in slabs(box, unit.array.itemsize):
            data = reader.read(part)
            digest.update(payload(data))
            if not see(position, part, data):
                return digests
            del data  # before the next is made
        digests[position] = digest.hexdigest()
    return digests


def array_digest(
    dtype: str,
    shape: Sequence[int],
    chunk: Sequence[int],
    chunks: Mapping[tuple[int, ...], str],
) -> str:
    """Digest of an array as read: SHA-256 over its dtype, shape, chunk shape and chunks' SHA-256.

    A chunk's SHA-256 is over its decoded values in C order, cut to the array's bounds; chunks come
    in the order of the grid.
    """
    lines = [f"{dtype} {list(shape)} {list(chunk)}", *(chunks[p] for p in sorted(chunks))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def slabs(box: Sequence[Range], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a box into parts of a few MiB that follow each other in C order."""
    cut, inner = len(box) - 1, itemsize
    while cut > 0 and inner * (box[cut][1] - box[cut][0]) <= BLOCK_BYTES:
        inner *= box[cut][1] - box[cut][0]
        cut -= 1
    step = max(1, BLOCK_BYTES // inner)
    outer = [[slice(i, i + 1) for i in range(*r)] for r in box[:cut]]
    rest = tuple(slice(*r) for r in box[cut + 1 :])
    for head in itertools.product(*outer):
        start, stop = box[cut] if box else (0, 1)
        for first in range(start, stop, step):
            middle = (slice(first, min(first + step, stop)),) if box else ()
            yield (*head, *middle, *rest)
