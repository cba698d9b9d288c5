"""A second array that a value op reads: which box of it a box of the main array needs.

Scales of blocks of a quantised array are one, the factors of a low-rank update are others. The axes
of a companion are those of the main array, or blocks of them (`D/128`), and axes of its own (a
rank), which are read whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moeconv.tensor.axes import Array, Box, Ranges, blocked


@dataclass(frozen=True)
class Companion:
    """An array that is read beside another.

    Attributes:
        source: Its name.
        axes: Its axes, in its order: `D` is that of the main array, `D/128` has an entry for each
            128 of it, the last perhaps for fewer, and `D/*` one for all of it; `H h` is two axes of
            the main array as one.
        main: Size of each axis of the main array.
        take: Entry taken of each stacked axis (a layer, an expert).
    """

    source: str
    axes: tuple[str, ...]
    main: Mapping[str, int]
    take: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """The axes that remain, in its order: those of the main array without their blocks."""
        names = [axis.split() for axis in self.axes if axis not in self.take]
        return tuple(blocked(name)[0] for axis in names for name in axis)

    def step(self, axis: str) -> int:
        """Values of the main array along an axis for one entry of this one."""
        name, block = blocked(axis)
        return block or self.main[name]

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Which of its axes has another size than the main array asks for; empty if none has.

        Args:
            shape: Its shape as stored.
        """
        if len(shape) != len(self.axes):
            return f"{len(shape)} axes instead of {' '.join(self.axes)}"
        for axis, size in zip(self.axes, shape, strict=True):
            name, parts = blocked(axis)[0], axis.split()
            if axis not in self.take and (name in self.main or len(parts) > 1):
                if len(parts) > 1:
                    expected = math.prod(self.main[part] for part in parts)
                else:
                    expected = -(-self.main[name] // self.step(axis))
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
            name = blocked(axis)[0]
            if axis in self.take:
                found.append(self.take[axis])
            elif len(parts := axis.split()) > 1:
                inner = math.prod(self.main[part] for part in parts[1:])
                found.append(slice(held[parts[0]][0] * inner, held[parts[0]][1] * inner))
            elif name in held:
                step = self.step(axis)
                found.append(slice(held[name][0] // step, -(-held[name][1] // step)))
            else:
                found.append(slice(None))
        return tuple(found)

    def spread(self, values: Array, held: Ranges) -> Array:
        """The entries of `box(held)`, repeated so that each axis has the length of the main box.

        An axis with one entry for all of the box keeps that one, which numpy repeats by itself.
        """
        kept = [axis for axis in self.axes if axis not in self.take]
        if any(" " in axis for axis in kept):
            values, kept = self._apart(values, kept, held), list(self.free)
        for position, axis in enumerate(kept):
            name, step = blocked(axis)[0], 1
            if name in held:
                step = self.step(axis)
            if step > 1 and values.shape[position] > 1:
                start, stop = held[name]
                entries = np.arange(start, stop) // step - start // step
                values = values.take(entries, axis=position)
        return values

    def _apart(self, values: Array, kept: list[str], held: Ranges) -> Array:
        """The entries of `box(held)` with each axis of the main array apart, cut to its range."""
        shape: list[int] = []
        index: list[slice] = []
        for axis, size in zip(kept, values.shape, strict=True):
            inner = axis.split()[1:]
            shape += [size // math.prod(self.main[name] for name in inner)]
            shape += [self.main[name] for name in inner]
            index += [slice(None), *(slice(*held[name]) for name in inner)]
        return values.reshape(shape)[tuple(index)]
