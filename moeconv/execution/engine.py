"""Carrying out a plan: every chunk read and decoded once, scattered to its places, within memory.

Workers take units in the plan's order, passing over those that memory has no room for yet. Once a
unit is decoded, one thread hashes it while another cuts it into blocks of a few MiB; each block is
cast, transposed and written at its place (`mover`). Bytes do not depend on the number of workers.
The engine moves boxes from a `Source` to a `Sink`, and does not know which of them is MaxText's.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeconv.artifact.manifest import FileRecord
from moeconv.execution.digest import Position
from moeconv.execution.journal import Journal
from moeconv.execution.memory import Budget
from moeconv.execution.mover import Mover, Progress
from moeconv.execution.recorder import Recorder
from moeconv.execution.sink import open_sink
from moeconv.execution.spill import Spill, slot_bytes
from moeconv.execution.threads import Thread
from moeconv.planning.estimate import unit_cost
from moeconv.planning.plan import Plan
from moeconv.planning.units import Route, Unit, pieces
from moeconv.tensor.axes import Ranges
from moeconv.tensor.dtypes import DTYPES
from moeconv.tensor.stored import Source


@dataclass(frozen=True)
class Result:
    """What an executed plan leaves.

    Attributes:
        files: Every file of values, by name.
        arrays: Digest of every source array as it was read, by name (see `array_digest`).
        missing: Chunks that the source does not store, by array: their places in its grid. It is
            a checkpoint of an older Orbax, which leaves out zeros, so that a lost chunk looks the
            same.
    """

    files: Mapping[str, FileRecord]
    arrays: Mapping[str, str]
    missing: Mapping[str, Sequence[Position]]

    @property
    def warnings(self) -> list[str]:
        """Sentences for people."""
        if not self.missing:
            return []
        return [
            "chunks of these parameters are not stored and were read as zeros, as "
            "--allow-missing-chunks says; lost chunks look the same: " + ", ".join(self.missing)
        ]


class Engine:
    """Executes one plan into a staging directory."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        folder: Path,
        *,
        jobs: int,
        memory: int,
        journal: Journal,
        allow_nonfinite: bool = False,
        progress: Progress = lambda read, written: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Prepares it.

        Args:
            plan: What to do.
            source: Where to read.
            folder: The staging directory.
            jobs: Units worked on at the same time.
            memory: Bytes that they may take together.
            journal: What an earlier process has done, and where this one writes what it does.
            allow_nonfinite: Copies NaN and Inf.
            progress: Called with bytes read and bytes written, from any thread.
            note: Called with sentences for people.
        """
        self._plan = plan
        self._source = source
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
        self._assembly = {name: each.name for each in plan.assemblies for name in each.arrays}
        self._spills = {
            each.name: Spill.of(each, plan.units, plan.routes) for each in plan.assemblies
        }
        # Units that an assembly waits for, by its name.
        self._waiting: dict[str, set[int]] = {}

    def run(self) -> Result:
        """Executes the plan.

        Raises:
            TensorError: A chunk is damaged, or holds values that are refused.
            OutputError: The disk is full.
            KeyboardInterrupt: The user stopped it; finished units stay in the journal.
        """
        self._sink = open_sink(self._plan.output, self._folder, keep=bool(self._journal.done))
        self._recorder = Recorder(self._journal, self._sink, self._abort)
        self._mover = Mover(
            self._plan,
            self._source,
            self._sink,
            self._spills,
            self._stop,
            allow_nonfinite=self._allow_nonfinite,
            progress=self._progress,
        )
        try:
            todo = self._restore()
            self._fill_constants()
            self._sink.start()
            self._work(todo)
            files = self._sink.finish()
            self._sink.sync()
        finally:
            for spill in self._spills.values():
                spill.close()
            self._sink.close()
        info = {name: self._source.info[name] for name in self._plan.routes}
        return Result(files, self._recorder.array_digests(info), self._recorder.missing())

    # --- what an earlier process has done -------------------------------------------------------

    def _restore(self) -> list[Unit]:
        """Takes over what the journal says is on disk, as far as it is; the rest is to be done."""
        kept = {unit.number for unit in self._plan.units if self._is_on_disk(unit)}
        done = {name for name in self._spills if self._is_assembled(name)}
        journal = self._journal
        if lost := [*(journal.done.keys() - kept), *(journal.assemblies.keys() - done)]:
            self._say(
                f"warning: what the unfinished conversion wrote was changed since, in {len(lost)} "
                "places; they are written again"
            )
        # Spilled pieces are gone, so that an assembly is kept whole or not at all.
        rewrite = {
            self._assembly.get(u.array.name) for u in self._plan.units if u.number not in kept
        }
        rewrite |= self._spills.keys() - done
        todo = []
        for unit in self._plan.units:
            assembly = self._assembly.get(unit.array.name)
            if assembly is not None and assembly in rewrite:
                self._waiting.setdefault(assembly, set()).add(unit.number)
            elif unit.number in kept:
                self._recorder.take_over(unit, journal.done[unit.number])
                self._mover.count(unit)
                continue
            todo.append(unit)
        return sorted(todo, key=unit_cost, reverse=True)

    def _is_on_disk(self, unit: Unit) -> bool:
        """True if what the journal says of a unit is stored in every copy of its targets."""
        done = self._journal.done.get(unit.number)
        if done is None:
            return False
        spill = self._spills.get(self._assembly.get(unit.array.name, ""))
        routes = self._plan.routes[unit.array.name]
        parts = [
            (routes[number], ranges, routes[number].form.piece_bytes(ranges))
            for number, ranges in pieces(unit, routes)
            if spill is None or (unit.number, number) not in spill.pieces
        ]
        return self._holds(parts, done.written)

    def _is_assembled(self, name: str) -> bool:
        """The same for the spilled pieces of an assembly."""
        written = self._journal.assemblies.get(name)
        parts: list[tuple[Route, Ranges, int]] = []
        for route, _ in self._spills[name].slots.values():
            sizes = zip(route.form.target_axes, route.form.target_shape, strict=True)
            whole = {axis: (0, size) for axis, size in sizes}
            parts.append((route, whole, slot_bytes(route.form)))
        return written is not None and self._holds(parts, written)

    def _holds(self, parts: Sequence[tuple[Route, Ranges, int]], written: int) -> bool:
        for copy in range(max((len(route.edges) for route, _, _ in parts), default=0)):
            found = 0
            for route, ranges, size in parts:
                target = route.edges[min(copy, len(route.edges) - 1)].target
                found = self._sink.checksum(target, route.form, ranges, size, found)
            if found != written:
                return False
        return True

    # --- scheduling -----------------------------------------------------------------------------

    def _work(self, todo: list[Unit]) -> None:
        jobs = min(self._jobs, max(1, len(todo)))
        hashers = ThreadPoolExecutor(jobs)
        workers = [Thread(lambda: self._worker(todo, hashers)) for _ in range(jobs)]
        try:
            self._recorder.start()
            for thread in workers:
                thread.start()
            for thread in workers:
                thread.wait()
            self._recorder.stop()
        except BaseException:
            self._abort(None)
            for thread in workers:
                thread.wait_uninterrupted()
            self._recorder.stop(uninterrupted=True)
            raise
        finally:
            hashers.shutdown()
        if self._failure is not None:
            raise self._failure

    def _worker(self, todo: list[Unit], hashers: Executor) -> None:
        try:
            while (unit := self._budget.take(todo, unit_cost)) is not None:
                self._do(unit, hashers)
        except BaseException as error:
            self._abort(error)

    def _abort(self, error: BaseException | None) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._stop.set()
        self._budget.close()

    def _do(self, unit: Unit, hashers: Executor) -> None:
        held = unit_cost(unit)

        def decoded() -> None:
            nonlocal held
            self._budget.release(unit.decoded_bytes)
            held -= unit.decoded_bytes

        try:
            done = self._mover.move(unit, hashers, decoded)
        finally:
            self._budget.release(held)
        if done is None:
            return
        self._recorder.finished(unit, done)
        name = self._assembly.get(unit.array.name)
        if name is None or not self._is_last(name, unit):
            return
        written = self._mover.assemble(self._spills[name])
        if written is not None:
            self._recorder.assembled(name, written)

    def _is_last(self, name: str, unit: Unit) -> bool:
        """True if an assembly has waited for this unit alone."""
        with self._lock:
            waiting = self._waiting.get(name)
            if waiting is None:
                return False
            waiting.discard(unit.number)
            return not waiting

    def _fill_constants(self) -> None:
        for edge in self._plan.constants:
            self._sink.fill(edge.target, np.full(edge.shape, edge.fill, DTYPES[edge.dtype]))
            self._sink.completed(edge.target)
            self._progress(0, edge.nbytes)
        for name in self._waiting:
            self._spills[name].open(self._folder)
