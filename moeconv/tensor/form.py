"""The normal form of a mapping: take, value, rearrange, place. All of it, in both directions.

Every rule comes down to `Form`s. A form takes entries of an array's stacked axes, maps the values,
rearranges the axes that remain, and places the result in a tensor: as a whole, padded or cropped,
at one entry of an axis that only the tensor has (interleaved or stacked parts), or behind other
parts. It does so for the whole or for any box of it, and it undoes and checks the same box.

A box is given as ranges on the tensor's axes, each axis apart (`target_axes`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moeconv.tensor.axes import Array, Box, Range, Ranges, Rearrangement, flatten
from moeconv.tensor.dtypes import DTYPES
from moeconv.tensor.values import ValueOp

# Rows of the source's outermost axis moved at a time when it becomes the target's innermost one:
# 16 values of 4 bytes are a cache line, which makes a transposition four to eight times as fast.
_STRIP = 16


@dataclass(frozen=True)
class Form:
    """How one box of an array becomes one box of a tensor.

    Attributes:
        axes: The array's axes, in its order.
        sizes: Size of each axis of the array, and of the parts that the rearrangement splits.
        take: Entry taken of each stacked axis (`Slice` of a layer, an expert).
        value: What is done to the values.
        rearrange: From the axes that remain, behind those of `place`, to the tensor's axes.
        place: For an axis that only the tensor has: the entry, and of how many.
        extent: Size in the tensor of an axis that is wider there, behind zeros, or narrower.
        base: Values of the tensor before this part, where parts follow each other.
    """

    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    take: Mapping[str, int]
    value: ValueOp
    rearrange: Rearrangement
    place: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    extent: Mapping[str, int] = field(default_factory=dict)
    base: int = 0

    # --- axes and shapes ------------------------------------------------------------------------

    @cached_property
    def free(self) -> tuple[str, ...]:
        """The array's axes that remain, in its order."""
        return tuple(axis for axis in self.axes if axis not in self.take)

    @cached_property
    def split(self) -> dict[str, tuple[str, ...]]:
        """The array's axes that are taken apart, e.g. `{"h": ("rotary", "pair")}`."""
        groups = self.rearrange.left[len(self.place) :]
        return {a: g for a, g in zip(self.free, groups, strict=True) if len(g) > 1}

    @cached_property
    def target_axes(self) -> tuple[str, ...]:
        """The tensor's axes in memory order, each apart."""
        return flatten(self.rearrange.right)

    @cached_property
    def target_shape(self) -> tuple[int, ...]:
        """Sizes of `target_axes`: with all entries of a placed axis, with the zeros of a wider."""
        return tuple(
            self.place[axis][1] if axis in self.place else self.extent.get(axis, self.sizes[axis])
            for axis in self.target_axes
        )

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part of the tensor that `target_axes` span, axes fused."""
        sizes = dict(zip(self.target_axes, self.target_shape, strict=True))
        return self.rearrange.right_shape(sizes)

    @cached_property
    def dtype(self) -> np.dtype[np.generic]:
        """The tensor's."""
        return DTYPES[self.value.target]

    @cached_property
    def lead(self) -> str:
        """The tensor's outermost axis that has more than this form's entry: blocks cut it."""
        return next((axis for axis in self.target_axes if axis not in self.place), "")

    # --- boxes ----------------------------------------------------------------------------------

    def ranges(self, held: Ranges) -> dict[str, Range]:
        """Where a box of the array belongs in the tensor; an axis that is split is held whole.

        Args:
            held: Ranges on the array's axes.

        Returns:
            Ranges on `target_axes`; one is empty where the tensor is narrower and ends before.
        """
        inner = {part for group in self.split.values() for part in group}
        found: dict[str, Range] = {}
        for axis in self.target_axes:
            if axis in self.place:
                entry, _ = self.place[axis]
                found[axis] = (entry, entry + 1)
                continue
            start, stop = (0, self.sizes[axis]) if axis in inner else held[axis]
            found[axis] = (start, min(stop, self.extent.get(axis, stop)))
        return found

    @cached_property
    def whole(self) -> dict[str, Range]:
        """The ranges of all of it."""
        return self.ranges({axis: (0, self.sizes[axis]) for axis in self.free})

    def holds(self, box: Mapping[str, Range]) -> bool:
        """True if a box of the array has the entries that are taken."""
        return all(box[axis][0] <= entry < box[axis][1] for axis, entry in self.take.items())

    def piece_shape(self, ranges: Ranges) -> tuple[int, ...]:
        """Shape of what `run` makes: the zeros of a wider axis come with its last values."""
        return tuple(
            (full if self._is_last(axis, ranges) else ranges[axis][1]) - ranges[axis][0]
            for axis, full in zip(self.target_axes, self.target_shape, strict=True)
        )

    def _is_last(self, axis: str, ranges: Ranges) -> bool:
        return axis not in self.place and ranges[axis][1] == self.whole[axis][1]

    def piece_bytes(self, ranges: Ranges) -> int:
        """Bytes of what `run` makes."""
        return math.prod(self.piece_shape(ranges)) * self.dtype.itemsize

    def is_contiguous(self, ranges: Ranges) -> bool:
        """True if a piece has no gaps in the tensor: whole on every axis behind `lead`."""
        behind = self.target_axes[self.target_axes.index(self.lead) + 1 :] if self.lead else ()
        shape = dict(zip(self.target_axes, self.piece_shape(ranges), strict=True))
        full = dict(zip(self.target_axes, self.target_shape, strict=True))
        return all(shape[axis] == full[axis] for axis in behind)

    def offset(self, ranges: Ranges) -> int:
        """Bytes of the tensor before the first value of a piece."""
        position = 0
        for axis, size in zip(self.target_axes, self.target_shape, strict=True):
            position = position * size + ranges[axis][0]
        return (self.base + position) * self.dtype.itemsize

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of the tensor for one step along `lead`."""
        behind = self.target_axes.index(self.lead) + 1 if self.lead else 0
        return math.prod(self.target_shape[behind:]) * self.dtype.itemsize

    @property
    def scratch(self) -> int:
        """Bytes of one value of a piece while it is made."""
        return max(self.value.scratch, self.dtype.itemsize)

    def work_bytes(self, ranges: Ranges) -> int:
        """Bytes while a piece is made: what is read, two temporaries, and the piece, with zeros."""
        values = math.prod(ranges[axis][1] - ranges[axis][0] for axis in self.target_axes)
        return 3 * values * self.scratch + self.piece_bytes(ranges)

    # --- data -----------------------------------------------------------------------------------

    def others(self, ranges: Ranges, read: Callable[[str, Box], Array]) -> tuple[Array, ...]:
        """What the value op reads beside a piece: its companions' values.

        Args:
            ranges: Of the piece, on the tensor's axes.
            read: Gives a box of an array, by its name.
        """
        if not self.value.companions:
            return ()
        held = self._held(ranges)
        return tuple(c.spread(read(c.source, c.box(held)), held) for c in self.value.companions)

    def companion_boxes(self, ranges: Ranges) -> list[tuple[str, Box]]:
        """The boxes that `others` reads, with the names of their arrays."""
        return [(c.source, c.box(self._held(ranges))) for c in self.value.companions]

    def _held(self, ranges: Ranges) -> dict[str, Range]:
        """Ranges on the array's axes that remain; an axis that is split is held whole."""
        return {axis: ranges.get(axis, (0, self.sizes[axis])) for axis in self.free}

    def run(self, block: Array, ranges: Ranges, others: Sequence[Array] = ()) -> Array:
        """Makes a piece of the tensor.

        Args:
            block: The array's values, C order, axes `free`, cut to `ranges`.
            ranges: On the tensor's axes.
            others: What `others` gives for them.

        Returns:
            C-contiguous, of the tensor's dtype, axes `target_axes`, of `piece_shape(ranges)`.
        """
        values = self._arranged(self.value.run(block, others))
        shape = self.piece_shape(ranges)
        padded = shape != values.shape
        if not padded and self.rearrange.is_identity:
            return np.ascontiguousarray(values)
        out = (np.zeros if padded else np.empty)(shape, values.dtype)
        _transpose(values, out[tuple(slice(0, n) for n in values.shape)])
        return out

    def undo(self, piece: Array, others: Sequence[Array] = ()) -> Array:
        """The array's values again, axes `free`, from a piece of the tensor without its zeros."""
        return self.value.undo(self._fused(self._as_stored(piece)), others)

    def wrong(self, block: Array, piece: Array, others: Sequence[Array] = ()) -> Array:
        """Where a piece of the tensor is not what `run` makes of a block: a mask like `piece`.

        The values of the tensor are taken back to the array's axes and judged there, so that the
        code that wrote them is not what they are compared with.
        """
        stored = self._as_stored(piece)
        if others:  # they have the array's axes
            fused = self._fused(stored)
            mask = self.value.wrong(block, fused, others).reshape(stored.shape)
        else:
            mask = self.value.wrong(block.reshape(stored.shape), stored)
        return mask.transpose(self.rearrange.permutation)

    def wrong_back(self, block: Array, piece: Array) -> Array:
        """Where a block of the array is not what undoing a piece gives: a mask like `piece`.

        Each value must be the piece's, taken back and rounded once to the array's dtype. Where a
        tensor was there first, `wrong` alone would not see the low bits of a wider array.
        """
        stored = self._as_stored(piece)
        back = self.value.inverse(self.value.target)
        return back.wrong(stored, block.reshape(stored.shape)).transpose(self.rearrange.permutation)

    def padding(self) -> list[tuple[slice, ...]]:
        """The boxes of the tensor, axes apart, that hold zeros which no value of the array is."""
        return [
            tuple(
                slice(self.whole[a][1], full) if a == axis else slice(None)
                for a in self.target_axes
            )
            for axis, full in zip(self.target_axes, self.target_shape, strict=True)
            if axis not in self.place and self.whole[axis][1] < full
        ]

    def box(self, ranges: Ranges) -> tuple[slice, ...]:
        """Ranges as an index into the tensor, axes apart."""
        return tuple(slice(*ranges[axis]) for axis in self.target_axes)

    def _arranged(self, values: Array) -> Array:
        """A view of a block with the tensor's axes, each apart."""
        shape = [1] * len(self.place)
        for axis, size in zip(self.free, values.shape, strict=True):
            group = self.split.get(axis)
            shape += [self.sizes[part] for part in group] if group else [size]
        return values.reshape(shape).transpose(self.rearrange.permutation)

    def _as_stored(self, piece: Array) -> Array:
        """A view of a piece with the array's axes, each apart."""
        return piece.transpose(np.argsort(self.rearrange.permutation))

    def _fused(self, apart: Array) -> Array:
        """The array's axes `free`, from each apart."""
        sizes = iter(apart.shape[len(self.place) :])
        groups = self.rearrange.left[len(self.place) :]
        return apart.reshape([math.prod(next(sizes) for _ in group) for group in groups])

    # --- the way back ---------------------------------------------------------------------------

    def inverse(self, stored: str) -> "Form":
        """How the tensor becomes this part of the array again.

        Its source is what the tensor has from `base` on, with axes `target_axes`, each apart; where
        the tensor is narrower than the array, the rest of the array becomes zeros.

        Args:
            stored: Dtype of the tensor.

        Raises:
            ValueError: The value op has no way back.
        """
        sizes = dict(zip(self.target_axes, self.target_shape, strict=True))
        free = [(axis,) for axis in self.target_axes if axis not in self.place]
        groups = iter(self.rearrange.left[len(self.place) :])
        back = tuple((axis,) if axis in self.take else next(groups) for axis in self.axes)
        return Form(
            axes=self.target_axes,
            sizes={**sizes, **{axis: self.sizes[axis] for axis in self.take}},
            take={axis: entry for axis, (entry, _) in self.place.items()},
            value=self.value.inverse(stored),
            rearrange=Rearrangement(tuple((axis,) for axis in self.take) + tuple(free), back),
            place={axis: (entry, self.sizes[axis]) for axis, entry in self.take.items()},
            extent={axis: self.sizes[axis] for axis in self.extent},
        )

    # --- words ----------------------------------------------------------------------------------

    def steps(self) -> list[str]:
        """What is done, in order, for people and for the plan's digest."""
        found = [f"[{axis}={entry}]" for axis, entry in self.take.items()]
        found.append(str(self.rearrange))
        if done := self.value.describe():
            found.append(done)
        for axis, size in self.extent.items():
            position = self.rearrange.right.index((axis,))
            found.append(
                f"zeros from {self.sizes[axis]} to {size} on axis {position}"
                if size > self.sizes[axis]
                else f"first {size} of {self.sizes[axis]} on axis {position}"
            )
        found += [f"at {axis}={entry} of {count}" for axis, (entry, count) in self.place.items()]
        return found


def _transpose(source: Array, target: Array) -> None:
    """Copies between two layouts of the same shape, strip by strip."""
    last = source.ndim - 1
    if source.ndim < 2 or source.strides[last] == source.itemsize:
        np.copyto(target, source)
        return
    for start in range(0, source.shape[last], _STRIP):
        strip = (..., slice(start, start + _STRIP))
        np.copyto(target[strip], source[strip])
