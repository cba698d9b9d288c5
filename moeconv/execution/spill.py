"""Pieces that cannot go to their place as they come: spilled to a scratch file, then assembled.

An assembly (`planning.units`) is a group of targets whose pieces interleave with each other's
values. All its pieces are laid out one behind the other in one scratch file. When the last has
come, each stretch of each target is put together from them, block by block.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moeconv.errors import OutputError
from moeconv.execution.own_files import open_own, write_all
from moeconv.planning.units import Assembly, Route, Slot, Unit, pieces
from moeconv.sizes import format_size
from moeconv.tensor.axes import Array, Range
from moeconv.tensor.form import Form
from moeconv.tensor.stored import payload


@dataclass(frozen=True)
class _SpilledPiece:
    """Where a piece is in the scratch file, and where it belongs."""

    offset: int
    form: Form
    ranges: dict[str, Range]


@dataclass
class Spill:
    """The spilled pieces of one assembly.

    Attributes:
        name: The assembly's.
        pieces: The pieces, by unit's number and route's position.
        slots: Each stretch of a target, with the route that its copies are known by.
        size: Bytes of all pieces.
    """

    name: str
    pieces: dict[tuple[int, int], _SpilledPiece] = field(default_factory=dict)
    slots: dict[Slot, tuple[Route, list[_SpilledPiece]]] = field(default_factory=dict)
    size: int = 0
    _scratch: "_Scratch | None" = None

    @classmethod
    def of(
        cls, assembly: Assembly, units: Sequence[Unit], routes: Mapping[str, Sequence[Route]]
    ) -> "Spill":
        """Lays the pieces of an assembly out in the scratch file, without gaps."""
        spill = cls(assembly.name)
        for unit in units:
            if unit.array.name not in assembly.arrays:
                continue
            group = routes[unit.array.name]
            for number, ranges in pieces(unit, group):
                route = group[number]
                if route.slot in assembly.slots:
                    piece = _SpilledPiece(spill.size, route.form, ranges)
                    spill.pieces[unit.number, number] = piece
                    spill.slots.setdefault(route.slot, (route, []))[1].append(piece)
                    spill.size += route.form.piece_bytes(ranges)
        return spill

    def open(self, folder: Path) -> None:
        """Makes the scratch file.

        Raises:
            OutputError: The disk has no room.
        """
        safe = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        self._scratch = _Scratch(folder / f"scratch-{safe}", self.size)

    def write(self, unit: Unit, number: int, offset: int, values: Array) -> None:
        """Writes a part of a piece, which begins so many bytes behind the piece."""
        assert self._scratch is not None
        self._scratch.write(self.pieces[unit.number, number].offset + offset, payload(values))

    def assembled(
        self, slot: Slot, blocks: Iterable[dict[str, Range]]
    ) -> Iterator[tuple[dict[str, Range], Array]]:
        """Puts a stretch of a target together, block by block: each block's ranges and values."""
        assert self._scratch is not None
        route, spilled = self.slots[slot]
        axes = route.form.target_axes
        for ranges in blocks:
            shape = [ranges[axis][1] - ranges[axis][0] for axis in axes]
            block = np.zeros(shape, route.form.dtype)
            for piece in spilled:
                _collect(self._scratch, piece, block, ranges)
            yield ranges, block

    def close(self) -> None:
        """Removes the scratch file, where there is one."""
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None


def _collect(
    scratch: "_Scratch", piece: _SpilledPiece, block: Array, ranges: Mapping[str, Range]
) -> None:
    """Copies to a block what it has of a piece.

    Where a block has one entry of each outer axis and all of each inner one (`slabs`), that is one
    run of the scratch file; else it is cut from the values between its first and its last.
    """
    axes, shape = piece.form.target_axes, piece.form.piece_shape(piece.ranges)
    here: list[slice] = []  # the shared box in the block
    there: list[slice] = []  # and in the piece
    first = last = 0
    for axis, size in zip(axes, shape, strict=True):
        start = piece.ranges[axis][0]
        low, high = max(ranges[axis][0], start), min(ranges[axis][1], start + size)
        if low >= high:
            return
        here.append(slice(low - ranges[axis][0], high - ranges[axis][0]))
        there.append(slice(low - start, high - start))
        first, last = first * size + low - start, last * size + high - start - 1
    part = block[tuple(here)]
    count = last - first + 1
    if count == part.size:
        data = scratch.read(piece.offset + first * block.itemsize, count * block.itemsize)
        part[...] = np.frombuffer(data, block.dtype).reshape(part.shape)
        return
    row = math.prod(shape[1:])  # whole rows of the outermost axis
    top, bottom = there[0].start, there[0].stop
    data = scratch.read(
        piece.offset + top * row * block.itemsize, (bottom - top) * row * block.itemsize
    )
    rows = np.frombuffer(data, block.dtype).reshape(bottom - top, *shape[1:])
    part[...] = rows[(slice(None), *there[1:])]


class _Scratch:
    """A file for bytes that cannot go to their place yet."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._fd = open_own(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(self._fd, 0)
            os.posix_fallocate(self._fd, 0, max(1, size))
        except OSError as error:
            self.close()
            raise OutputError(
                f"cannot reserve {format_size(size)} for {path}: {error.strerror}; free some space "
                "or choose another OUT"
            ) from None

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes at an offset."""
        write_all(self._fd, data, offset)

    def read(self, offset: int, count: int) -> bytearray:
        """Reads bytes."""
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        while done < count:
            done += os.preadv(self._fd, [view[done:]], offset + done)
        return data

    def close(self) -> None:
        """Closes and removes it."""
        os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def slot_bytes(form: Form) -> int:
    """Bytes of the stretch of a target that a form's slot is."""
    return math.prod(form.target_shape) * form.dtype.itemsize
