"""A second array that a value op reads: which box of it a box of the main array needs.

Scales of blocks of a quantised array are one, the factors of a low-rank update are others. The axes
of a companion are those of the main array, or blocks of them (`D/128`), and axes of its own (a
rank), which are read whole.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moeconv.tensor.axes import Array, Box, Range, Ranges, blocked


@dataclass(frozen=True)
class Companion:
    """An array that is read beside another.

    Attributes:
        source: Its name.
        axes: Its axes, in its order: `D` is that of the main array, `D/128` has an entry for each
            128 of it, the last perhaps for fewer, and `D/*` one for all of it; `H h` is two axes of
            the main array as one, and `H h/128` has an entry for each 128 of that.
        main: Size of each axis of the main array.
        take: Entry taken of each stacked axis (a layer, an expert), or of one that is fused.
    """

    source: str
    axes: tuple[str, ...]
    main: Mapping[str, int]
    take: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """The axes that remain, in its order: those of the main array without their blocks."""
        names = (name for axis in self.axes for name in blocked(axis)[0].split())
        return tuple(name for name in names if name not in self.take)

    def step(self, axis: str) -> int:
        """Values of the main array along an axis for one entry of this one."""
        name, block = blocked(axis)
        return block or self._size(name.split())

    def _size(self, axes: Sequence[str]) -> int:
        """Values of the main array along fused axes."""
        return math.prod(self.main[axis] for axis in axes)

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Which of its axes has another size than the main array asks for; empty if none has.

        Args:
            shape: Its shape as stored.
        """
        if len(shape) != len(self.axes):
            return f"{len(shape)} axes instead of {' '.join(self.axes)}"
        for axis, size in zip(self.axes, shape, strict=True):
            parts = blocked(axis)[0].split()
            if axis not in self.take and all(part in self.main for part in parts):
                expected = -(-self._size(parts) // self.step(axis))
                if size != expected:
                    return f"{size} entries on axis {axis} instead of {expected}"
        return ""

    def box(self, held: Ranges) -> Box:
        """The box of it that a box of the main array needs.

        Args:
            held: Ranges on the main array's axes.

        Returns:
            A fixed entry of each axis of `take`; a range on each other one.
        """
        found: list[slice | int] = []
        for axis in self.axes:
            if axis in self.take:
                found.append(self.take[axis])
            elif (span := self._span(axis, held)) is not None:
                step = self.step(axis)
                found.append(slice(span[0] // step, -(-span[1] // step)))
            else:
                found.append(slice(None))
        return tuple(found)

    def _span(self, axis: str, held: Ranges) -> Range | None:
        """The range of an axis of the main array, of fused ones by the outermost; None of none."""
        first, *inner = blocked(axis)[0].split()
        if first not in self.main:
            return None
        entry = self.take.get(first)
        start, stop = held[first] if entry is None else (entry, entry + 1)
        size = self._size(inner)
        return start * size, stop * size

    def spread(self, values: Array, held: Ranges) -> Array:
        """The entries of `box(held)`, repeated so that each axis has the length of the main box.

        An axis with one entry for all of the box keeps that one, which numpy repeats by itself.
        """
        kept = [axis for axis in self.axes if axis not in self.take]
        for position, axis in enumerate(kept):
            span = self._span(axis, held)
            step = 1 if span is None else self.step(axis)
            # Of fused axes each has its own length, so that nothing is left to numpy.
            if span is not None and step > 1 and (values.shape[position] > 1 or " " in axis):
                entries = np.arange(*span) // step - span[0] // step
                values = values.take(entries, axis=position)
        return self._apart(values, kept, held) if any(" " in axis for axis in kept) else values

    def _apart(self, values: Array, kept: list[str], held: Ranges) -> Array:
        """Entries for every value, with each axis of the main array apart, cut to its range."""
        shape: list[int] = []
        index: list[slice | int] = []
        for axis, size in zip(kept, values.shape, strict=True):
            first, *inner = blocked(axis)[0].split()
            shape += [size // self._size(inner), *(self.main[name] for name in inner)]
            index.append(0 if first in self.take else slice(None))
            index += [self.take.get(name, slice(*held.get(name, (0, 0)))) for name in inner]
        return values.reshape(shape)[tuple(index)]
