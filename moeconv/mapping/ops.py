"""The operations a rule is made of. Each knows its effect on a shape and on data, and its inverse.

Placement ops move values and are exact, bit for bit. Value ops (`Scale`, `Cast`) compute; each says
whether it is exact for the numbers at hand and otherwise bounds its error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from moeconv.mapping.axes import Array, Rearrangement, Sizes

# Names of dtypes as safetensors, torch and our plans print them.
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

# Bits of the significand, the implicit one included: unit roundoff is 2**-bits.
SIGNIFICAND_BITS = {"float32": 24, "bfloat16": 8, "float16": 11}


class Op(Protocol):
    """What every op offers.

    `apply` maps the data of one tensor; `invert` maps it back. `bound(dtype)` is the largest
    relative error of `apply` for one normal number of that dtype, 0.0 when exact.
    """

    def describe(self) -> str: ...
    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]: ...
    def apply(self, array: Array, sizes: Sizes) -> Array: ...
    def bound(self, dtype: str) -> float: ...


@dataclass(frozen=True)
class Slice:
    """Takes one entry of a stacked axis (layers, experts).

    Its inverse is stacking, which needs all entries: see `stack`.
    """

    axis: str
    position: int
    index: int

    def describe(self) -> str:
        return f"[{self.axis}={self.index}]"

    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        return (*shape[: self.position], *shape[self.position + 1 :])

    def apply(self, array: Array, sizes: Sizes) -> Array:
        taken: Array = np.take(array, self.index, axis=self.position)
        return taken

    def bound(self, dtype: str) -> float:
        return 0.0


def stack(parts: Sequence[Array], position: int) -> Array:
    """Inverse of all the `Slice`s of one axis: `parts[i]` becomes entry i at `position`."""
    return np.stack(parts, axis=position)


@dataclass(frozen=True)
class Rearrange:
    """Transposes, splits and fuses named axes."""

    by: Rearrangement

    def describe(self) -> str:
        return str(self.by)

    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        if shape != self.by.left_shape(sizes):
            raise ValueError(f"{self.by} does not take shape {shape}")
        return self.by.right_shape(sizes)

    def apply(self, array: Array, sizes: Sizes) -> Array:
        return self.by.apply(array, sizes)

    def inverse(self) -> "Rearrange":
        return Rearrange(self.by.inverse)

    def bound(self, dtype: str) -> float:
        return 0.0


@dataclass(frozen=True)
class Scale:
    """Multiplies by a constant in float64 and rounds once, to the target's dtype.

    Exact when the factor is a power of two and the target no narrower than the source (but for
    overflow, which the engine refuses, and underflow to subnormals); otherwise each value is within
    half a unit in the last place of the target.
    """

    factor: float
    why: str
    source: str
    target: str

    def describe(self) -> str:
        cast = "" if self.source == self.target else f", {self.source} -> {self.target}"
        return f"× {self.why}{cast}"

    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        return shape

    def apply(self, array: Array, sizes: Sizes) -> Array:
        return round_once(array.astype(np.float64) * self.factor, self.target)

    def inverse(self) -> "Scale":
        return Scale(1.0 / self.factor, f"1/({self.why})", self.target, self.source)

    def bound(self, dtype: str) -> float:
        power_of_two = self.factor > 0 and math.frexp(self.factor)[0] == 0.5
        if power_of_two and self.target in ("float32", self.source):
            return 0.0
        return 2.0 ** -SIGNIFICAND_BITS[self.target]


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
        bits = near.view(np.uint32)
        bits -= beyond  # towards zero
        bits |= inexact
        return near.astype(DTYPES[dtype])


@dataclass(frozen=True)
class Cast:
    """Converts to another dtype, rounding to nearest even where it narrows."""

    source: str
    target: str

    def describe(self) -> str:
        return f"{self.source} -> {self.target}"

    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        return shape

    def apply(self, array: Array, sizes: Sizes) -> Array:
        with np.errstate(over="ignore"):  # an overflow becomes Inf, which the engine refuses
            return array.astype(DTYPES[self.target])

    def inverse(self) -> "Cast":
        return Cast(self.target, self.source)

    def bound(self, dtype: str) -> float:
        widens = self.target == "float32" or self.target == self.source
        return 0.0 if widens else 2.0 ** -SIGNIFICAND_BITS[self.target]


@dataclass(frozen=True)
class Replicate:
    """Copies one tensor to every entry of an axis the source lacks (copy `index` of `n`)."""

    axis: str
    index: int
    n: int

    def describe(self) -> str:
        return f"copy to each of {self.n} {self.axis}"

    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        return shape

    def apply(self, array: Array, sizes: Sizes) -> Array:
        return array

    def inverse(self) -> "Replicate":
        return self

    def bound(self, dtype: str) -> float:
        return 0.0


@dataclass(frozen=True)
class Pad:
    """Widens an MLP with zeros at its end: silu(0)·0 = 0, so the function stays the same."""

    position: int
    source: int
    target: int

    def describe(self) -> str:
        return f"zeros from {self.source} to {self.target} on axis {self.position}"

    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        return (*shape[: self.position], self.target, *shape[self.position + 1 :])

    def apply(self, array: Array, sizes: Sizes) -> Array:
        padded = np.zeros(self.shape(array.shape, sizes), dtype=array.dtype)
        padded[(slice(None),) * self.position + (slice(0, self.source),)] = array
        return padded

    def inverse(self) -> "Crop":
        return Crop(self.position, self.source, self.target)

    def bound(self, dtype: str) -> float:
        return 0.0


@dataclass(frozen=True)
class Crop:
    """Inverse of `Pad`: takes the values back and refuses anything but zeros in the rest."""

    position: int
    source: int
    target: int

    def describe(self) -> str:
        return f"first {self.source} of {self.target} on axis {self.position}"

    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        return (*shape[: self.position], self.source, *shape[self.position + 1 :])

    def apply(self, array: Array, sizes: Sizes) -> Array:
        kept, rest = np.split(array, [self.source], axis=self.position)
        if np.any(rest):
            raise ValueError("the padding of an MLP is not zero")
        return kept

    def inverse(self) -> Pad:
        return Pad(self.position, self.source, self.target)

    def bound(self, dtype: str) -> float:
        return 0.0


@dataclass(frozen=True)
class Fill:
    """Makes a tensor of one value that the source has no parameter for."""

    value: float
    axes: tuple[str, ...]

    def describe(self) -> str:
        return f"all {self.value:g}"

    def shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        return tuple(1 if axis == "1" else sizes[axis] for axis in self.axes)

    def apply(self, array: Array, sizes: Sizes) -> Array:
        return np.full(self.shape((), sizes), self.value, dtype=array.dtype)

    def bound(self, dtype: str) -> float:
        return 0.0
