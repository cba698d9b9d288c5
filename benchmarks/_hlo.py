"""FLOPs of the matmuls and bytes moved by the kernels of a compiled step, counted in XLA's HLO.

XLA's `cost_analysis()` returns nothing for an executable compiled without its device, and elsewhere
counts a loop's body once and cuBLAS calls not at all. The optimised HLO text has all of it: shapes,
contracted dimensions, trip counts.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

# Those whose name does not end in their bits.
_BITS = {"pred": 8, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(calls|body|to_apply|branch_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_DIMS = re.compile(r"lhs_contracting_dims=\{([0-9,]*)\}")
_ALGORITHM = re.compile(r'"algorithm":"([^"]*)"')
_CONFIG = re.compile(r"backend_config=(\{.*\})")

# No kernel of their own: names for parts of memory, or they only wait.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_RECURSE = {"while", "conditional", "call", "async-start"}
_NO_MATMUL = {"AllocateBuffer", "__cub$DeviceRadixSort", "__cub$RadixSortUnassignedScratchSize"}


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str


@dataclass
class Counts:
    """What one execution does.

    Attributes:
        flops: Of matmuls, two for each multiply-add, by the type of their left operand.
        traffic: Bytes of every kernel's operands and results. An upper bound: a kernel that slices
            a large operand is counted with all of it.
        unknown: Custom calls whose FLOPs are not counted, such as cuDNN's attention.
        loops: While loops without a known trip count, counted once.
    """

    flops: Counter[str] = field(default_factory=Counter)
    traffic: int = 0
    unknown: set[str] = field(default_factory=set)
    loops: int = 0

    def add(self, other: "Counts", times: int = 1) -> None:
        """Adds what another does, some times over."""
        for dtype, count in other.flops.items():
            self.flops[dtype] += count * times
        self.traffic += other.traffic * times
        self.unknown |= other.unknown
        self.loops += other.loops


def count(hlo: str) -> Counts:
    """Counts in the text of an optimised HLO module, as `compiled.as_text()` gives it."""
    computations, entry = _parse(hlo)
    done: dict[tuple[str, bool], Counts] = {}

    def visit(name: str, inside_kernel: bool) -> Counts:
        key = (name, inside_kernel)
        if key not in done:
            done[key] = _count(computations[name], inside_kernel, visit)
        return done[key]

    return visit(entry, False)


def _count(
    instructions: dict[str, _Instruction],
    inside_kernel: bool,
    visit: Callable[[str, bool], Counts],
) -> Counts:
    total = Counts()
    for instruction in instructions.values():
        called = _called(instruction)
        opcode = instruction.opcode
        if opcode == "while":
            trips = _TRIPS.search(instruction.text)
            total.add(visit(called["body"][0], inside_kernel), int(trips[1]) if trips else 1)
            total.loops += not trips
        elif opcode == "conditional":
            branches = [visit(n, inside_kernel) for names in called.values() for n in names]
            total.add(max(branches, key=lambda c: (sum(c.flops.values()), c.traffic)))
        elif opcode in _RECURSE:
            for names in called.values():
                for name in names:
                    total.add(visit(name, inside_kernel))
        else:
            if opcode == "fusion":
                inner = visit(called["calls"][0], True)
                total.add(Counts(Counter(inner.flops), 0, set(inner.unknown)))
            elif opcode in ("dot", "custom-call"):
                total.add(_matmul(instruction, instructions))
            if not inside_kernel and opcode not in _FREE and not opcode.endswith("-done"):
                total.traffic += _bytes(instruction.shape)
                total.traffic += sum(
                    _bytes(instructions[name].shape)
                    for name in instruction.operands
                    if name in instructions
                )
    return total


@dataclass(frozen=True)
class Matmul:
    """One matmul as it stands in the text, however often it runs.

    Attributes:
        operands: Both, such as `f16[8192,768]`.
        result: Likewise.
        algorithm: Types of operands and sums, where the program names them; else ALG_UNSET.
        flops: Of running it once.
    """

    operands: tuple[str, str]
    result: str
    algorithm: str
    flops: int


def matmuls(hlo: str) -> list[Matmul]:
    """Every `dot`, and every one that XLA gave to cuBLAS."""
    found = []
    for around in _parse(hlo)[0].values():
        for instruction in around.values():
            if instruction.opcode not in ("dot", "custom-call"):
                continue
            flops = sum(_matmul(instruction, around).flops.values())
            if flops:
                shapes = [around[name].shape for name in instruction.operands[:2]]
                left, right, result = map(_first_array, (*shapes, instruction.shape))
                named = _ALGORITHM.search(instruction.text)
                algorithm = named[1] if named else "ALG_UNSET"
                found.append(Matmul((left, right), result, algorithm, flops))
    return found


@dataclass(frozen=True)
class AllReduce:
    """One sum between devices.

    Attributes:
        bytes: That each device gives, by type.
        behind: Kernels that XLA placed between its start and its end; None where it waits.
    """

    bytes: Counter[str]
    behind: int | None


def all_reduces(hlo: str) -> list[AllReduce]:
    """Every one, in the order of the text."""
    found = []
    for around in _parse(hlo)[0].values():
        instructions = list(around.values())
        for place, each in enumerate(instructions):
            if each.opcode not in ("all-reduce", "all-reduce-start"):
                continue
            sent: Counter[str] = Counter()
            for operand in each.operands:
                for dtype, dims in _arrays(around[operand].shape):
                    sent[dtype] += math.prod(dims) * _bits(dtype) // 8
            later = itertools.takewhile(
                lambda other, name=each.name: name not in other.operands, instructions[place + 1 :]
            )
            behind = sum(other.opcode not in _FREE for other in later)
            found.append(AllReduce(sent, behind if each.opcode.endswith("-start") else None))
    return found


def sent(hlo: str) -> str:
    """Of all sums between devices: megabytes by type, and those that nothing hides."""
    found = all_reduces(hlo)
    sizes: Counter[str] = sum((each.bytes for each in found), Counter())
    waits = sum(each.bytes.total() for each in found if not each.behind)
    parts = [f"{size / 1e6:.0f} {dtype}" for dtype, size in sizes.most_common() if size > 5e5]
    return f"{' + '.join(parts) or '0'}, {waits / 1e6:.0f} waits"


def _first_array(shape: str) -> str:
    dtype, dims = next(_arrays(shape))
    return f"{dtype}[{','.join(map(str, dims))}]"


def _matmul(instruction: _Instruction, around: dict[str, _Instruction]) -> Counts:
    """A `dot`, or one that XLA gave to cuBLAS."""
    target = _TARGET.search(instruction.text)
    if target and not target[1].startswith("__cublas$"):
        return Counts(unknown=set() if target[1] in _NO_MATMUL else {target[1]})
    if target:
        config = json.loads(_balanced(instruction.text))
        dims = config["gemm_backend_config"]["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        contracted = [int(dim) for dim in dims]
    else:
        match = _DIMS.search(instruction.text)
        contracted = [int(dim) for dim in match[1].split(",") if dim] if match else []
    left = next(_arrays(around[instruction.operands[0]].shape))
    _, out = next(_arrays(instruction.shape))
    flops = 2 * math.prod(out) * math.prod(left[1][dim] for dim in contracted)
    return Counts(Counter({left[0]: flops}))


def _balanced(text: str) -> str:
    """The JSON object behind `backend_config=`."""
    match = _CONFIG.search(text)
    start = match.start(1) if match else 0
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start : end + 1]
    raise ValueError(f"an unfinished backend_config: {text[:200]}")


def _parse(hlo: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    current: dict[str, _Instruction] | None = None
    entry = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], {})
            if line.startswith("ENTRY"):
                entry = header[1]
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            found = _OPCODE.search(f" {match[2]}")
            if found is None:
                continue
            shape, rest = match[2][: found.start()], match[2][found.end() - 1 :]
            operands = tuple(_NAME.findall(rest[: _closing(rest)]))
            current[match[1]] = _Instruction(match[1], shape, found[1], operands, rest)
    if not entry:
        raise ValueError("no ENTRY computation in the HLO")
    return computations, entry


def _closing(text: str) -> int:
    """Where the operands end: `text` begins behind the opening bracket."""
    depth = 1
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return place
    return len(text)


def _called(instruction: _Instruction) -> dict[str, list[str]]:
    return {
        what: [name.strip().lstrip("%") for name in names.strip("{}").split(",")]
        for what, names in _CALLED.findall(instruction.text)
    }


def _arrays(shape: str) -> Iterator[tuple[str, list[int]]]:
    for dtype, dims in _ARRAY.findall(shape):
        yield dtype, [int(dim) for dim in dims.split(",") if dim]


def _bytes(shape: str) -> int:
    return sum(math.prod(dims) * _bits(dtype) // 8 for dtype, dims in _arrays(shape))


def _bits(dtype: str) -> int:
    return _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
