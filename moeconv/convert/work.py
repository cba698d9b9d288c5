"""From edges to units of work: which chunks are read together, and where each piece of them goes.

A unit is a box of one source array that is read and decoded once. It is one chunk, or several where
the chunks are small or cut an axis that a rule splits. Each entry of the unit's stacked axes (a
layer, an expert) takes a route into one target tensor, or into several copies of it.

A route's piece is contiguous in the target when the unit holds all of every target axis but the
first. Otherwise (a checkpoint sharded along the inner axis of the transposed tensor) pieces are
parked in a scratch file, and each tensor is settled from them once all have arrived.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from moeconv.mapping.axes import flatten
from moeconv.mapping.edges import Edge
from moeconv.mapping.ops import DTYPES, Cast, Pad, Rearrange, Replicate, Scale
from moeconv.orbax.arrays import ArrayInfo, Box

MIB = 2**20
BLOCK_BYTES = 8 * MIB  # of a target tensor, transposed and written at a time
UNIT_BYTES = 64 * MIB  # chunks are read together up to this, or up to the largest single chunk

Range = tuple[int, int]


@dataclass(frozen=True)
class Route:
    """How one entry of a source array's stacked axes becomes a tensor.

    Attributes:
        edges: The tensors it is written to: one, or the copies of a replicated one.
        axes: The source's axes.
        index: Entries taken of stacked axes.
    """

    edges: tuple[Edge, ...]
    axes: tuple[str, ...]
    index: Mapping[str, int]

    @cached_property
    def place(self) -> Rearrange:
        """The rearrangement."""
        return next(op for op in self.edges[0].ops if isinstance(op, Rearrange))

    @cached_property
    def scale(self) -> Scale | None:
        """The factor, if any."""
        return next((op for op in self.edges[0].ops if isinstance(op, Scale)), None)

    @cached_property
    def cast(self) -> Cast | None:
        """The conversion of dtype, if any."""
        return next((op for op in self.edges[0].ops if isinstance(op, Cast)), None)

    @cached_property
    def free(self) -> tuple[str, ...]:
        """Source axes that remain, in source order."""
        return tuple(a for a in self.axes if a not in self.index)

    @cached_property
    def target_axes(self) -> tuple[str, ...]:
        """Axes of the target in memory order, unfused."""
        return flatten(self.place.by.right)

    @cached_property
    def target_shape(self) -> tuple[int, ...]:
        """Sizes of `target_axes`, padding included."""
        pad = next((op for op in self.edges[0].ops if isinstance(op, Pad)), None)
        sizes = dict(self.edges[0].sizes)
        if pad is not None:
            sizes["F"] = pad.target
        return tuple(sizes[a] for a in self.target_axes)

    @property
    def lead(self) -> str:
        """The outermost target axis, along which blocks are cut."""
        return self.target_axes[0]

    @cached_property
    def split(self) -> dict[str, tuple[str, ...]]:
        """Source axes that the rearrangement takes apart, e.g. `{"h": ("rotary", "pair")}`."""
        return {
            axis: group
            for axis, group in zip(self.free, self.place.by.left, strict=True)
            if len(group) > 1
        }

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of the target for one step along `lead`."""
        itemsize = DTYPES[self.edges[0].dtype].itemsize
        return math.prod(self.target_shape[1:]) * itemsize

    @property
    def rows_per_block(self) -> int:
        """Steps along `lead` that fit a block, in float64 where it is scaled."""
        width = 8 * math.prod(self.target_shape[1:]) if self.scale else self.row_bytes
        return max(1, BLOCK_BYTES // max(1, width))


@dataclass(frozen=True)
class Unit:
    """A box of one array, read and decoded once.

    Attributes:
        array: The source array.
        box: Range on each of its axes.
        number: Its position in the plan's order, which is also its name in the journal.
    """

    array: ArrayInfo
    box: tuple[Range, ...]
    number: int

    @property
    def nbytes(self) -> int:
        """Bytes, decoded."""
        return math.prod(stop - start for start, stop in self.box) * self.array.itemsize

    @property
    def chunk_count(self) -> int:
        """Number of its chunks."""
        return math.prod(map(len, self._steps))

    @property
    def decoded_bytes(self) -> int:
        """Bytes of its chunks when they are decoded, each whole."""
        return self.chunk_count * self.array.decoded_bytes

    @property
    def _steps(self) -> list[range]:
        """Its chunks' places along each axis of the grid."""
        return [
            range(start // c, -(-stop // c))
            for (start, stop), c in zip(self.box, self.array.chunk, strict=True)
        ]

    def chunks(self) -> Iterator[tuple[tuple[int, ...], tuple[Range, ...]]]:
        """Grid position and box of every chunk in the unit, in grid order."""
        for position in _product(self._steps):
            box = tuple(
                (p * c, min((p + 1) * c, n))
                for p, c, n in zip(position, self.array.chunk, self.array.shape, strict=True)
            )
            yield position, box


def _product(ranges: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    if not ranges:
        yield ()
        return
    for head in ranges[0]:
        for tail in _product(ranges[1:]):
            yield (head, *tail)


def routes_of(edges: Sequence[Edge]) -> dict[str, tuple[Route, ...]]:
    """Groups edges by source array and entry; filled tensors have no route."""
    grouped: dict[str, dict[tuple[tuple[str, int], ...], list[Edge]]] = {}
    for edge in edges:
        if edge.source is not None:
            key = tuple(sorted(edge.index.items()))
            # A second use of an array (an untied head) is a route of its own: it may differ.
            uses = grouped.setdefault(edge.source.name, {})
            kin = uses.get(key)
            if kin is not None and not _copies(kin[0], edge):
                key = (*key, (edge.target, 0))
            uses.setdefault(key, []).append(edge)
    return {
        name: tuple(
            Route(tuple(group), source.axes, group[0].index)
            for group in uses.values()
            if (source := group[0].source) is not None
        )
        for name, uses in grouped.items()
    }


def _copies(one: Edge, other: Edge) -> bool:
    """Whether two edges write the same bytes."""

    def values(edge: Edge) -> tuple[object, ...]:
        return (*(op for op in edge.ops if not isinstance(op, Replicate)), edge.dtype, edge.shape)

    return values(one) == values(other)


def unit_boxes(
    info: ArrayInfo, axes: Sequence[str], routes: Sequence[Route], limit: int
) -> list[tuple[Range, ...]]:
    """Cuts an array into units of whole chunks.

    Chunks are joined along axes that a route takes apart (always), then, while a unit stays within
    `limit` bytes, along the target's inner axes (so that pieces become contiguous) and the rest.
    """
    step = [min(c, n) for c, n in zip(info.chunk, info.shape, strict=True)]
    must = {a for r in routes for a in r.split}
    inner = [a for r in routes for a in r.target_axes[1:]]
    order = [
        *(i for i, a in enumerate(axes) if a in must),
        *(i for i, a in enumerate(axes) if a in inner and a not in must),
        *(i for i, a in reversed(list(enumerate(axes))) if a not in must and a not in inner),
    ]
    for i in order:
        if step[i] == info.shape[i]:
            continue
        rest = math.prod(s for j, s in enumerate(step) if j != i) * info.itemsize
        count = info.shape[i] if axes[i] in must else max(1, limit // max(1, rest * info.chunk[i]))
        step[i] = min(info.shape[i], count * info.chunk[i])
    starts = [range(0, n, s) if n else range(1) for n, s in zip(info.shape, step, strict=True)]
    return [
        tuple((a, min(a + s, n)) for a, s, n in zip(corner, step, info.shape, strict=True))
        for corner in _product(starts)
    ]


def pieces(unit: Unit, routes: Sequence[Route]) -> Iterator[tuple[int, dict[str, Range]]]:
    """Routes that a unit feeds (by position), with the ranges of the target's axes it holds."""
    held = dict(zip(routes[0].axes, unit.box, strict=True))
    for number, route in enumerate(routes):
        if all(held[a][0] <= i < held[a][1] for a, i in route.index.items()):
            yield number, target_ranges(route, held)


def target_ranges(route: Route, held: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges on the target's unfused axes; a split axis is always held whole."""
    sizes = route.edges[0].sizes
    inner = {sub for group in route.split.values() for sub in group}
    return {a: (0, sizes[a]) if a in inner else held[a] for a in route.target_axes}


def is_contiguous(route: Route, ranges: Mapping[str, Range]) -> bool:
    """Whether a piece lies in the target without gaps: whole on every axis but the first.

    A padded axis counts as whole when its source part is: the zeros are written with it.
    """
    sizes = route.edges[0].sizes
    return all(ranges[a] == (0, sizes[a]) for a in route.target_axes[1:])


def source_box(unit: Unit, route: Route, ranges: Mapping[str, Range]) -> Box:
    """The source's box for a block: fixed entries, and ranges on the other axes."""
    held = dict(zip(route.axes, unit.box, strict=True))
    box: list[slice | int] = []
    for axis in route.axes:
        if axis in route.index:
            box.append(route.index[axis])
        else:
            start, stop = ranges.get(axis, held[axis])
            box.append(slice(start, stop))
    return tuple(box)


def piece_shape(route: Route, ranges: Mapping[str, Range]) -> tuple[int, ...]:
    """Shape of a piece as `arrange` makes it: padding comes with the last values of its axis."""
    sizes = route.edges[0].sizes
    return tuple(
        (full if ranges[a][1] == sizes[a] else ranges[a][1]) - ranges[a][0]
        for a, full in zip(route.target_axes, route.target_shape, strict=True)
    )


def piece_bytes(route: Route, ranges: Mapping[str, Range]) -> int:
    """Bytes of a piece as `arrange` makes it."""
    return math.prod(piece_shape(route, ranges)) * DTYPES[route.edges[0].dtype].itemsize
