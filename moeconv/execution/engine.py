"""Carrying out a plan: every chunk read and decoded once, scattered to its places, within memory.

Workers take units in the plan's order, passing over those that memory has no room for yet. Once a
unit is decoded, one thread hashes it chunk by chunk while another cuts it into blocks of a few MiB;
each block is cast, transposed and written at its offset. Bytes do not depend on the number of
workers. A background thread syncs what is written and records finished units in the journal, so
that a later `--resume` trusts only what is on disk.
"""

import hashlib
import math
import queue
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from moeconv.execution.digest import Position, array_digest, chunk_digests
from moeconv.execution.files import OutputFiles, Scratch
from moeconv.execution.finite import check_finite, check_overflow, nonfinite_message
from moeconv.execution.journal import Done, Journal
from moeconv.execution.memory import Budget
from moeconv.execution.threads import Thread
from moeconv.hf.safetensors import payload
from moeconv.mapping.edges import Edge
from moeconv.orbax.arrays import Arrays, Reader
from moeconv.planning.plan import Plan
from moeconv.planning.units import (
    Assembly,
    Route,
    Slot,
    Unit,
    blocks,
    pieces,
    source_box,
    stretches,
)
from moeconv.tensor.axes import Array
from moeconv.tensor.dtypes import DTYPES
from moeconv.tensor.form import Form, Range, Ranges

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Result:
    """What an executed plan leaves.

    Attributes:
        files: SHA-256 of every safetensors file, by name.
        arrays: Digest of every source array as it was read, by name (see `array_digest`).
        missing: Chunks that the checkpoint does not store, by array: their places in its grid. It
            is of an older Orbax, which leaves out zeros, so that a lost chunk looks the same.
    """

    files: Mapping[str, str]
    arrays: Mapping[str, str]
    missing: Mapping[str, Sequence[Position]]

    @property
    def warnings(self) -> list[str]:
        """Sentences for people."""
        if not self.missing:
            return []
        return [
            "chunks of these parameters are not stored and were read as zeros, as "
            "--allow-missing-chunks says; whether they were lost cannot be told: "
            + ", ".join(self.missing)
        ]


@dataclass(frozen=True)
class _Lot:
    """Where a piece lies in the scratch file, and where it belongs."""

    offset: int
    form: Form
    ranges: dict[str, Range]


