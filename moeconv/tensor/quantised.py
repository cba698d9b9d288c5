"""A quantised array with the scales of its blocks becomes one array of numbers.

In each form that is read a number is the stored value times its scale: FP8 in blocks of 128 x 128
(`weight_scale_inv`, transformers integrations/finegrained_fp8.py `Fp8Dequantize`), int8 and int4
with a scale for each channel or group (compressed-tensors `pack-quantized`), and MXFP4, e2m1
numbers with an exponent for each 32 of them (`_blocks` and `_scales`, transformers
integrations/mxfp4.py `convert_moe_packed_tensors`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from moeconv.tensor.axes import Array
from moeconv.tensor.companion import Companion
from moeconv.tensor.dtypes import QUANTISED, SIGNIFICAND_BITS, STORED, round_once
from moeconv.tensor.values import Affine, Cast, Fold, ValueOp, not_rounded

# Dtypes of stored values, and the significand bits of the longest number of each. A byte holds two
# numbers of e2m1, the first in its lower half; they lie along the array's last axis.
MAIN_BITS = {
    "int8": 7,
    "int4": 3,
    "float8_e4m3fn": 4,
    "float8_e5m2": 3,
    "float4_e2m1fn": 2,
    "uint8": 2,
}
# How much longer a product is. A byte holds an exponent, as e8m0 does: a power of two adds no bit.
SCALE_BITS = {**SIGNIFICAND_BITS, "float8_e8m0fnu": 0, "uint8": 0}

_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)


@dataclass(frozen=True)
class Scales:
    """Scales that are stored beside a tensor, and what those do with them that load it.

    Attributes:
        name: Of the tensor that holds them.
        dtype: Its dtype, a key of `SCALE_BITS`.
        shape: Its shape.
        blocks: Values along each axis of the quantised tensor that have one scale.
        through: See `Dequantise`; the last is the dtype of the numbers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    through: tuple[str, ...]


