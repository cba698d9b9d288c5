"""The dtypes of tensors, their bits, and rounding to them once."""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from moeconv.tensor.axes import Array

# Names of dtypes as safetensors, torch and our plans print them.
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

# Dtypes of quantised tensors and of their scales, which are read and never written. In memory each
# number of 4 bits has a byte of its own, as ml_dtypes keeps them; files have two in a byte.
QUANTISED: dict[str, np.dtype[Any]] = {
    "int4": np.dtype(ml_dtypes.int4),
    "int8": np.dtype(np.int8),
    "float4_e2m1fn": np.dtype(ml_dtypes.float4_e2m1fn),
    "uint8": np.dtype(np.uint8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}

# All that an array may be stored in.
STORED = DTYPES | QUANTISED

# Bits of the significand, the implicit one included: unit roundoff is 2**-bits.
SIGNIFICAND_BITS = {"float32": 24, "bfloat16": 8, "float16": 11}

# Smallest exponent of a normal number.
SMALLEST_EXPONENT = {"float32": -126, "bfloat16": -126, "float16": -14}

# Bits that are all set in NaN and Inf, and in no number; whole numbers are always finite.
_EXPONENT_MASK = {
    "float32": 0x7F800000,
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7C,
    "float8_e8m0fnu": 0xFF,
}
_COUNTED = 1 << 18  # values looked at together, so that they stay in the cache


def not_converted(name: str, dtype: str) -> str:
    """The sentence for a parameter in a dtype that nothing reads."""
    return (
        f"parameter {name} is stored as {dtype}; moeconv converts {', '.join(DTYPES)} (a quantized "
        "checkpoint has to be trained or saved in one)"
    )


def bits(array: Array) -> Array:
    """The bit patterns, as unsigned integers of the same shape."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def ulp(values: Array, dtype: str) -> Array:
    """The distance between neighbouring numbers of a dtype around each float64 value."""
    exponent = np.where(values == 0, SMALLEST_EXPONENT[dtype], np.frexp(values)[1] - 1)
    exponent = np.maximum(exponent, SMALLEST_EXPONENT[dtype])
    spacing: Array = np.ldexp(1.0, exponent - (SIGNIFICAND_BITS[dtype] - 1))
    return spacing


def count_nonfinite(array: Array, dtype: str) -> Iterator[int]:
    """Numbers of NaN and Inf, part by part, by the bits of the exponent: fast for every dtype."""
    if dtype not in _EXPONENT_MASK:
        return
    flat = array.reshape(-1).view(f"u{STORED[dtype].itemsize}")
    mask = flat.dtype.type(_EXPONENT_MASK[dtype])
    for start in range(0, flat.size, _COUNTED):
        yield int(np.count_nonzero((flat[start : start + _COUNTED] & mask) == mask))


def round_once(values: Array, dtype: str) -> Array:
    """float64 to another dtype, to the nearest value, ties to even; an overflow becomes Inf.

    ml_dtypes converts float64 to bfloat16 by way of float32, so that a value a little above the
    middle of two falls onto it, and then to the wrong side. Rounding to odd in between (Boldo and
    Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
    to odd") keeps what is needed: an inexact float32 never ends on an even last bit.
    """
    # An overflow becomes Inf, which the engine refuses; the error of one is Inf or NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return values.astype(DTYPES[dtype])
        near = values.astype(np.float32)
        error = near.astype(np.float64)
        error -= values
        inexact = (error != 0) & (error == error)
        beyond = inexact & ((error > 0) != np.signbit(near))
        pattern = near.view(np.uint32)
        pattern -= beyond  # towards zero
        pattern |= inexact
        return near.astype(DTYPES[dtype])
