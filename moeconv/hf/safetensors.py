"""The safetensors format, written by offset, so that tensors may arrive in any order and in parts.

    8 bytes    length N of the header, little-endian
    N bytes    JSON: {"__metadata__": {...}, NAME: {"dtype", "shape", "data_offsets"}}, padded with
               spaces so that the payload starts at a multiple of 8
    payload    the tensors, C order, without gaps

`safetensors.safe_open` is the oracle in tests. The library's own writer wants all tensors of a file
in memory, and writes the memory order of a transposed numpy array as if it were C order
(safetensors#825); here bytes only ever come from C-contiguous buffers, which `payload` enforces.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeconv.mapping.axes import Array
from moeconv.mapping.ops import DTYPES

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, dtype (a key of `ops.DTYPES`) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class FileLayout:
    """Where everything goes in one file.

    Attributes:
        header: The bytes before the payload.
        offsets: Absolute offset of each tensor's first byte, by name.
        size: Bytes of the whole file.
    """

    header: bytes
    offsets: dict[str, int]
    size: int


def lay_out(tensors: Sequence[TensorSpec]) -> FileLayout:
    """Plans a file; tensors lie in the order given, wider dtypes first so that all are aligned."""
    ordered = sorted(tensors, key=lambda t: -DTYPES[t.dtype].itemsize)
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    relative = {}
    for tensor in ordered:
        relative[tensor.name] = position
        table[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in relative.items()}
    return FileLayout(header, offsets, len(header) + position)


def payload(array: Array) -> memoryview:
    """The bytes of an array as they go to the file: C order, or an error.

    Raises:
        ValueError: The array is not C-contiguous; its memory order is not its logical order.
    """
    if not array.flags.c_contiguous:
        raise ValueError("only C-contiguous arrays have their logical order in memory")
    return memoryview(array.reshape(-1).view("u1"))