@dataclass
class _Parking:
    """Where the pieces of an assembly lie in its scratch file.

    `lots` maps a unit's number and a route's position to its piece; `slots` is each stretch of a
    tensor with the route that its copies are known by, and its pieces.
    """

    lots: dict[tuple[int, int], _Lot] = field(default_factory=dict)
    slots: dict[Slot, tuple[Route, list[_Lot]]] = field(default_factory=dict)
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
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._plan = plan
        self._arrays = arrays
        self._folder = folder
        self._jobs = jobs
        self._budget = Budget(memory)
        self._journal = journal
        self._allow_nonfinite = allow_nonfinite
        self._progress = progress
        self._say = note
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._chunks: dict[str, dict[Position, str]] = {}
        self._missing: dict[str, list[Position]] = {}
        self._assembly = {name: each.name for each in plan.assemblies for name in each.arrays}
        self._parking = {each.name: self._lay_out(each) for each in plan.assemblies}
        self._waiting: dict[str, set[int]] = {}
        self._left: dict[str, int] = {n: e.nbytes for n, e in plan.edges.items()}
        self._todo: list[Unit] = []
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
        arrays = {n: self._array_digest(n) for n in self._plan.routes}
        missing = {name: sorted(self._missing[name]) for name in sorted(self._missing)}
        return Result(digests, arrays, missing)

    # --- scheduling -----------------------------------------------------------------------------

    def _restore(self) -> None:
        """Takes over what the journal says is on disk, as far as it is; the rest is to be done."""
        kept = {unit.number for unit in self._plan.units if self._is_on_disk(unit)}
        settled = {name for name in self._parking if self._is_settled(name)}
        if lost := [*(self._journal.done.keys() - kept), *(self._journal.settled.keys() - settled)]:
            self._say(
                f"warning: what the unfinished conversion wrote was changed since, in {len(lost)} "
                "places; they are written again"
            )
        # Pieces that were parked are gone, so that an assembly is kept whole or not at all.
        again = {self._assembly.get(u.array.name) for u in self._plan.units if u.number not in kept}
        again |= self._parking.keys() - settled
        for unit in self._plan.units:
            name = unit.array.name
            assembly = self._assembly.get(name)
            if assembly is not None and assembly in again:
                self._waiting.setdefault(assembly, set()).add(unit.number)
            elif unit.number in kept:
                self._note(unit, self._journal.done[unit.number])
                for number, ranges in pieces(unit, self._plan.routes[name]):
                    route = self._plan.routes[name][number]
                    self._written(route, route.form.piece_bytes(ranges))
                self._progress(unit.nbytes, 0)
                continue
            self._todo.append(unit)
        self._todo.sort(key=self._plan.unit_cost, reverse=True)

    def _is_on_disk(self, unit: Unit) -> bool:
        """Whether what the journal says of a unit is what lies in every copy of its tensors."""
        done = self._journal.done.get(unit.number)
        if done is None:
            return False
        parts = [
            (route.edges, route.form.offset(ranges), route.form.piece_bytes(ranges))
            for number, ranges in pieces(unit, self._plan.routes[unit.array.name])
            if self._lot(unit, number) is None
            for route in [self._plan.routes[unit.array.name][number]]
        ]
        return self._holds(parts, done.written)

    def _is_settled(self, name: str) -> bool:
        """The same for the parked pieces of an assembly."""
        written = self._journal.settled.get(name)
        parts = [
            (route.edges, route.form.base * route.form.dtype.itemsize, _slot_bytes(route.form))
            for route, _ in self._parking[name].slots.values()
        ]
        return written is not None and self._holds(parts, written)

    def _holds(self, parts: Sequence[tuple[Sequence[Edge], int, int]], written: int) -> bool:
        for copy in range(max((len(edges) for edges, _, _ in parts), default=0)):
            found = 0
            for edges, offset, size in parts:
                place = self._plan.places[edges[min(copy, len(edges) - 1)].target]
                found = self._output.checksum(place.file, place.offset + offset, size, found)
            if found != written:
                return False
        return True

    def _work(self) -> None:
        todo = self._todo
        jobs = min(self._jobs, max(1, len(todo)))
        hashers = ThreadPoolExecutor(jobs)
        syncer = Thread(self._sync_loop)
        workers = [Thread(lambda: self._worker(todo, hashers)) for _ in range(jobs)]
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
        finally:
            hashers.shutdown()
        if self._failure is not None:
            raise self._failure

    def _worker(self, todo: list[Unit], hashers: Executor) -> None:
        try:
            while (unit := self._budget.take(todo, self._plan.unit_cost)) is not None:
                self._do(unit, hashers)
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

    def _do(self, unit: Unit, hashers: Executor) -> None:
        held = self._plan.unit_cost(unit)
        try:
            reader = self._arrays.reader(unit.array.name, unit.chunk_count)
            missing = []
            for position, box in unit.chunks():
                if self._stop.is_set():
                    return
                if not reader.decode(box):
                    missing.append(position)
            # The compressed bytes are gone.
            self._budget.release(unit.decoded_bytes)
            held -= unit.decoded_bytes
            hashing = hashers.submit(chunk_digests, unit, reader, partial(self._take, unit))
            written = 0
            try:
                routes = self._plan.routes[unit.array.name]
                for number, ranges in pieces(unit, routes):
                    written = self._do_piece(unit, number, routes[number], ranges, reader, written)
            finally:
                # It uses the reader too; and a NaN that it finds explains an overflow found here.
                digests = hashing.result()
            del reader
        finally:
            self._budget.release(held)
        if self._stop.is_set():
            return  # perhaps half way
        done = Done(digests, missing, written)
        self._note(unit, done)
        self._finish(unit, done)

    def _take(
        self, unit: Unit, position: tuple[int, ...], part: tuple[slice, ...], data: Array
    ) -> bool:
        """Looks at each part of a unit while it is hashed; False stops the hashing."""
        if not self._allow_nonfinite:
            where = f" at [{', '.join(f'{s.start}:{s.stop}' for s in part)}]"
            message = nonfinite_message(unit.array.name, where)
            check_finite(data, unit.array.dtype, message)
        self._progress(data.nbytes, 0)
        return not self._stop.is_set()

    def _do_piece(
        self, unit: Unit, number: int, route: Route, ranges: Ranges, reader: Reader, written: int
    ) -> int:
        """Puts a piece to its place; `written`, with what went to the tensors added."""
        lot, form, parked = self._lot(unit, number), route.form, 0
        for part in blocks(route, ranges):
            if self._stop.is_set():
                break
            block = reader.read(source_box(unit, form, part))
            values = form.run(block, part)
            if form.value.changes:
                check_overflow(block, unit.array, values, route, copied=self._allow_nonfinite)
            if lot is not None:
                scratch = self._parking[self._assembly[unit.array.name]].scratch
                assert scratch is not None
                scratch.write(lot.offset + parked, payload(values))
                parked += values.nbytes
            else:
                written = self._write(route, form.offset(part), values, written)
            del block, values  # before the next are made
        return written

    def _lot(self, unit: Unit, number: int) -> _Lot | None:
        assembly = self._assembly.get(unit.array.name)
        return self._parking[assembly].lots.get((unit.number, number)) if assembly else None

    def _write(self, route: Route, offset: int, values: Array, written: int) -> int:
        """Writes values that follow each other in the target, to every copy.

        Returns:
            CRC-32 of them after what came before. It tells damage, not a forger: who can write to
            the folder can write a journal too.
        """
        data = payload(values)
        for edge in route.edges:
            place = self._plan.places[edge.target]
            self._output.write(place.file, place.offset + offset, data)
            self._progress(0, len(data))
        self._written(route, len(data))
        return zlib.crc32(data, written)

    def _written(self, route: Route, count: int) -> None:
        for edge in route.edges:
            with self._lock:
                self._left[edge.target] -= count
                complete = self._left[edge.target] == 0
            if complete:
                self._output.completed(self._plan.places[edge.target].file, edge.target)

    def _finish(self, unit: Unit, done: Done) -> None:
        self._to_sync.put(lambda: self._journal.unit(unit.number, done))
        name = self._assembly.get(unit.array.name)
        with self._lock:
            waiting = self._waiting.get(name) if name is not None else None
            if name is None or waiting is None:
                return
            waiting.discard(unit.number)
            if waiting:
                return
        written = self._settle(name)
        if not self._stop.is_set():  # it may have stopped half way
            self._to_sync.put(lambda: self._journal.settle(name, written))

    # --- parked pieces --------------------------------------------------------------------------

    def _lay_out(self, assembly: Assembly) -> _Parking:
        """Gives every piece of an assembly its lot; pieces follow each other without gaps."""
        parking = _Parking()
        for unit in self._plan.units:
            if unit.array.name not in assembly.arrays:
                continue
            routes = self._plan.routes[unit.array.name]
            for number, ranges in pieces(unit, routes):
                route = routes[number]
                if route.slot in assembly.slots:
                    lot = _Lot(parking.size, route.form, ranges)
                    parking.lots[unit.number, number] = lot
                    parking.slots.setdefault(route.slot, (route, []))[1].append(lot)
                    parking.size += route.form.piece_bytes(ranges)
        return parking

    def _settle(self, name: str) -> int:
        """Puts the parked pieces of an assembly together, tensor by tensor, block by block.

        Returns:
            CRC-32 of what was written.
        """
        parking, written = self._parking[name], 0
        assert parking.scratch is not None
        for route, lots in parking.slots.values():
            form = route.form
            offset = form.base * form.dtype.itemsize
            for first, shape in stretches(form):
                if self._stop.is_set():
                    return written
                out = np.zeros(shape, form.dtype)
                for lot in lots:
                    _collect(parking.scratch, lot, out, first)
                written = self._write(route, offset, out, written)
                offset += out.nbytes
        parking.scratch.close()
        parking.scratch = None
        return written

    # --- the rest -------------------------------------------------------------------------------

    def _fill_constants(self) -> None:
        for edge in self._plan.constants:
            place = self._plan.places[edge.target]
            values = np.full(edge.shape, edge.fill, DTYPES[edge.dtype])
            self._output.write(place.file, place.offset, payload(values))
            self._output.completed(place.file, edge.target)
            self._progress(0, edge.nbytes)
        for name, parking in self._parking.items():
            if self._waiting.get(name):
                safe = hashlib.sha256(name.encode()).hexdigest()[:16]
                parking.scratch = Scratch(self._folder / f"scratch-{safe}", parking.size)

    def _note(self, unit: Unit, done: Done) -> None:
        with self._lock:
            self._chunks.setdefault(unit.array.name, {}).update(done.chunks)
            if done.missing:
                self._missing.setdefault(unit.array.name, []).extend(done.missing)

    def _array_digest(self, name: str) -> str:
        info = self._arrays.info[name]
        return array_digest(info.dtype, info.shape, info.chunk, self._chunks[name])


def _slot_bytes(form: Form) -> int:
    return math.prod(form.target_shape) * form.dtype.itemsize


def _collect(scratch: Scratch, lot: _Lot, out: Array, first: int) -> None:
    """Copies the rows of one parked piece that a block from row `first` on holds."""
    axes, shape = lot.form.target_axes, lot.form.piece_shape(lot.ranges)
    start = lot.ranges[axes[0]][0]
    low, high = max(first, start), min(first + out.shape[0], start + shape[0])
    if low >= high:
        return
    row = math.prod(shape[1:]) * out.itemsize
    data = scratch.read(lot.offset + (low - start) * row, (high - low) * row)
    piece = np.frombuffer(data, out.dtype).reshape(high - low, *shape[1:])
    begin = [lot.ranges[axis][0] for axis in axes[1:]]
    inner = [slice(b, b + n) for b, n in zip(begin, shape[1:], strict=True)]
    out[(slice(low - first, high - first), *inner)] = piece
