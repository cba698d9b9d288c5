"""What is done to the values of a tensor, each op with its way back and its own verdict.

A value op is the only part of a mapping that may round. It rounds once, and knows how far that
moves a value, how to go back, and whether a value that is already written is the right one. A new
op is one class here; nothing outside asks which op it has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moeconv.tensor.axes import Array
from moeconv.tensor.companion import Companion
from moeconv.tensor.dtypes import (
    DTYPES,
    SIGNIFICAND_BITS,
    SMALLEST_EXPONENT,
    bits,
    round_once,
    ulp,
)


@dataclass(frozen=True)
class Fold:
    """A factor and an offset that a mapping moves into weights: `x · factor + offset`.

    Attributes:
        why: Both in words, such as `sqrt(head_dim)`.
        reason: Why the mapping has them, with the source of that fact.
    """

    factor: float
    why: str
    offset: float = 0.0
    reason: str = ""


class ValueOp(Protocol):
    """An elementwise map from arrays of dtype `source` to arrays of dtype `target`.

    An op with companions is given the box of each that belongs to the values, spread to their
    size (`Companion.spread`), as `others`; an op without them ignores it.
    """

    @property
    def source(self) -> str:
        """Dtype of what goes in."""

    @property
    def target(self) -> str:
        """Dtype of what comes out."""

    @property
    def number(self) -> str:
        """Dtype of the numbers that go in: `source`, unless what goes in is quantised."""

    @property
    def scratch(self) -> int:
        """Bytes of one value while it is computed."""

    @property
    def changes(self) -> bool:
        """False if the values are those of the source, bit for bit."""

    @property
    def fold(self) -> Fold | None:
        """What is moved into the weights; None where nothing is."""

    @property
    def companions(self) -> tuple[Companion, ...]:
        """The arrays that are read beside the values."""

    def describe(self) -> str:
        """One phrase; empty where nothing changes."""

    def run(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """The target's values; a number that overflows becomes Inf."""

    def undo(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """The source's values, rounded once to the source's dtype."""

    def bound(self) -> float:
        """Largest relative error of `run` for one normal number; 0.0 when it is exact."""

    def undo_bound(self, largest: float) -> float:
        """Largest absolute error of `undo(run(x))` for normal numbers up to `largest`."""

    def wrong(self, source: Array, target: Array, others: Sequence[Array] = ()) -> Array:
        """Where `target` is not `run(source)`, value by value: a mask."""

    def inverse(self, stored: str) -> "ValueOp":
        """The op back, from a target of which this is the dtype, to the source's.

        Raises:
            ValueError: There is none.
        """

    def perturb(self, values: Array, noise: Array) -> Array:
        """float32 source values, moved as far as rounding the target may move them.

        Args:
            values: The source's; of a quantised one, the numbers that it stands for.
            noise: Of the same shape, uniform between -0.5 and 0.5 units in the last place.
        """


@dataclass(frozen=True)
class Cast:
    """Converts to another dtype, rounding to the nearest where it narrows; ties go to even."""

    source: str
    target: str
    fold: Fold | None = field(default=None, init=False)
    companions: tuple[Companion, ...] = field(default=(), init=False)

    @property
    def number(self) -> str:
        """The source's."""
        return self.source

    @property
    def changes(self) -> bool:
        """False if the dtypes are the same."""
        return self.source != self.target

    @property
    def scratch(self) -> int:
        """Bytes of one value while it is computed."""
        return DTYPES[self.target].itemsize

    def describe(self) -> str:
        """One phrase; empty where nothing changes."""
        return f"{self.source} -> {self.target}" if self.changes else ""

    def run(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """The same numbers, rounded once."""
        return _cast(values, self.target) if self.changes else values

    def undo(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """The cast back."""
        return _cast(values, self.source) if self.changes else values

    def bound(self) -> float:
        """Half a unit in the last place where it narrows."""
        widens = self.target in ("float32", self.source)
        return 0.0 if widens else 2.0 ** -SIGNIFICAND_BITS[self.target]

    def undo_bound(self, largest: float) -> float:
        """What was rounded on the way there stays so."""
        return self.bound() * largest

    def wrong(self, source: Array, target: Array, others: Sequence[Array] = ()) -> Array:
        """Widened values are compared wide: narrowing them would round a wrong low bit away."""
        if self.bound() == 0.0:
            return np.asarray(bits(target) != bits(self.run(source)))
        return not_rounded(source.astype(np.float64), 0.0, target, self.target)

    def inverse(self, stored: str) -> "Cast":
        """The cast back."""
        return Cast(stored, self.source)

    def perturb(self, values: Array, noise: Array) -> Array:
        """Moved by `noise` units in the last place of the target; zeros stay."""
        return np.asarray(values + noise * spacing_of(values, self.target))


@dataclass(frozen=True)
class Affine:
    """`x · factor + offset` in float64, rounded once, to the target's dtype.

    Without an offset it is exact when the factor is a power of two and the target no narrower than
    the source (but for overflow, which the engine refuses, and underflow to subnormals); otherwise
    each value is within half a unit in the last place of the target.
    """

    fold: Fold
    source: str
    target: str
    companions: tuple[Companion, ...] = field(default=(), init=False)

    @property
    def number(self) -> str:
        """The source's."""
        return self.source

    @property
    def changes(self) -> bool:
        """Always."""
        return True

    @property
    def scratch(self) -> int:
        """Bytes of one value while it is computed: a float64."""
        return 8

    def describe(self) -> str:
        """The words, and the dtypes where they differ."""
        cast = "" if self.source == self.target else f", {self.source} -> {self.target}"
        done = f"× {self.fold.why}" if self.fold.offset == 0.0 else self.fold.why
        return f"{done}{cast}"

    def _exact(self, values: Array) -> Array:
        exact = values.astype(np.float64) * self.fold.factor
        return exact + self.fold.offset if self.fold.offset else exact

    def run(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """Computed in float64, rounded once."""
        return round_once(self._exact(values), self.target)

    def undo(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """By subtraction and division in float64, rounded once."""
        wide = values.astype(np.float64)
        if self.fold.offset:
            wide -= self.fold.offset
        return round_once(wide / self.fold.factor, self.source)

    def bound(self) -> float:
        """Half a unit in the last place of the target, where it rounds at all."""
        factor, offset = self.fold.factor, self.fold.offset
        power_of_two = factor > 0 and math.frexp(factor)[0] == 0.5
        if power_of_two and offset == 0.0 and self.target in ("float32", self.source):
            return 0.0
        return 2.0 ** -SIGNIFICAND_BITS[self.target]

    def undo_bound(self, largest: float) -> float:
        """The rounding there, divided by the factor, and the rounding back.

        It is absolute: next to `-offset / factor` no relative error holds.
        """
        factor = abs(self.fold.factor)
        there = self.bound() * (factor * largest + abs(self.fold.offset)) / factor
        back = 2.0 ** -SIGNIFICAND_BITS[self.source] * (largest + there)
        return there + back if there else 0.0

    def wrong(self, source: Array, target: Array, others: Sequence[Array] = ()) -> Array:
        """Where a value is not the exact one rounded once."""
        exact = self._exact(source)
        # The rounding of this very sum, and product, in float64. Two numbers of 24 bits, as all
        # dtypes have at most, make an exact product.
        tolerance = np.abs(exact) * 2.0**-52
        if np.float32(self.fold.factor) != self.fold.factor:
            tolerance += np.abs(source.astype(np.float64) * self.fold.factor) * 2.0**-52
        return not_rounded(exact, tolerance, target, self.target)

    def inverse(self, stored: str) -> "Unfold":
        """The division back."""
        return Unfold(self.fold, stored, self.source)

    def perturb(self, values: Array, noise: Array) -> Array:
        """Moved by `noise` units in the last place of the target, and taken back."""
        factor, offset = np.float32(self.fold.factor), np.float32(self.fold.offset)
        mapped = values * factor + offset
        moved = mapped + noise * spacing_of(mapped, self.target)
        return np.asarray((moved - offset) / factor)


@dataclass(frozen=True)
class Unfold:
    """`(x - offset) / factor` in float64, rounded once: the way back from `Affine`.

    It divides, as multiplying by the inverse of a factor that is no power of two would round twice.
    """

    fold: Fold
    source: str
    target: str
    companions: tuple[Companion, ...] = field(default=(), init=False)

    @property
    def number(self) -> str:
        """The source's."""
        return self.source

    @property
    def changes(self) -> bool:
        """Always."""
        return True

    @property
    def scratch(self) -> int:
        """Bytes of one value while it is computed: a float64."""
        return 8

    def describe(self) -> str:
        """The words, and the dtypes where they differ."""
        cast = "" if self.source == self.target else f", {self.source} -> {self.target}"
        if self.fold.offset == 0.0:
            return f"/ {self.fold.why}{cast}"
        return f"x of {self.fold.why}{cast}"

    def _exact(self, values: Array) -> Array:
        exact = values.astype(np.float64)
        if self.fold.offset:
            exact -= self.fold.offset
        return exact / self.fold.factor

    def run(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """Computed in float64, rounded once."""
        return round_once(self._exact(values), self.target)

    def undo(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """What `Affine` does."""
        return self.inverse(self.target).run(values)

    def bound(self) -> float:
        """Half a unit in the last place of the target, where it rounds at all."""
        return self.inverse(self.target).bound() and 2.0 ** -SIGNIFICAND_BITS[self.target]

    def undo_bound(self, largest: float) -> float:
        """The rounding there, as `Affine` makes it larger, and the rounding back; absolute."""
        factor, offset = abs(self.fold.factor), abs(self.fold.offset)
        there = self.bound() * (largest + offset)
        back = 2.0 ** -SIGNIFICAND_BITS[self.source] * (largest + there)
        return there + back if factor and there else 0.0

    def wrong(self, source: Array, target: Array, others: Sequence[Array] = ()) -> Array:
        """Where a value is not the exact one rounded once."""
        exact = self._exact(source)
        # The rounding of this very difference, and quotient, in float64.
        tolerance = np.abs(exact) * 2.0**-51
        if self.fold.offset:
            wide = np.abs(source.astype(np.float64)) + abs(self.fold.offset)
            tolerance = tolerance + wide * 2.0**-52 / abs(self.fold.factor)
        return not_rounded(exact, tolerance, target, self.target)

    def inverse(self, stored: str) -> Affine:
        """The product again."""
        return Affine(self.fold, stored, self.source)

    def perturb(self, values: Array, noise: Array) -> Array:
        """Moved by `noise` units in the last place of the target, and taken back."""
        factor, offset = np.float32(self.fold.factor), np.float32(self.fold.offset)
        mapped = (values - offset) / factor
        moved = mapped + noise * spacing_of(mapped, self.target)
        return np.asarray(moved * factor + offset)


def _cast(values: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which the engine refuses
        return values.astype(DTYPES[dtype])


def not_rounded(exact: Array, tolerance: Array | float, target: Array, dtype: str) -> Array:
    """Where a value is not `exact` (float64, within `tolerance`) rounded to the nearest, once."""
    half = 0.5 * ulp(exact, dtype)
    got = target.astype(np.float64)
    apart = np.abs(got - exact)
    odd = (bits(target) & 1).astype(bool).reshape(target.shape)
    # A value half way between two numbers goes to the even one.
    wrong = ~(apart <= half + tolerance) | (odd & (apart >= half) & (tolerance < half))
    return np.asarray(wrong | (np.signbit(got) != np.signbit(exact)))  # -0.0 is not 0.0


def spacing_of(values: Array, dtype: str) -> Array:
    """Units in the last place of a dtype around float32 values, by their exponent bits alone."""
    power = (values.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    smallest = np.float32(2.0 ** SMALLEST_EXPONENT[dtype])
    spacing = np.maximum(power, smallest) * np.float32(2.0 ** (1 - SIGNIFICAND_BITS[dtype]))
    spacing[values == 0] = 0  # a zero is rounded to itself
    return np.asarray(spacing)