@dataclass(frozen=True)
class Dequantise:
    """`x · scale`, and a factor where the mapping has one, in float64, rounded once.

    It is exact where the product has no more significand bits than the target (but for overflow,
    which the engine refuses, and underflow to subnormals); otherwise each value is within half a
    unit in the last place of the target. Where a released model is read, a number is what
    transformers makes of it, which may round the product to float32 first (`through`). With the
    scales, `undo` gives the stored values again, as far as the numbers are normal in the target and
    no scale is zero. Numbers alone do not determine the scales: without them, the way back is the
    dequantised array.

    Attributes:
        source: Dtype of the stored values, a key of `MAIN_BITS`.
        target: Dtype of the numbers.
        axes: The stored array's axes that remain, in its order.
        scales: The scales, a positive number for each block; their axes are in the same order.
        scale_dtype: Their dtype, a key of `SCALE_BITS`.
        fold: A factor that the mapping moves into the weights.
        through: Dtypes to which the product is rounded first, one after the other.

    Raises:
        ValueError: A dtype that is no quantised value's or no scale's, an offset in the fold, or
            scales with other axes or in another order.
    """

    source: str
    target: str
    axes: tuple[str, ...]
    scales: Companion
    scale_dtype: str
    fold: Fold | None = None
    through: tuple[str, ...] = ()
    changes: bool = field(default=True, init=False)
    scratch: int = field(default=16, init=False)  # a float64, and a scale for each value

    def __post_init__(self) -> None:
        if self.source not in MAIN_BITS or self.scale_dtype not in SCALE_BITS:
            raise ValueError(f"no number is {self.source} times a scale in {self.scale_dtype}")
        if self.fold is not None and self.fold.offset:
            raise ValueError("an offset would round away what the scales cannot bring back")
        if tuple(axis for axis in self.axes if axis in self.scales.free) != self.scales.free:
            raise ValueError(
                f"{self.scales.source} has the axes {' '.join(self.scales.free)}, which are not "
                f"in this order among {' '.join(self.axes)}"
            )

    @property
    def number(self) -> str:
        """What the product is rounded to before its dtype is changed."""
        return self.through[-1] if self.through else self.target

    @property
    def companions(self) -> tuple[Companion, ...]:
        """The scales."""
        return (self.scales,)

    def describe(self) -> str:
        """The scales with their axes, the factor, and the dtypes."""
        factor = f" × {self.fold.why}" if self.fold is not None else ""
        axes = " ".join(axis for axis in self.scales.axes if axis not in self.scales.take)
        steps = " -> ".join(dict.fromkeys([self.source, *self.through, self.target]))
        return f"× {self.scales.source} [{axes}]{factor}, {steps}"

    def run(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """Computed in float64, rounded once."""
        return round_once(self._exact(values, others), self.target)

    def undo(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """By division in float64, rounded once; what a zero scale made zero stays zero."""
        wide = values.astype(np.float64)
        if self.fold is not None:
            wide /= self.fold.factor
        scales = self._scales(others)
        np.divide(wide, scales, out=wide, where=scales != 0)
        return _stored(wide, self.source)

    def bound(self) -> float:
        """Half a unit in the last place of each dtype to which the product may not fit."""
        product = MAIN_BITS[self.source] + SCALE_BITS[self.scale_dtype]
        power = self.fold is None or Affine(self.fold, "float32", "float32").bound() == 0.0
        bound = 0.0
        for dtype in (*self.through, self.target):
            bits = SIGNIFICAND_BITS[dtype]
            if product > bits or (dtype == self.target and not power):
                bound = (1.0 + bound) * (1.0 + 2.0**-bits) - 1.0
                product = bits
        return bound

    def undo_bound(self, largest: float) -> float:
        """Neighbouring stored values are further apart than rounding moves a product."""
        return 0.0

    def wrong(self, source: Array, target: Array, others: Sequence[Array] = ()) -> Array:
        """Where a value is not the exact product rounded once."""
        exact = self._exact(source, others)
        tolerance = np.abs(exact) * 2.0**-52 if self.fold is not None else 0.0
        return not_rounded(exact, tolerance, target, self.target)

    def inverse(self, stored: str) -> ValueOp:
        """There is none: companions are not in the target.

        Raises:
            ValueError: Always.
        """
        raise ValueError("what is read beside an array is not in the tensor")

    def perturb(self, values: Array, noise: Array) -> Array:
        """Moved by `noise` units in the last place of the target; zeros stay."""
        if self.fold is None:
            return Cast("float32", self.target).perturb(values, noise)
        return Affine(self.fold, "float32", self.target).perturb(values, noise)

    def _exact(self, values: Array, others: Sequence[Array]) -> Array:
        exact = _numbers(values)
        exact *= self._scales(others)
        for dtype in self.through:
            exact = round_once(exact, dtype).astype(np.float64)
        if self.fold is not None:
            exact *= self.fold.factor
        return exact

    def _scales(self, others: Sequence[Array]) -> Array:
        """The scales as float64, with an axis of one entry for each that they lack."""
        (scales,) = others
        if scales.dtype == np.uint8:
            scales = scales.view(STORED["float8_e8m0fnu"])
        sizes = iter(scales.shape)
        shape = [next(sizes) if axis in self.scales.free else 1 for axis in self.axes]
        return scales.astype(np.float64).reshape(shape)


def _numbers(stored: Array) -> Array:
    """Stored values as float64, without their scales."""
    if stored.dtype != np.uint8:
        return stored.astype(np.float64)
    pairs = np.stack([stored & 0xF, stored >> 4], axis=-1)
    shape = (*stored.shape[:-1], 2 * stored.shape[-1])
    numbers: Array = pairs.view(_E2M1).astype(np.float64).reshape(shape)
    return numbers


def _stored(numbers: Array, dtype: str) -> Array:
    """The nearest stored values."""
    if dtype.startswith("int"):
        return np.rint(numbers).astype(QUANTISED[dtype])
    if dtype != "uint8":
        return numbers.astype(QUANTISED[dtype])
    codes = numbers.astype(_E2M1).view(np.uint8)
    return np.asarray(codes[..., 0::2] | codes[..., 1::2] << 4)
