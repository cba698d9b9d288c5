"""Carrying out a plan: every chunk read and decoded once, scattered to its places, within memory.

Workers take units in the plan's order. A unit is hashed chunk by chunk, then cut into blocks of a
few MiB; each block is cast, transposed and written at its offset. Bytes do not depend on the number
of workers. A background thread syncs what is written and records finished units in the journal, so
that a later `--resume` trusts only what is on disk.
"""

import hashlib
import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moeconv.convert.files import OutputFiles, Scratch
from moeconv.convert.journal import Journal
from moeconv.convert.memory import Budget
from moeconv.convert.plan import Plan
from moeconv.convert.scatter import arrange, check_finite, check_overflow, nonfinite_message
from moeconv.convert.threads import Thread
from moeconv.convert.work import BLOCK_BYTES, Range, Route, Unit, is_contiguous, pieces
from moeconv.hf.safetensors import payload
from moeconv.mapping.axes import Array
from moeconv.mapping.ops import DTYPES
from moeconv.orbax.arrays import Arrays, Box, Reader

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What an executed plan leaves.

    Attributes:
        files: SHA-256 of every safetensors file, by name.
        arrays: Digest of every source array as it was read, by name (see `array_digest`).
    """

    files: Mapping[str, str]
    arrays: Mapping[str, str]


@dataclass
class _Parking:
    """Where the pieces of one array lie in its scratch file.

    `lots` maps a unit's number and a route's position to the offset of its piece.
    """

    lots: dict[tuple[int, int], tuple[int, dict[str, Range]]] = field(default_factory=dict)
    size: int = 0
    scratch: Scratch | None = None


class Engine:
    """Executes one plan into a staging directory."""

    def __init__(
        self,
        plan: Plan,
        arrays: Arrays,
        folder: Path,
        *,
        jobs: int,
        memory: int,
        journal: Journal,
        allow_nonfinite: bool = False,
        progress: Progress = lambda read, written: None,
    ) -> None:
        self._plan = plan
        self._arrays = arrays
        self._folder = folder
        self._jobs = jobs
        self._budget = Budget(memory)
        self._journal = journal
        self._allow_nonfinite = allow_nonfinite
        self._progress = progress
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._chunks: dict[str, dict[tuple[int, ...], str]] = {}
        self._parking = self._lay_out_parking()
        self._waiting: dict[str, set[int]] = {}
        self._left: dict[str, int] = {n: e.nbytes for n, e in plan.edges.items()}
        self._to_sync: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def run(self) -> Result:
        """Executes the plan.

        Raises:
            TensorError: A chunk is damaged, or holds values that are refused.
            OutputError: The disk is full.
            KeyboardInterrupt: The user stopped it; finished units stay in the journal.
        """
        self._output = OutputFiles(self._folder, self._plan.files, keep=bool(self._journal.done))
        try:
            self._restore()
            self._fill_constants()
            self._output.start_hashing()
            self._work()
            digests = self._output.finish()
            self._output.sync()
        finally:
            for parking in self._parking.values():
                if parking.scratch is not None:
                    parking.scratch.close()
            self._output.close()
        return Result(digests, {n: self._array_digest(n) for n in self._plan.routes})

    # --- scheduling -----------------------------------------------------------------------------

    def _restore(self) -> None:
        """Takes over what the journal says is on disk."""
        done = self._journal.done
        for unit in self._plan.units:
            name = unit.array.name
            if unit.number in done and (
                name not in self._parking or self._journal.settled.issuperset({name})
            ):
                self._note_chunks(unit, done[unit.number])
                for number, ranges in pieces(unit, self._plan.routes[name]):
                    route = self._plan.routes[name][number]
                    self._written(route, _piece_bytes(route, ranges))
                self._progress(unit.nbytes, 0)
            elif name in self._parking:
                self._waiting.setdefault(name, set()).add(unit.number)

    def _work(self) -> None:
        names = self._waiting
        todo = [
            u
            for u in self._plan.units
            if u.number not in self._journal.done or u.number in names.get(u.array.name, ())
        ]
        pending = iter(todo)
        syncer = Thread(self._sync_loop)
        workers = [
            Thread(lambda: self._worker(pending)) for _ in range(min(self._jobs, max(1, len(todo))))
        ]
        try:
            for thread in (syncer, *workers):
                thread.start()
            for thread in workers:
                thread.wait()
            self._to_sync.put(None)
            syncer.wait()
        except BaseException:
            self._abort(None)
            for thread in workers:
                thread.see_off()
            self._to_sync.put(None)
            syncer.see_off()
            raise
        if self._failure is not None:
            raise self._failure

    def _worker(self, pending: Iterator[Unit]) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    unit = next(pending, None)
                if unit is None:
                    return
                self._do(unit)
        except BaseException as error:
            self._abort(error)

    def _abort(self, error: BaseException | None) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._stop.set()
        self._budget.close()

    def _sync_loop(self) -> None:
        """Syncs, then journals, what was finished; a few units at a time."""
        finished = False
        while not finished:
            notes = [self._to_sync.get()]
            while not self._to_sync.empty():
                notes.append(self._to_sync.get())
            finished = None in notes
            try:
                self._output.sync()
                for note in notes:
                    if note is not None:
                        note()
            except OSError as error:
                self._abort(error)
                return

    # --- one unit -------------------------------------------------------------------------------

    def _do(self, unit: Unit) -> None:
        cost = self._plan.unit_cost(unit)
        if not self._budget.acquire(cost):
            return
        held = cost
        try:
            reader = self._arrays.reader(
                unit.array.name, unit.nbytes + unit.nbytes // 4 + (64 << 20)
            )
            digests = self._hash_chunks(unit, reader)
            # Every chunk is decoded now: their compressed bytes are gone.
            self._budget.release(unit.nbytes)
            held -= unit.nbytes
            routes = self._plan.routes[unit.array.name]
            for number, ranges in pieces(unit, routes):
                self._do_piece(unit, number, routes[number], ranges, reader)
                if self._stop.is_set():
                    return
            del reader
        finally:
            self._budget.release(held)
        self._note_chunks(unit, digests)
        self._finish(unit, digests)

    def _hash_chunks(self, unit: Unit, reader: Reader) -> dict[tuple[int, ...], str]:
        """SHA-256 of every chunk, decoded, in C order; refuses NaN and Inf."""
        digests = {}
        for position, box in unit.chunks():
            digest = hashlib.sha256()
            for part in _slabs(box, unit.array.itemsize):
                if self._stop.is_set():
                    break
                data = reader.read(part)
                digest.update(payload(data))
                if not self._allow_nonfinite:
                    where = f" at [{', '.join(f'{s.start}:{s.stop}' for s in part)}]"
                    message = nonfinite_message(unit.array.name, where)
                    check_finite(data, unit.array.dtype, message)
                self._progress(data.nbytes, 0)
            digests[position] = digest.hexdigest()
        return digests

    def _do_piece(
        self,
        unit: Unit,
        number: int,
        route: Route,
        ranges: Mapping[str, Range],
        reader: Reader,
    ) -> None:
        parking = self._parking.get(unit.array.name)
        lot = parking.lots.get((unit.number, number)) if parking else None
        start, stop = ranges[route.lead]
        for first in range(start, stop, route.rows_per_block):
            if self._stop.is_set():
                return
            part = {**ranges, route.lead: (first, min(first + route.rows_per_block, stop))}
            block = reader.read(_source_box(unit, route, part))
            values = arrange(block, route, part)
            if route.cast or route.scale:
                check_overflow(block, unit.array, values, route, copied=self._allow_nonfinite)
            if lot is not None and parking is not None and parking.scratch is not None:
                offset = lot[0] + (first - start) * (values.nbytes // values.shape[0])
                parking.scratch.write(offset, payload(values))
            else:
                self._write(route, first, values)

    def _write(self, route: Route, row: int, values: Array) -> None:
        """Writes whole rows of the target, to every copy."""
        data = payload(values)
        for edge in route.edges:
            place = self._plan.places[edge.target]
            self._output.write(place.file, place.offset + row * route.row_bytes, data)
            self._progress(0, len(data))
        self._written(route, len(data))

    def _written(self, route: Route, count: int) -> None:
        for edge in route.edges:
            with self._lock:
                self._left[edge.target] -= count
                complete = self._left[edge.target] == 0
            if complete:
                self._output.completed(self._plan.places[edge.target].file, edge.target)

    def _finish(self, unit: Unit, digests: dict[tuple[int, ...], str]) -> None:
        name = unit.array.name
        self._to_sync.put(lambda: self._journal.unit(unit.number, digests))
        with self._lock:
            waiting = self._waiting.get(name)
            if waiting is None:
                return
            waiting.discard(unit.number)
            if waiting:
                return
        self._settle(name)
        if not self._stop.is_set():  # it may have stopped half way
            self._to_sync.put(lambda: self._journal.settle(name))

    # --- parked arrays --------------------------------------------------------------------------

    def _lay_out_parking(self) -> dict[str, _Parking]:
        """Gives every piece of a parked array its lot; pieces follow each other without gaps."""
        parking: dict[str, _Parking] = {}
        for unit in self._plan.units:
            name = unit.array.name
            if name not in self._plan.parked:
                continue
            lots = parking.setdefault(name, _Parking())
            for number, ranges in pieces(unit, self._plan.routes[name]):
                route = self._plan.routes[name][number]
                if not is_contiguous(route, ranges):
                    lots.lots[unit.number, number] = (lots.size, dict(ranges))
                    lots.size += _piece_bytes(route, ranges)
        return parking

    def _settle(self, name: str) -> None:
        """Puts the parked pieces of an array together, tensor by tensor, block by block."""
        parking = self._parking[name]
        for number, route in enumerate(self._plan.routes[name]):
            lots = [lot for (_, n), lot in parking.lots.items() if n == number]
            if not lots:
                continue
            rows = route.target_shape[0]
            dtype = DTYPES[route.edges[0].dtype]
            for first in range(0, rows, route.rows_per_block):
                if self._stop.is_set():
                    return
                last = min(first + route.rows_per_block, rows)
                out = np.zeros((last - first, *route.target_shape[1:]), dtype)
                for offset, ranges in lots:
                    self._collect(parking, route, out, first, offset, ranges)
                self._write(route, first, out)
        if parking.scratch is not None:
            parking.scratch.close()
            parking.scratch = None

    @staticmethod
    def _collect(
        parking: _Parking,
        route: Route,
        out: Array,
        first: int,
        offset: int,
        ranges: Mapping[str, Range],
    ) -> None:
        """Copies the rows of one parked piece that a block holds."""
        assert parking.scratch is not None
        shape = _piece_shape(route, ranges)
        start = ranges[route.lead][0]
        low, high = max(first, start), min(first + out.shape[0], start + shape[0])
        if low >= high:
            return
        row = math.prod(shape[1:]) * out.itemsize
        data = parking.scratch.read(offset + (low - start) * row, (high - low) * row)
        piece = np.frombuffer(data, out.dtype).reshape(high - low, *shape[1:])
        inner = [
            slice(ranges[a][0], ranges[a][0] + n)
            for a, n in zip(route.target_axes[1:], shape[1:], strict=True)
        ]
        out[(slice(low - first, high - first), *inner)] = piece

    # --- the rest -------------------------------------------------------------------------------

    def _fill_constants(self) -> None:
        for edge in self._plan.constants:
            place = self._plan.places[edge.target]
            values = edge.apply(np.empty((), DTYPES[edge.dtype]))
            self._output.write(place.file, place.offset, payload(values))
            self._output.completed(place.file, edge.target)
            self._progress(0, edge.nbytes)
        for name, parking in self._parking.items():
            if self._waiting.get(name):
                safe = hashlib.sha256(name.encode()).hexdigest()[:16]
                parking.scratch = Scratch(self._folder / f"scratch-{safe}", parking.size)

    def _note_chunks(self, unit: Unit, digests: Mapping[tuple[int, ...], str]) -> None:
        with self._lock:
            self._chunks.setdefault(unit.array.name, {}).update(digests)

    def _array_digest(self, name: str) -> str:
        info = self._arrays.info[name]
        return array_digest(info.dtype, info.shape, info.chunk, self._chunks[name])


def array_digest(
    dtype: str,
    shape: Sequence[int],
    chunk: Sequence[int],
    chunks: Mapping[tuple[int, ...], str],
) -> str:
    """Digest of an array as read: SHA-256 over its dtype, shape, chunk shape and chunks' SHA-256.

    A chunk's SHA-256 is over its decoded values in C order, cut to the array's bounds; chunks come
    in the order of the grid.
    """
    lines = [f"{dtype} {list(shape)} {list(chunk)}", *(chunks[p] for p in sorted(chunks))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _slabs(box: Sequence[Range], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a box into parts of a few MiB that follow each other in C order."""
    cut, inner = len(box) - 1, itemsize
    while cut > 0 and inner * (box[cut][1] - box[cut][0]) <= BLOCK_BYTES:
        inner *= box[cut][1] - box[cut][0]
        cut -= 1
    step = max(1, BLOCK_BYTES // inner)
    outer = [[slice(i, i + 1) for i in range(*r)] for r in box[:cut]]
    rest = tuple(slice(*r) for r in box[cut + 1 :])
    for head in itertools.product(*outer):
        start, stop = box[cut] if box else (0, 1)
        for first in range(start, stop, step):
            middle = (slice(first, min(first + step, stop)),) if box else ()
            yield (*head, *middle, *rest)


def _source_box(unit: Unit, route: Route, ranges: Mapping[str, Range]) -> Box:
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


def _piece_shape(route: Route, ranges: Mapping[str, Range]) -> tuple[int, ...]:
    """Shape of a piece as `arrange` makes it: padding comes with the last values of its axis."""
    sizes = route.edges[0].sizes
    return tuple(
        (full if ranges[a][1] == sizes[a] else ranges[a][1]) - ranges[a][0]
        for a, full in zip(route.target_axes, route.target_shape, strict=True)
    )


def _piece_bytes(route: Route, ranges: Mapping[str, Range]) -> int:
    return math.prod(_piece_shape(route, ranges)) * DTYPES[route.edges[0].dtype].itemsize
