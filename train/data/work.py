"""The work of preparing: chunks of a source file, each turned into shards by some process."""

import hashlib
import importlib.metadata
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from moeconv_train.data import records
from moeconv_train.data.manifest import TRAIN, VALIDATION, Counts, Record, Request, Shard, Split
from moeconv_train.data.packing import pack
from moeconv_train.data.tokens import DataTokenizer, Encoder

from moeconv.errors import OutputError


class Receipt(Record):
    """That a chunk is done: its shards, whole and on disk."""

    stories_read: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Chunk:
    """Consecutive texts of one file; which they are depends on the source alone.

    Attributes:
        file: Index of the file among the request's.
        number: Index of the chunk in the file.
        begin: Index of its first text in the file.
        texts: The texts.
    """

    file: int
    number: int
    begin: int
    texts: Sequence[str | None]

    @property
    def name(self) -> str:
        """Part of the names of its shards and its receipt; sorts as the source is ordered."""
        return f"{self.file:04d}-{self.number:05d}"


@dataclass(frozen=True)
class Job:
    """What every worker knows."""

    out: Path
    receipts: Path
    request: Request
    tokenizer: DataTokenizer


def chunks(file: int, texts: Iterator[str | None], characters: int) -> Iterator[Chunk]:
    """Cuts a file's texts into chunks that end with the text that reaches `characters`."""
    held: list[str | None] = []
    size = number = begin = 0
    for text in texts:
        held.append(text)
        size += len(text or "")
        if size >= characters:
            yield Chunk(file, number, begin, held)
            number, begin = number + 1, begin + len(held)
            held, size = [], 0
    if held:
        yield Chunk(file, number, begin, held)


def held_out(request: Request, file: int, index: int) -> bool:
    """Whether a text is one of those that validation takes from the train files."""
    key = f"{request.seed}:{file}:{index}".encode()
    drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64
    return drawn < request.validation_fraction


class Worker:
    """Turns chunks into shards."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encode = Encoder(job.tokenizer)

    def __call__(self, chunk: Chunk) -> Receipt:
        """Writes the chunk's shards and then, once they are on disk, its receipt."""
        request = self._job.request
        home = request.source.files[chunk.file].split
        indices: dict[Split, list[int]] = {TRAIN: [], VALIDATION: []}
        empty = dict.fromkeys(indices, 0)
        for i, text in enumerate(chunk.texts):
            moved = home == TRAIN and held_out(request, chunk.file, chunk.begin + i)
            split = VALIDATION if moved else home
            if text is None or not text.strip():
                empty[split] += 1
            else:
                indices[split].append(i)
        shards = []
        for split, chosen in indices.items():
            stories = self._encode([chunk.texts[i] or "" for i in chosen])
            if stories:
                shards.append(self._shard(f"{split}-{chunk.name}", split, stories, empty[split]))
        receipt = Receipt(stories_read=len(chunk.texts), shards=tuple(shards))
        content = receipt.model_dump_json(indent=1).encode()
        records.write_bytes(self._job.receipts / f"{chunk.name}.json", content)
        return receipt

    def _shard(self, stem: str, split: Any, stories: list[np.ndarray], empty: int) -> Shard:
        request = self._job.request
        packed = pack(stories, request.sequence_length, request.layout, request.too_long)
        path = self._job.out / f"{stem}.array_record"
        records.write_shard(path, packed.rows)
        return Shard(
            name=path.name,
            split=split,
            bytes=path.stat().st_size,
            sha256=records.sha256(path),
            counts=Counts(
                rows=len(packed.rows),
                stories=len(stories),
                tokens=sum(map(len, stories)),
                targets=packed.targets,
                cut=packed.cut,
                dropped=packed.dropped,
                empty=empty,
            ),
        )


class Crew:
    """Some processes with a worker each, or with none a worker in this process."""

    def __init__(self, job: Job, processes: int) -> None:
        self._here = None if processes else Worker(job)
        self._pool = None
        self._room = 1
        self._running: dict[Future[Receipt], Chunk] = {}
        if processes:
            # Not forked: the trainer that calls may hold threads and a GPU.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, _begin, (job,))
            self._room = processes + 1  # the next chunk waits, ready

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    def give(self, chunk: Chunk) -> Iterator[tuple[Chunk, Receipt]]:
        """Hands out a chunk, and gives back those that are done once there is room."""
        if self._here is not None:
            yield chunk, self._here(chunk)
            return
        assert self._pool is not None
        self._running[self._pool.submit(_work, chunk)] = chunk
        while len(self._running) > self._room:
            yield from self._done()

    def rest(self) -> Iterator[tuple[Chunk, Receipt]]:
        """The chunks still being worked on, as they get done."""
        while self._running:
            yield from self._done()

    def _done(self) -> Iterator[tuple[Chunk, Receipt]]:
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            chunk = self._running.pop(future)
            try:
                yield chunk, future.result()
            except BrokenProcessPool:
                raise OutputError(
                    "a worker process was killed, perhaps for want of memory; the same command "
                    "goes on, with fewer --workers needing less"
                ) from None


_worker: Worker | None = None


def _begin(job: Job) -> None:
    """In a new process: be ready, use one core, and do not outlive a parent that was killed."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    _worker = Worker(job)


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> Receipt:
    assert _worker is not None
    return _worker(chunk)


def version() -> str:
    """The version that made the data."""
    return importlib.metadata.version("moeconv")
