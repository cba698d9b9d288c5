"""Level `weights`: every output tensor taken back to the checkpoint and compared, value by value.

The way back is the inverse of the rule's ops, applied to the bytes of the output files; the forward
path that wrote them is not used. Placement must agree bit for bit; where a rule rounds, each value
must be the product rounded once, within half a unit in the last place. Chunks of the checkpoint are
read once, within a memory budget.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from moeconv.errors import MemoryLimitError
from moeconv.execution.digest import array_digest, chunk_digests
from moeconv.execution.memory import Budget
from moeconv.mapping.edges import Edge
from moeconv.planning.estimate import unit_cost
from moeconv.planning.slabs import MIB
from moeconv.planning.units import (
    Route,
    Unit,
    blocks,
    companions,
    cut_into_units,
    pieces,
    routes_of,
    source_box,
)
from moeconv.sizes import format_size
from moeconv.tensor.axes import Array, Box, Ranges
from moeconv.tensor.dtypes import DTYPES, bits
from moeconv.tensor.form import Form
from moeconv.tensor.stored import Reader
from moeconv.verification.boundary import blaming
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Check, CheckFactory
from moeconv.verification.context import Verification
from moeconv.verification.levels import Level
from moeconv.verification.levels.tokenizers import check_own_tokenizer
from moeconv.verification.settings import Progress
from moeconv.verification.stored import Stored

_OF = CheckFactory(Level.WEIGHTS)


@dataclass
class _Fault:
    """What is wrong with one tensor."""

    differing: int = 0
    first: tuple[int, ...] | None = None


@dataclass
class Findings:
    """Faults and digests, gathered from several threads."""

    faults: dict[str, _Fault] = field(default_factory=dict)
    chunks: dict[str, dict[tuple[int, ...], str]] = field(default_factory=dict)
    values: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, edge: Edge, wrong: Array, start: Sequence[int]) -> None:
        """Adds the differing values of one block; `start` is the block's place in the tensor."""
        where = np.argwhere(wrong)
        if not len(where):
            return
        first = tuple(int(i) + s for i, s in zip(where[0], start, strict=True))
        with self.lock:
            fault = self.faults.setdefault(edge.target, _Fault())
            fault.differing += len(where)
            fault.first = min(fault.first or first, first)


def run_level(run: Verification) -> list[Check]:
    """The level, with the tokenizer that the run kept."""
    with run.meter(source_bytes(run.candidate)) as progress:
        checks = check_weights(
            run.candidate, jobs=run.options.jobs, memory=run.options.memory, progress=progress
        )
    return checks + check_own_tokenizer(run.candidate)


def check_weights(
    candidate: Candidate, *, jobs: int, memory: int, progress: Progress = lambda done: None
) -> list[Check]:
    """Compares every tensor with the checkpoint.

    Args:
        candidate: What is verified.
        jobs: Chunks worked on at the same time.
        memory: Bytes that the decoded chunks may take together.
        progress: Called with bytes of the checkpoint that were compared.

    Raises:
        MemoryLimitError: Not even one chunk has room.
        TensorError: The checkpoint is damaged.
        CandidateError: A header cannot be read.
        NotACheckpointError: The checkpoint is not there.
    """
    if (wrong := mismatch(candidate)) is not None:
        return [wrong]
    findings = compare_all(candidate, jobs=jobs, memory=memory, progress=progress)
    digests = {
        name: array_digest(info.dtype, info.shape, info.chunk, chunks)
        for name, chunks in findings.chunks.items()
        for info in (candidate.read.info[name],)
    }
    return [source_check(candidate, digests), values_check(candidate, findings)]


def mismatch(candidate: Candidate) -> Check | None:
    """The check of names, shapes and dtypes, where they are not as expected; else None."""
    edges, stored = candidate.edges, candidate.tensors
    absent, unknown = sorted(set(edges) - set(stored)), sorted(set(stored) - set(edges))
    wrong = [
        n
        for n in sorted(set(edges) & set(stored))
        if (stored[n].spec.shape, stored[n].spec.dtype) != (edges[n].shape, edges[n].dtype)
    ]
    if not (absent or unknown or wrong):
        return None
    return _OF.failed(
        "tensors",
        f"{len(absent)} tensors are missing, {len(unknown)} are not the checkpoint's, and "
        f"{len(wrong)} have another shape or dtype than its mapping gives them",
        tensors=absent + unknown + wrong,
        layer=_first_layer(edges, absent + wrong),
    )


def source_bytes(candidate: Candidate) -> int:
    """Bytes of the checkpoint that level weights compares."""
    sources = routes_of(list(candidate.edges.values()))
    return sum(candidate.read.info[name].nbytes for name in sources)


def compare_all(candidate: Candidate, *, jobs: int, memory: int, progress: Progress) -> Findings:
    """Compares every value, each chunk of the arrays read once; raises as `check_weights`."""
    findings = Findings()
    routes = routes_of(list(candidate.edges.values()))

    def work(unit: Unit) -> None:
        reader = candidate.read.reader(unit.array.name, unit.chunk_count)
        digests = chunk_digests(unit, reader)
        with findings.lock:
            findings.chunks.setdefault(unit.array.name, {}).update(digests)
        group, beside = routes[unit.array.name], companions(unit, candidate.read)
        for number, ranges in pieces(unit, group):
            _compare_piece(candidate, findings, unit, group[number], ranges, reader, beside)
        progress(unit.nbytes)

    each_unit(cut_into_units(routes, candidate.read.info), work, jobs=jobs, memory=memory)
    _check_filled(candidate, findings)
    return findings


