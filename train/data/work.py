"""The work of preparing: chunks of a source's texts, each turned into shards by some process."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from moeconv_train.data import records
from moeconv_train.data.manifest import TRAIN, VALIDATION, Counts, Request, Shard, Split
from moeconv_train.data.packing import pack
from moeconv_train.data.tokens import DataTokenizer, Encoder

from moeconv.errors import OutputError


@dataclass(frozen=True)
class Chunk:
    """Consecutive texts of one file; which they are depends on the source alone."""

    file: int  # its index among the request's
    number: int  # of the chunk in the file
    begin: int  # index of the first text in the file
    texts: Sequence[str | None]


@dataclass(frozen=True)
class Job:
    """What every worker knows."""

    folder: Path
    request: Request
    tokenizer: DataTokenizer


def chunks(file: int, texts: Iterable[str | None], characters: int) -> Iterator[Chunk]:
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


def write_all(job: Job, chunks: Iterable[Chunk], processes: int) -> Iterator[tuple[int, Shard]]:
    """Every shard with the index of its file, in the order of the chunks.

    Args:
        job: What to make.
        chunks: Of what; a few at a time are held in memory.
        processes: How many work; with 0 this one does.

    Raises:
        OutputError: A process was killed.
    """
    if not processes:
        work = Worker(job)
        for chunk in chunks:
            yield from work(chunk)
        return
    others = set(multiprocessing.active_children())
    # Not forked: the trainer that calls may hold threads and a GPU.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin, (job,))
    running: deque[Future[list[tuple[int, Shard]]]] = deque()
    try:
        for chunk in chunks:
            # May start a process. A terminal sends Ctrl-C to all of them: it is for this one.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            running.append(pool.submit(_work, chunk))
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if len(running) > processes + 1:  # the next chunk waits, ready
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    except BrokenProcessPool:
        raise OutputError(
            "a worker process was killed, perhaps for want of memory; fewer --workers need less"
        ) from None
    finally:
        if running:  # something went wrong: nobody wants the rest
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
        pool.shutdown(cancel_futures=True)


class Worker:
    """Turns chunks into shards."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encode = Encoder(job.tokenizer)

    def __call__(self, chunk: Chunk) -> list[tuple[int, Shard]]:
        """Writes the chunk's shards, one for each split that it has stories of."""
        request = self._job.request
        home = request.source.files[chunk.file].split
        stories: dict[Split, list[str]] = {TRAIN: [], VALIDATION: []}
        empty = dict.fromkeys(stories, 0)
        for index, text in enumerate(chunk.texts, chunk.begin):
            moved = home == TRAIN and held_out(request, chunk.file, index)
            split = VALIDATION if moved else home
            if text is None or not text.strip():
                empty[split] += 1
            else:
                stories[split].append(text)
        return [
            (chunk.file, self._shard(chunk, split, self._encode(texts), empty[split]))
            for split, texts in stories.items()
            if texts
        ]

    def _shard(self, chunk: Chunk, split: Split, stories: list[np.ndarray], empty: int) -> Shard:
        request = self._job.request
        packed = pack(stories, request.sequence_length, request.too_long)
        # The name sorts as the source is ordered.
        name = f"{split}-{chunk.file:04d}-{chunk.number:05d}.array_record"
        path = self._job.folder / name
        records.write_shard(path, packed.rows)
        return Shard(
            name=name,
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


def _work(chunk: Chunk) -> list[tuple[int, Shard]]:
    assert _worker is not None
    return _worker(chunk)
