"""Digests of what is read, which do not depend on how it is read."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

from moeconv.planning.slabs import slabs
from moeconv.planning.units import Unit
from moeconv.tensor.axes import Array
from moeconv.tensor.stored import Reader, payload

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
        for slab in slabs(box, unit.array.itemsize):
            part = tuple(slice(*ends) for ends in slab)
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
