"""Level `weights`: every output tensor taken back to the checkpoint and compared, value by value.

The way back is the inverse of the rule's ops, applied to what lies in the output files; the forward
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

from moeconv.convert.digest import array_digest, chunk_digests
from moeconv.convert.memory import Budget
from moeconv.convert.plan import WORKER_BYTES
from moeconv.convert.sizes import format_size
from moeconv.convert.work import (
    MIB,
    UNIT_BYTES,
    Range,
    Route,
    Unit,
    pieces,
    routes_of,
    source_box,
    unit_boxes,
)
from moeconv.errors import MemoryLimitError
from moeconv.mapping.axes import Array
from moeconv.mapping.edges import Edge
from moeconv.mapping.ops import DTYPES, SIGNIFICAND_BITS, Cast, Scale
from moeconv.orbax.arrays import Reader
from moeconv.verify.outcome import Check, Status, failed, passed
from moeconv.verify.subject import Stored, Subject

Progress = Callable[[int], None]


@dataclass
class _Fault:
    """What is wrong with one tensor."""

    differing: int = 0
    first: tuple[int, ...] | None = None


@dataclass
class _Findings:
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


def check_weights(
    subject: Subject, *, jobs: int, memory: int, progress: Progress = lambda done: None
) -> list[Check]:
    """Compares every tensor with the checkpoint.

    Args:
        subject: What is verified.
        jobs: Chunks worked on at the same time.
        memory: Bytes that the decoded chunks may take together.
        progress: Called with bytes of the checkpoint that were compared.

    Raises:
        MemoryLimitError: Not even one chunk has room.
        TensorError: The checkpoint is damaged.
        CandidateError: A header cannot be read.
        NotACheckpointError: The checkpoint is not there.
    """
    edges, stored = subject.edges, subject.tensors
    absent, unknown = sorted(set(edges) - set(stored)), sorted(set(stored) - set(edges))
    wrong = [
        n
        for n in sorted(set(edges) & set(stored))
        if (stored[n].spec.shape, stored[n].spec.dtype) != (edges[n].shape, edges[n].dtype)
    ]
    if absent or unknown or wrong:
        return [
            failed(
                "weights",
                "tensors",
                f"{len(absent)} tensors are missing, {len(unknown)} are not the checkpoint's, and "
                f"{len(wrong)} have another shape or dtype than its mapping gives them",
                tensors=absent + unknown + wrong,
                layer=_first_layer(edges, absent + wrong),
            )
        ]
    findings = _Findings()
    _compare_all(subject, findings, jobs, memory, progress)
    _check_filled(subject, findings)
    return [_source_check(subject, findings), _values_check(subject, findings)]


def _cost(unit: Unit) -> int:
    """Bytes of a unit while it is compared: decoded, and compressed while it is decoded."""
    return 2 * unit.decoded_bytes + WORKER_BYTES


def source_bytes(subject: Subject) -> int:
    """Bytes of the checkpoint that level weights compares."""
    sources = routes_of(list(subject.edges.values()))
    return sum(subject.arrays.info[name].nbytes for name in sources)


def _compare_all(
    subject: Subject, findings: _Findings, jobs: int, memory: int, progress: Progress
) -> None:
    routes = routes_of(list(subject.edges.values()))
    info = subject.arrays.info
    limit = max(UNIT_BYTES, *(info[name].chunk_bytes for name in routes))
    units = [
        Unit(info[name], box, 0)
        for name, group in routes.items()
        for box in unit_boxes(info[name], group[0].axes, group, limit)
    ]
    units.sort(key=lambda unit: (-unit.decoded_bytes, unit.array.name, unit.box))
    largest = units[0]
    if memory < _cost(largest):
        raise MemoryLimitError(
            f"--max-memory {format_size(memory)} is below the {format_size(_cost(largest))} that "
            f"level weights needs: {largest.array.name} is compared in pieces of "
            f"{format_size(largest.decoded_bytes)}; give --max-memory "
            f"{math.ceil(_cost(largest) / MIB)}MiB or more"
        )
    budget = Budget(memory)

    def work(unit: Unit) -> None:
        cost = _cost(unit)
        budget.acquire(cost)
        try:
            reader = subject.arrays.reader(unit.array.name, unit.chunk_count)
            digests = chunk_digests(unit, reader)
            with findings.lock:
                findings.chunks.setdefault(unit.array.name, {}).update(digests)
            group = routes[unit.array.name]
            for number, ranges in pieces(unit, group):
                _compare_piece(subject, findings, unit, group[number], ranges, reader)
            progress(unit.nbytes)
        finally:
            budget.release(cost)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in [pool.submit(work, unit) for unit in units]:
                done.result()
        except BaseException:  # Ctrl-C, or a damaged chunk: nobody waits for all the others
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compare_piece(
    subject: Subject,
    findings: _Findings,
    unit: Unit,
    route: Route,
    ranges: Mapping[str, Range],
    reader: Reader,
) -> None:
    start, stop = ranges[route.lead]
    for first in range(start, stop, route.rows_per_block):
        part = {**ranges, route.lead: (first, min(first + route.rows_per_block, stop))}
        source = reader.read(source_box(unit, route, part))
        for edge in route.edges:
            place = tuple(slice(*part[a]) for a in route.target_axes)
            data = _open(subject.tensors[edge.target], route.target_shape)
            _compare_block(findings, edge, route, source, np.array(data[place]), place)


def _compare_block(
    findings: _Findings,
    edge: Edge,
    route: Route,
    source: Array,
    block: Array,
    place: Sequence[slice],
) -> None:
    """Takes a block of the tensor back to the source's axes and compares it there."""
    back = np.argsort(route.place.by.permutation)
    restored = block.transpose(back)
    expected = source.reshape(restored.shape)
    value_op = route.scale or route.cast
    with findings.lock:
        findings.values += block.size
    if value_op is None or (isinstance(value_op, Cast) and value_op.bound(edge.dtype) == 0.0):
        # Widened values are compared wide: narrowing them would round a wrong low bit away.
        wide = expected if value_op is None else value_op.apply(expected, {})
        wrong = _bits(restored) != _bits(wide)
    else:
        factor = value_op.factor if isinstance(value_op, Scale) else 1.0
        exact = expected.astype(np.float64) * factor
        # Half a unit in the last place, and the rounding of this very product in float64.
        half, slack = 0.5 * _ulp(exact, edge.dtype), np.abs(exact) * 2.0**-51
        got = restored.astype(np.float64)
        apart = np.abs(got - exact)
        odd = (_bits(restored) & 1).astype(bool).reshape(restored.shape)
        # A value half way between two numbers goes to the even one.
        wrong = ~(apart <= half + slack) | (odd & (apart >= half) & (slack < half))
        wrong |= np.signbit(got) != np.signbit(exact)  # -0.0 is 0.0, but for its bits
    if wrong.any():
        moved = wrong.transpose(route.place.by.permutation)
        findings.note(edge, moved, [s.start for s in place])


