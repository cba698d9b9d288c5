"""One unit of work: decoded once, hashed chunk by chunk, and scattered to its places."""

import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from functools import partial

from moeconv.execution.digest import Position, chunk_digests
from moeconv.execution.finite import (
    check_companions,
    check_finite,
    check_overflow,
    nonfinite_message,
)
from moeconv.execution.journal import Done
from moeconv.execution.sink import Sink
from moeconv.execution.spill import Spill
from moeconv.planning.plan import Plan
from moeconv.planning.units import Route, Slot, Unit, blocks, companions, pieces, source_box
from moeconv.tensor.axes import Array, Box, Ranges
from moeconv.tensor.stored import Reader, Source, payload

Progress = Callable[[int, int], None]


class Mover:
    """Moves units of a plan from its source to its sink; used by several threads."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        sink: Sink,
        spills: Mapping[str, Spill],
        stopped: threading.Event,
        *,
        allow_nonfinite: bool,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._source = source
        self._sink = sink
        self._spill = {
            array: spills[each.name] for each in plan.assemblies for array in each.arrays
        }
        self._stopped = stopped
        self._allow_nonfinite = allow_nonfinite
        self._progress = progress
        self._lock = threading.Lock()
        self._left = {name: edge.nbytes for name, edge in plan.edges.items()}

    def move(self, unit: Unit, hashers: Executor, decoded: Callable[[], None]) -> Done | None:
        """Reads a unit and puts every piece to its place, or where it waits to be assembled.

        Args:
            unit: What to move.
            hashers: Hashes what was read meanwhile.
            decoded: Called when the compressed bytes are gone.

        Returns:
            What was read and written; None if it was stopped, perhaps half way.

        Raises:
            TensorError: A chunk is damaged, or holds values that are refused.
        """
        reader = self._source.reader(unit.array.name, unit.chunk_count)
        missing = []
        for position, box in unit.chunks():
            if self._stopped.is_set():
                return None
            if not reader.decode(box):
                missing.append(position)
        decoded()
        hashing = hashers.submit(chunk_digests, unit, reader, partial(self._look, unit))
        written = 0
        try:
            routes, beside = self._plan.routes[unit.array.name], companions(unit, self._source)
            for number, ranges in pieces(unit, routes):
                written = self._move_piece(
                    unit, number, routes[number], ranges, reader, beside, written
                )
        finally:
            # It uses the reader too; and a NaN that it finds explains an overflow found here.
            digests = hashing.result()
        return None if self._stopped.is_set() else Done(digests, missing, written)

    def assemble(self, spill: Spill) -> int | None:
        """Writes what a spill's pieces make.

        Returns:
            CRC-32 of it; None if it was stopped, perhaps half way.
        """
        written = 0
        for slot in spill.slots:
            written = self._assemble(spill, slot, written)
            if self._stopped.is_set():
                return None
        spill.close()
        return written

    def count(self, unit: Unit) -> None:
        """Counts a unit that an earlier process has moved."""
        routes, written = self._plan.routes[unit.array.name], 0
        for number, ranges in pieces(unit, routes):
            size = routes[number].form.piece_bytes(ranges)
            self._written(routes[number], size)
            written += size * len(routes[number].edges)
        self._progress(unit.nbytes, written)

    def _look(self, unit: Unit, position: Position, part: tuple[slice, ...], data: Array) -> bool:
        """Looks at each part of a unit while it is hashed; False stops the hashing."""
        if not self._allow_nonfinite:
            where = f" at [{', '.join(f'{s.start}:{s.stop}' for s in part)}]"
            check_finite(data, unit.array.dtype, nonfinite_message(unit.array.name, where))
        self._progress(data.nbytes, 0)
        return not self._stopped.is_set()

    def _move_piece(
        self,
        unit: Unit,
        number: int,
        route: Route,
        ranges: Ranges,
        reader: Reader,
        beside: Callable[[str, Box], Array],
        written: int,
    ) -> int:
        """Puts a piece to its place; `written`, with what went to the targets added."""
        spill, form, spilled = self._spill.get(unit.array.name), route.form, 0
        if spill is not None and (unit.number, number) not in spill.pieces:
            spill = None
        cut = blocks(form, ranges)
        if spill is None:
            cut = self._plan.output.blocks(route.edges[0].target, form, ranges)
        for part in cut:
            if self._stopped.is_set():
                break
            block = reader.read(source_box(unit, form, part))
            others = form.others(part, beside)
            if not self._allow_nonfinite:
                check_companions(form.value.companions, others)
            values = form.run(block, part, others)
            if form.value.changes:
                check_overflow(
                    block, unit.array, values, route, others, copied=self._allow_nonfinite
                )
            if spill is not None:
                spill.write(unit, number, spilled, values)
                spilled += values.nbytes
            else:
                written = self._write(route, part, values, written)
            del block, others, values  # before the next are made
        return written

    def _assemble(self, spill: Spill, slot: Slot, written: int) -> int:
        route, _ = spill.slots[slot]
        cut = self._plan.output.stretches(slot.target, route.form)
        for ranges, values in spill.assembled(slot, cut):
            if self._stopped.is_set():
                break
            written = self._write(route, ranges, values, written)
        return written

    def _write(self, route: Route, ranges: Ranges, values: Array, written: int) -> int:
        """Writes values to every copy; the CRC-32 `written` with them added.

        It detects damage, not forgery: who can write to the folder can write a journal too.
        """
        for edge in route.edges:
            self._sink.write(edge.target, route.form, ranges, values)
            self._progress(0, values.nbytes)
        self._written(route, values.nbytes)
        return zlib.crc32(payload(values), written)

    def _written(self, route: Route, count: int) -> None:
        for edge in route.edges:
            with self._lock:
                self._left[edge.target] -= count
                complete = self._left[edge.target] == 0
            if complete:
                self._sink.completed(edge.target)
