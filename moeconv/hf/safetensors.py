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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeconv.errors import TensorError
from moeconv.tensor.dtypes import DTYPES
from moeconv.untrusted.strict_json import loads

# Of a shape that is multiplied out: the format itself sets no limit.
_MOST_AXES, _LONGEST_AXIS = 32, 2**63
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# What only models that moeconv did not write have, and the bytes of a value; the names are numpy's
# and those of ml_dtypes.
_FOREIGN = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "I32": ("int32", 4),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}
_ITEMSIZE = {
    **{name: dtype.itemsize for name, dtype in DTYPES.items()},
    **dict(_FOREIGN.values()),
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor: its name, dtype (a key of `DTYPES`, if it is to be written) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]


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
    """Plans a file: tensors in the order given, wider dtypes first so that all are aligned."""
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


# Every tensor of a file, with the absolute offset of its first byte.
Header = dict[str, tuple[TensorSpec, int]]


def read_header(path: Path, *, foreign: bool = False) -> Header:
    """Reads a file's header.

    Args:
        path: The file.
        foreign: As in `parse_header`.

    Raises:
        TensorError: As `parse_header`, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return parse_header(path, path.stat().st_size, file.read, foreign=foreign)
    except OSError as error:
        raise TensorError(f"{path} is not a whole safetensors file: {error}") from None


def parse_header(
    where: object, size: int, read: Callable[[int], bytes], *, foreign: bool = False
) -> Header:
    """Reads a file's header.

    Args:
        where: The file, for people.
        size: Its bytes.
        read: Gives as many bytes as asked for, from the file's first on.
        foreign: It may hold dtypes that moeconv does not write, such as those of quantised weights.

    Raises:
        TensorError: It is not a safetensors file, holds another dtype than it may, or its tensors
            do not fill the payload exactly.
        OSError: From `read`.
    """
    try:
        length = int.from_bytes(read(8), "little")
        if length > min(size, 100_000_000):
            raise ValueError("the header is longer than the file")
        table = loads(read(length), unique=True)
        if not isinstance(table, dict):
            raise ValueError("its header is no JSON object")
        names = {code: name for name, code in _CODES.items()}
        if foreign:
            names |= {code: name for code, (name, _) in _FOREIGN.items()}
        found = {}
        position = 8 + length
        entries = [(n, e) for n, e in table.items() if n != "__metadata__"]
        for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
            spec = TensorSpec(name, names[entry["dtype"]], tuple(entry["shape"]))
            start, stop = (8 + length + o for o in entry["data_offsets"])
            if not all(type(n) is int and n >= 0 for n in (*spec.shape, start, stop)):
                raise ValueError(f"tensor {name} has sizes that are no whole numbers")
            if len(spec.shape) > _MOST_AXES or max(spec.shape, default=0) > _LONGEST_AXIS:
                raise ValueError(f"tensor {name} has a shape that no tensor has")
            if start != position or stop - start != spec.nbytes:
                raise ValueError(f"tensor {name} is not stored where its shape says")
            found[name] = (spec, start)
            position = stop
        if position != size:
            raise ValueError(f"it has {size} bytes where its header says {position}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TensorError(f"{where} is not a whole safetensors file: {error}") from None
    return found
