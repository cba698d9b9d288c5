"""What is known of a conversion under way: digests of what was read, and what is safe on disk.

A background thread syncs what was written and records it in the journal, a few units at a time, so
that a later `--resume` trusts only what is on disk.
"""

import queue
import threading
from collections.abc import Callable, Mapping

from moeconv.execution.digest import Position, array_digest
from moeconv.execution.journal import Done, Journal
from moeconv.execution.sink import Sink
from moeconv.execution.threads import Thread
from moeconv.planning.units import Unit
from moeconv.tensor.stored import ArrayInfo


class Recorder:
    """Collects what the workers report, from any thread."""

    def __init__(
        self, journal: Journal, sink: Sink, failed: Callable[[BaseException], None]
    ) -> None:
        self._journal = journal
        self._sink = sink
        self._failed = failed
        self._lock = threading.Lock()
        self._chunks: dict[str, dict[Position, str]] = {}
        self._missing: dict[str, list[Position]] = {}
        self._entries: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = Thread(self._loop)

    def start(self) -> None:
        """Begins to sync."""
        self._thread.start()

    def take_over(self, unit: Unit, done: Done) -> None:
        """Counts what an earlier process has done."""
        with self._lock:
            self._chunks.setdefault(unit.array.name, {}).update(done.chunks)
            if done.missing:
                self._missing.setdefault(unit.array.name, []).extend(done.missing)

    def finished(self, unit: Unit, done: Done) -> None:
        """Records a unit once its bytes are synced."""
        self.take_over(unit, done)
        self._entries.put(lambda: self._journal.unit(unit.number, done))

    def assembled(self, name: str, written: int) -> None:
        """Records an assembly, and the CRC-32 of its bytes, once these are synced."""
        self._entries.put(lambda: self._journal.assembled(name, written))

    def stop(self, *, uninterrupted: bool = False) -> None:
        """Waits until everything is recorded; with `uninterrupted` also through Ctrl-C."""
        self._entries.put(None)
        self._thread.wait_uninterrupted() if uninterrupted else self._thread.wait()

    def array_digests(self, info: Mapping[str, ArrayInfo]) -> dict[str, str]:
        """The digest of each array as it was read (see `digest.array_digest`)."""
        return {
            name: array_digest(one.dtype, one.shape, one.chunk, self._chunks[name])
            for name, one in info.items()
        }

    def missing(self) -> dict[str, list[Position]]:
        """Chunks that the source does not store, by array: their places in its grid."""
        return {name: sorted(self._missing[name]) for name in sorted(self._missing)}

    def _loop(self) -> None:
        ended = False
        while not ended:
            entries = [self._entries.get()]
            while not self._entries.empty():
                entries.append(self._entries.get())
            ended = None in entries
            try:
                self._sink.sync()
                for record in entries:
                    if record is not None:
                        record()
            except OSError as error:
                self._failed(error)
                return
