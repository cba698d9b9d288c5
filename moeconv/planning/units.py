"""From edges to units of work: which chunks are read together, and where each piece of them goes.

A unit is a box of one source array that is read and decoded once. It is one chunk, or several where
the chunks are small or cut an axis that a rule splits. Each entry of the unit's stacked axes (a
layer, an expert) takes a route into one target array, or into several copies of it.

The output says which pieces it takes as they come (`Output.takes`). It takes no others: those of a
checkpoint sharded along the inner axis of a transposed tensor, or of several arrays that take turns
in one tensor. These are spilled to a scratch file, and each stretch of the target is assembled from
them once all have arrived.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moeconv.mapping.edges import Edge, Part
from moeconv.planning.slabs import slabs
from moeconv.tensor.axes import Array, Box, Range, Ranges
from moeconv.tensor.form import Form
from moeconv.tensor.stored import ArrayInfo, Source

UNIT_BYTES = 64 << 20  # chunks are read together up to this, or up to the largest single chunk


@dataclass(frozen=True)
class Route:
    """How one entry of a source array's stacked axes becomes a target array, or a part of one.

    Attributes:
        edges: The targets it is written to: one, or the copies of a replicated one.
        part: Which part of them.
    """

    edges: tuple[Edge, ...]
    part: Part

    @property
    def form(self) -> Form:
        """What becomes of the entry."""
        return self.part.form

    @property
    def slot(self) -> "Slot":
        """The stretch of the target shared with the parts that interleave with its own values."""
        return Slot(self.edges[0].target, self.form.base)


@dataclass(frozen=True, order=True)
class Slot:
    """A stretch of a target that is assembled at once.

    Attributes:
        target: Its name, of copies the first.
        base: Values of it before the stretch.
    """

    target: str
    base: int


@dataclass(frozen=True)
class Unit:
    """A box of one array, read and decoded once.

    Attributes:
        array: The source array.
        box: Range on each of its axes.
        number: Its position in the plan's order, which is also its name in the journal.
        beside: The boxes of companions that it is read with. They have units of their own too, in
            which each of their chunks is looked at and hashed once.
        work_bytes: Of the largest block, while it is moved, where that may be more than usual.
    """

    array: ArrayInfo
    box: tuple[Range, ...]
    number: int
    beside: tuple["Unit", ...] = ()
    work_bytes: int = 0

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
    def held_bytes(self) -> int:
        """Bytes that are decoded for it, its companions' included."""
        return self.decoded_bytes + sum(other.decoded_bytes for other in self.beside)

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
    """Groups the parts of edges by source array and entry; filled tensors have no route.

    A companion is an array without routes: the routes of the main array read it.

    Tensors of equal parts hold equal bytes, and share a route: the copies of a replicated tensor,
    and an untied head that is the embedding.
    """
    routes: dict[str, list[tuple[Part, list[Edge]]]] = {}
    groups: dict[tuple[object, ...], list[list[Edge]]] = {}
    for edge in edges:
        for number, part in enumerate(edge.parts):
            key = (part.source, number, *sorted(part.form.take.items()))
            alike = groups.setdefault(key, [])
            group = next((group for group in alike if group[0].parts == edge.parts), None)
            if group is None:
                alike.append(group := [])
                routes.setdefault(part.source, []).append((part, group))
            group.append(edge)
    for name in dict.fromkeys(name for edge in edges for name in edge.sources):
        routes.setdefault(name, [])
    return {
        name: tuple(Route(tuple(group), part) for part, group in of_array)
        for name, of_array in routes.items()
    }


def unit_boxes(info: ArrayInfo, routes: Sequence[Route], limit: int) -> list[tuple[Range, ...]]:
    """Cuts an array into units of whole chunks.

    Chunks are joined along axes that a route takes apart (always), then, while a unit stays within
    `limit` bytes, along the target's inner axes (so that pieces become contiguous) and the rest.
    """
    axes = routes[0].form.axes if routes else tuple(map(str, range(len(info.shape))))
    step = [min(c, n) for c, n in zip(info.chunk, info.shape, strict=True)]
    must = {a for r in routes for a in r.form.split}
    inner = [a for r in routes for a in r.form.target_axes if a != r.form.lead]
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


def cut_into_units(
    routes: Mapping[str, Sequence[Route]],
    info: Mapping[str, ArrayInfo],
    chunks: Callable[[str, Form, Ranges], Iterator[dict[str, Range]]] | None = None,
) -> tuple[Unit, ...]:
    """Cuts every array that feeds something into units, the largest first.

    Args:
        routes: Of every array, by its name.
        info: How it is stored.
        chunks: The blocks that the output takes (`Output.blocks`), where they are none of `blocks`.
    """
    limit = max(UNIT_BYTES, *(info[name].chunk_bytes for name in routes))
    boxes = [
        (info[name], box)
        for name, group in routes.items()
        for box in unit_boxes(info[name], group, limit)
    ]
    boxes.sort(key=lambda b: (-Unit(b[0], b[1], 0).nbytes, b[0].name, b[1]))
    return tuple(
        _with_needs(Unit(array, box, number), routes[array.name], info, chunks)
        for number, (array, box) in enumerate(boxes)
    )


