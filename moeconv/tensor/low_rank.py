"""A low-rank update that is added to an array: `(x + scale · A·B) · factor`, rounded once.

The factors are companions: A has some of the array's axes and a rank, B the rank and the others, as
LoRA trains them (`mapping.lora`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moeconv.tensor.axes import Array
from moeconv.tensor.companion import Companion
from moeconv.tensor.dtypes import SIGNIFICAND_BITS, round_once
from moeconv.tensor.values import Affine, Cast, Fold, ValueOp, not_rounded


@dataclass(frozen=True)
class LowRankUpdate:
    """`(x + scale · A·B) · factor` in float64, rounded once, to the target's dtype.

    Each value is within half a unit in the last place of the exact sum, but for float64's own
    rounding: (rank + 4) · 2**-53 of the sum of absolute products.

    Attributes:
        source: Dtype of the array.
        target: Dtype of what comes out.
        axes: The array's axes that remain, in its order.
        first: A.
        second: B.
        rank: Size of the axis that only they have.
        scale: What their product is multiplied by.
        fold: A factor that the mapping moves into the weights.

    Raises:
        ValueError: The fold has an offset.
    """

    source: str
    target: str
    axes: tuple[str, ...]
    first: Companion
    second: Companion
    rank: int
    scale: float
    fold: Fold | None = None
    changes: bool = field(default=True, init=False)
    scratch: int = field(default=24, init=False)  # the sum, the product, and what is rounded

    def __post_init__(self) -> None:
        if self.fold is not None and self.fold.offset:
            raise ValueError("an offset is no factor of a low-rank update")

    @property
    def number(self) -> str:
        """The source's."""
        return self.source

    @property
    def companions(self) -> tuple[Companion, ...]:
        """A and B."""
        return (self.first, self.second)

    def describe(self) -> str:
        """The factors' names, the scale, the factor, and the dtypes."""
        factor = f" × {self.fold.why}" if self.fold is not None else ""
        cast = "" if self.source == self.target else f", {self.source} -> {self.target}"
        names = f"{self.first.source} · {self.second.source}"
        return f"+ {self.scale:g} · {names} (rank {self.rank}){factor}{cast}"

    def run(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """Computed in float64, rounded once."""
        exact = values.astype(np.float64) + self.scale * self._product(*others)
        return round_once(exact * self._factor, self.target)

    def undo(self, values: Array, others: Sequence[Array] = ()) -> Array:
        """By division and subtraction in float64, rounded once."""
        wide = values.astype(np.float64) / self._factor
        return round_once(wide - self.scale * self._product(*others), self.source)

    def bound(self) -> float:
        """Half a unit in the last place of the target."""
        return 2.0 ** -SIGNIFICAND_BITS[self.target]

    def undo_bound(self, largest: float) -> float:
        """For sums up to `largest`, and values too: what either rounding does."""
        there = self.bound() * largest
        return there + 2.0 ** -SIGNIFICAND_BITS[self.source] * (largest + there)

    def wrong(self, source: Array, target: Array, others: Sequence[Array] = ()) -> Array:
        """Where a value is not the exact sum rounded once."""
        wide = source.astype(np.float64)
        exact = (wide + self.scale * self._product(*others)) * self._factor
        absolute = [np.abs(other.astype(np.float64)) for other in others]
        sizes = np.abs(wide) + abs(self.scale) * self._product(*absolute)
        tolerance = (self.rank + 4) * 2.0**-53 * abs(self._factor) * sizes
        return not_rounded(exact, tolerance, target, self.target)

    def inverse(self, stored: str) -> ValueOp:
        """There is none: companions are not in the target.

        Raises:
            ValueError: Always.
        """
        raise ValueError("what is read beside an array is not in the tensor")

    def perturb(self, values: Array, noise: Array) -> Array:
        """Of sums: moved by `noise` units in the last place of the target."""
        if self.fold is None:
            return Cast("float32", self.target).perturb(values, noise)
        return Affine(self.fold, "float32", self.target).perturb(values, noise)

    @property
    def _factor(self) -> float:
        return 1.0 if self.fold is None else self.fold.factor

    def _product(self, first: Array, second: Array) -> Array:
        """A·B in float64, on the array's axes."""
        names = dict.fromkeys((*self.axes, *self.first.free, *self.second.free))
        number = {name: position for position, name in enumerate(names)}
        found: Array = np.einsum(
            first.astype(np.float64), [number[name] for name in self.first.free],
            second.astype(np.float64), [number[name] for name in self.second.free],
            [number[name] for name in self.axes],
            optimize=True,
        )  # fmt: skip
        return found