# Smallest exponent of a normal number.
_EMIN = {"float32": -126, "bfloat16": -126, "float16": -14}


def _ulp(values: Array, dtype: str) -> Array:
    """The distance between neighbouring numbers of a dtype around each value."""
    exponent = np.maximum(np.frexp(np.abs(values))[1] - 1, _EMIN[dtype])
    spacing: Array = np.ldexp(1.0, exponent - (SIGNIFICAND_BITS[dtype] - 1))
    return spacing


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _open(stored: Stored, shape: Sequence[int]) -> Array:
    """The tensor in its file, unread, with its axes apart."""
    return np.memmap(
        stored.file,
        dtype=DTYPES[stored.spec.dtype],
        mode="r",
        offset=stored.offset,
        shape=tuple(shape),
    )


def _check_filled(subject: Subject, findings: _Findings) -> None:
    """Tensors without a source, and the padding of those with one."""
    routes = routes_of(list(subject.edges.values()))
    for edge in subject.edges.values():
        if edge.source is None:
            data = _open(subject.tensors[edge.target], edge.shape)
            expected = edge.apply(np.empty((), DTYPES[edge.dtype]))
            findings.note(edge, _bits(data) != _bits(expected), [0] * data.ndim)
    for route in (route for group in routes.values() for route in group):
        sizes = route.edges[0].sizes
        for position, (axis, full) in enumerate(
            zip(route.target_axes, route.target_shape, strict=True)
        ):
            if full == sizes[axis]:
                continue
            behind = (slice(None),) * position + (slice(sizes[axis], None),)
            for edge in route.edges:
                data = _open(subject.tensors[edge.target], route.target_shape)[behind]
                start = [sizes[axis] if i == position else 0 for i in range(data.ndim)]
                findings.note(edge, _bits(data) != 0, start)


def _first_layer(edges: Mapping[str, Edge], names: Sequence[str]) -> int | None:
    layers = [edges[n].layer for n in names if n in edges]
    return min((layer for layer in layers if layer is not None), default=None)


def _source_check(subject: Subject, findings: _Findings) -> Check:
    """Whether the checkpoint is the one that was converted."""
    claimed = subject.manifest.source.arrays
    digests = {}
    for name, chunks in findings.chunks.items():
        info = subject.arrays.info[name]
        digests[name] = array_digest(info.dtype, info.shape, info.chunk, chunks)
    changed = sorted(n for n in set(claimed) | set(digests) if claimed.get(n) != digests.get(n))
    lines = [f"{name} {digest}" for name, digest in sorted(digests.items())]
    total = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if changed:
        return failed(
            "weights",
            "source",
            f"{len(changed)} of {len(digests)} arrays of {subject.source} are not those that were "
            "converted",
            tensors=changed,
        )
    if lacking := subject.manifest.missing_chunks:
        return Check(
            level="weights",
            name="source",
            status=Status.WARN,
            summary=f"chunks of {len(lacking)} arrays of {subject.source} are not stored and count "
            "as zeros; whether they were lost cannot be told",
            tensors=sorted(lacking),
            metrics={"digest": total},
        )
    return passed(
        "weights",
        "source",
        f"all {len(digests)} arrays of {subject.source} are those that were converted",
        metrics={"digest": total},
    )


def _values_check(subject: Subject, findings: _Findings) -> Check:
    """The verdict over all values."""
    exact = sum(edge.bound() == 0.0 for edge in subject.edges.values())
    count = len(subject.edges)
    metrics = {
        "tensors": count,
        "exact_tensors": exact,
        "values": findings.values,
        "differing": {name: fault.differing for name, fault in sorted(findings.faults.items())},
    }
    if not findings.faults:
        return passed(
            "weights",
            "values",
            f"{count} tensors, {findings.values:,} values: {exact} tensors bit for bit, "
            f"{count - exact} within one rounding",
            metrics=metrics,
        )

    def place(name: str) -> tuple[int, str]:
        layer = subject.edges[name].layer
        return (-1 if layer is None else layer, name)

    names = sorted(findings.faults, key=place)
    first = findings.faults[names[0]]
    return failed(
        "weights",
        "values",
        f"{len(names)} of {count} tensors differ from the checkpoint; the first is {names[0]} "
        f"({first.differing:,} values, from {list(first.first or ())})",
        tensors=names,
        layer=_first_layer(subject.edges, names),
        metrics=metrics,
    )