def _with_needs(
    unit: Unit,
    routes: Sequence[Route],
    info: Mapping[str, ArrayInfo],
    chunks: Callable[[str, Form, Ranges], Iterator[dict[str, Range]]] | None,
) -> Unit:
    """A unit with the companions that it is read with, and what its largest block takes.

    A block is larger than usual where an axis that is taken apart, or one behind a padded axis,
    cannot be cut, and where the zeros of a padded axis come with it (`blocks`).
    """
    special = any(r.form.value.companions or r.form.extent or r.form.split for r in routes)
    if chunks is None and not special:
        return unit
    boxes: dict[str, list[Range]] = {}
    largest: dict[tuple[object, ...], int] = {}
    for number, ranges in pieces(unit, routes):
        form = routes[number].form
        alike = (form.target_shape, form.target_axes, form.value.scratch, *ranges.items())
        if alike not in largest:
            cut = blocks(form, ranges)
            if chunks is not None:
                cut = chunks(routes[number].edges[0].target, form, ranges)
            largest[alike] = max(form.work_bytes(part) for part in cut)
        for name, box in form.companion_boxes(ranges):
            shape = info[name].shape
            ends = [_ends(index, size) for index, size in zip(box, shape, strict=True)]
            both = zip(ends, boxes.get(name, ends), strict=True)
            boxes[name] = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in both]
    beside = tuple(Unit(info[name], tuple(box), 0) for name, box in boxes.items())
    return replace(unit, beside=beside, work_bytes=max(largest.values(), default=0))


def _ends(index: slice | int, size: int) -> Range:
    """Where an index into an axis begins and ends."""
    if isinstance(index, int):
        return index, index + 1
    return index.indices(size)[:2]


def pieces(unit: Unit, routes: Sequence[Route]) -> Iterator[tuple[int, dict[str, Range]]]:
    """Routes that a unit feeds (by position), with the ranges of the target's axes it holds."""
    if not routes:
        return
    held = dict(zip(routes[0].form.axes, unit.box, strict=True))
    for number, route in enumerate(routes):
        if route.form.holds(held):
            ranges = route.form.ranges(held)
            if all(start < stop for start, stop in ranges.values()):
                yield number, ranges


def blocks(form: Form, ranges: Ranges) -> Iterator[dict[str, Range]]:
    """Cuts a piece into blocks that stay in the cache and follow each other in the target.

    An axis that is taken apart is held whole (its parts are no axes of the source), and behind a
    padded axis nothing is cut, as its last entry brings the zeros with it.
    """
    axes = form.target_axes
    parts = {part for group in form.split.values() for part in group}
    whole = next((n for n, axis in enumerate(axes) if axis in parts), len(axes))
    padded = next((n for n, axis in enumerate(axes) if axis in form.extent), len(axes))
    if whole == 0:
        yield dict(ranges)
        return
    box = [ranges[axis] for axis in axes]
    for slab in slabs(box, form.scratch, deepest=min(whole - 1, padded)):
        yield dict(zip(axes, slab, strict=True))


def stretches(form: Form) -> Iterator[dict[str, Range]]:
    """Cuts all that a form's target has from `base` on into blocks."""
    box = [(0, size) for size in form.target_shape]
    for slab in slabs(box, form.dtype.itemsize):
        yield dict(zip(form.target_axes, slab, strict=True))


def source_box(unit: Unit, form: Form, ranges: Ranges) -> Box:
    """The source's box for a block: fixed entries, and ranges on the other axes."""
    box: list[slice | int] = []
    for axis, held in zip(form.axes, unit.box, strict=True):
        if axis in form.take:
            box.append(form.take[axis])
        else:
            box.append(slice(*ranges.get(axis, held)))
    return tuple(box)


def companions(unit: Unit, source: Source) -> Callable[[str, Box], Array]:
    """What reads boxes of the companions of a unit, which are opened once."""
    readers = {
        other.array.name: source.reader(other.array.name, other.chunk_count)
        for other in unit.beside
    }
    return lambda name, box: readers[name].read(box)


@dataclass
class Assembly:
    """Targets that are assembled from spilled pieces, and the arrays that these come from.

    Attributes:
        arrays: Of their names the first names the assembly.
        slots: The stretches of targets.
        size: Bytes of all pieces.
    """

    arrays: set[str]
    slots: set[Slot]
    size: int

    @property
    def name(self) -> str:
        """In the journal, and of the scratch file."""
        return min(self.arrays)


def assemblies(
    routes: Mapping[str, Sequence[Route]],
    units: Sequence[Unit],
    takes: Callable[[str, Form, Ranges], bool],
) -> tuple[Assembly, ...]:
    """Finds the targets with a piece that the output does not take; all their pieces are spilled.

    Arrays that share such a target are one assembly, as it is complete only when both are read.
    """
    spilled: set[Slot] = set()
    for unit in units:
        group = routes[unit.array.name]
        spilled |= {
            group[number].slot
            for number, ranges in pieces(unit, group)
            if not takes(group[number].edges[0].target, group[number].form, ranges)
        }
    found: list[Assembly] = []
    for name, group in routes.items():
        mine = [route for route in group if route.slot in spilled]
        if not mine:
            continue
        size = sum(route.form.piece_bytes(route.form.whole) for route in mine)
        joined = Assembly({name}, {route.slot for route in mine}, size)
        for other in [other for other in found if other.slots & joined.slots]:
            found.remove(other)
            joined.arrays |= other.arrays
            joined.slots |= other.slots
            joined.size += other.size
        found.append(joined)
    return tuple(found)