def each_unit(
    units: Sequence[Unit], work: Callable[[Unit], None], *, jobs: int, memory: int
) -> None:
    """Works on every unit, several at a time as far as memory allows.

    Raises:
        MemoryLimitError: Not even one has room.
    """
    units = sorted(units, key=unit_cost, reverse=True)
    largest = units[0]
    needed = unit_cost(largest)
    if memory < needed:
        raise MemoryLimitError(
            f"--max-memory {format_size(memory)} is below the {format_size(needed)} that level "
            f"weights needs: {largest.array.name} is compared in pieces of "
            f"{format_size(largest.decoded_bytes)}; give --max-memory "
            f"{math.ceil(needed / MIB)}MiB or more"
        )
    budget = Budget(memory)

    def within(unit: Unit) -> None:
        cost = unit_cost(unit)
        budget.acquire(cost)
        try:
            work(unit)
        finally:
            budget.release(cost)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(within, unit) for unit in units]:
                done.result()
        except BaseException:  # Ctrl-C, or a damaged chunk: the others are not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compare_piece(
    candidate: Candidate,
    findings: Findings,
    unit: Unit,
    route: Route,
    ranges: Ranges,
    reader: Reader,
    beside: Callable[[str, Box], Array],
) -> None:
    form = route.form
    for part in blocks(form, ranges):
        source = reader.read(source_box(unit, form, part))
        others = form.others(part, beside)
        for edge in route.edges:
            piece = _read(candidate.tensors[edge.target], form, form.box(part))
            wrong = candidate.wrong(form, source, piece, others)
            with findings.lock:
                findings.values += piece.size
            if wrong.any():
                findings.note(edge, wrong, [part[axis][0] for axis in form.target_axes])


def _read(stored: Stored, form: Form, box: tuple[slice, ...]) -> Array:
    """A box of the stretch of a tensor that a form places values in, with its axes apart."""
    offset = stored.offset + form.base * form.dtype.itemsize
    with blaming(f"{stored.file} cannot be read", check="tensors"):
        data: Array = np.memmap(stored.file, form.dtype, "r", offset, form.target_shape)
        return np.array(data[box])


def _check_filled(candidate: Candidate, findings: Findings) -> None:
    """Tensors without a source, and the padding of those with one."""
    for edge in candidate.edges.values():
        stored = candidate.tensors[edge.target]
        if not edge.parts:
            dtype = DTYPES[edge.dtype]
            with blaming(f"{stored.file} cannot be read", check="tensors"):
                filled: Array = np.memmap(stored.file, dtype, "r", stored.offset, edge.shape)
            expected = np.full(edge.shape, edge.fill, dtype)
            findings.note(edge, bits(filled) != bits(expected), [0] * filled.ndim)
        for part in edge.parts:
            for box in part.form.padding():
                data = _read(stored, part.form, box)
                findings.note(edge, bits(data) != 0, [index.start or 0 for index in box])


def _first_layer(edges: Mapping[str, Edge], names: Sequence[str]) -> int | None:
    layers = [edges[n].layer for n in names if n in edges]
    return min((layer for layer in layers if layer is not None), default=None)


def source_check(candidate: Candidate, digests: Mapping[str, str]) -> Check:
    """The source is the one that was converted.

    Args:
        candidate: What is verified.
        digests: Of every array that was read, by name.
    """
    claimed = candidate.manifest.source.arrays
    changed = sorted(n for n in set(claimed) | set(digests) if claimed.get(n) != digests.get(n))
    lines = [f"{name} {digest}" for name, digest in sorted(digests.items())]
    total = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if changed:
        return _OF.failed(
            "source",
            f"{len(changed)} of {len(digests)} arrays of {candidate.source} are not those that "
            "were converted",
            tensors=changed,
        )
    if lacking := candidate.manifest.missing_chunks:
        return _OF.warned(
            "source",
            f"chunks of {len(lacking)} arrays of {candidate.source} are not stored and count "
            "as zeros; whether they were lost is not known",
            tensors=sorted(lacking),
            metrics={"digest": total},
        )
    return _OF.passed(
        "source",
        f"all {len(digests)} arrays of {candidate.source} are those that were converted",
        metrics={"digest": total},
    )


def values_check(candidate: Candidate, findings: Findings) -> Check:
    """The verdict over all values."""
    exact = sum(map(candidate.is_exact, candidate.edges.values()))
    count = len(candidate.edges)
    metrics = {
        "tensors": count,
        "exact_tensors": exact,
        "values": findings.values,
        "differing": {name: fault.differing for name, fault in sorted(findings.faults.items())},
    }
    if not findings.faults:
        return _OF.passed(
            "values",
            f"{count} tensors, {findings.values:,} values: {exact} tensors bit for bit, "
            f"{count - exact} within one rounding",
            metrics=metrics,
        )

    def place(name: str) -> tuple[int, str]:
        layer = candidate.edges[name].layer
        return (-1 if layer is None else layer, name)

    names = sorted(findings.faults, key=place)
    first = findings.faults[names[0]]
    return _OF.failed(
        "values",
        f"{len(names)} of {count} tensors differ from {candidate.origin}; the first is "
        f"{names[0]} ({first.differing:,} values, from {list(first.first or ())})",
        tensors=names,
        layer=_first_layer(candidate.edges, names),
        metrics=metrics,
    )
