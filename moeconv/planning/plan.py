"""The plan: every output tensor with its source, place and bytes, before the first byte is written.

A plan is a value. Executing it adds nothing: the engine only carries it out. It can be printed
(`--dry-run`) and hashed (`digest`, which `--resume` compares).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moeconv import __version__
from moeconv.arch.description import ModelDescription
from moeconv.arch.layout import Layout
from moeconv.errors import MemoryLimitError
from moeconv.hf.safetensors import FileLayout, TensorSpec, lay_out
from moeconv.mapping.edges import Edge
from moeconv.mapping.rules import Options, Target
from moeconv.orbax.arrays import ArrayInfo, Arrays
from moeconv.planning.units import (
    BLOCK_BYTES,
    MIB,
    UNIT_BYTES,
    Assembly,
    Route,
    Unit,
    assemblies,
    routes_of,
    unit_boxes,
)
from moeconv.sizes import format_size

# Source block, transposed block, one temporary of a value op: what a worker holds beside its unit.
WORKER_BYTES = 4 * BLOCK_BYTES
# numpy, tensorstore, pydantic, rich: the interpreter before any work, measured and rounded up.
IMPORT_BYTES = 128 * MIB


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file: its tensors in file order and where each begins."""

    name: str
    tensors: tuple[str, ...]
    layout: FileLayout


@dataclass(frozen=True)
class Place:
    """Where a tensor goes."""

    file: int
    offset: int


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        model: What the model is.
        layout: How the checkpoint keeps it.
        family: The target.
        options: The user's choices about tensors.
        dtype: `--dtype`; None keeps the checkpoint's.
        edges: Every output tensor, by name.
        files: The safetensors files.
        places: File and offset of every output tensor.
        routes: Work by source array.
        units: Work in the order it is begun, largest first.
        assemblies: Arrays whose pieces go through a scratch file, and the tensors that these make.
        source: Identity of what is read: URL, step and digests of the checkpoint's metadata.
        warnings: Sentences for people.
        dropped: Parameters left out on purpose, with the reason.
    """

    model: ModelDescription
    layout: Layout
    family: Target
    options: Options
    dtype: str | None
    edges: Mapping[str, Edge]
    files: tuple[PlannedFile, ...]
    places: Mapping[str, Place]
    routes: Mapping[str, tuple[Route, ...]]
    units: tuple[Unit, ...]
    assemblies: tuple[Assembly, ...]
    source: Mapping[str, Any]
    warnings: tuple[str, ...]
    dropped: Mapping[str, str]

    @cached_property
    def constants(self) -> tuple[Edge, ...]:
        """Tensors without a source."""
        return tuple(e for e in self.edges.values() if not e.parts)

    @property
    def read_bytes(self) -> int:
        """Bytes of the parameters, decoded; each is read once."""
        return sum(u.nbytes for u in self.units)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(e.nbytes for e in self.edges.values())

    @property
    def write_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(f.layout.size for f in self.files)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch files that may exist at the same time."""
        return sum(sorted(each.size for each in self.assemblies)[-2:])

    @property
    def disk_bytes(self) -> int:
        """Free space needed: the files, scratch, and room for configs and tokenizer."""
        return self.write_bytes + self.scratch_bytes + 96 * MIB

    def unit_cost(self, unit: Unit) -> int:
        """Peak bytes of one unit: decoded, and compressed (never larger) while it is decoded."""
        return 2 * unit.decoded_bytes + WORKER_BYTES

    @property
    def memory_floor(self) -> int:
        """The least memory with which the plan can be carried out, one unit at a time."""
        return IMPORT_BYTES + max(self.unit_cost(u) for u in self.units)

    def memory_budget(self, limit: int, jobs: int) -> int:
        """Memory the engine will keep within.

        It takes what one unit at a time needs, plus something for every job, and never more than
        the limit: on a small machine memory matters more than the last few percent of speed.

        Raises:
            MemoryLimitError: The limit lies below the floor.
        """
        if limit < self.memory_floor:
            largest = max(self.units, key=lambda u: u.decoded_bytes)
            raise MemoryLimitError(
                f"--max-memory {format_size(limit)} is below the {format_size(self.memory_floor)} "
                f"that this checkpoint needs: {largest.array.name} is stored in chunks of "
                f"{format_size(largest.decoded_bytes)}, and a chunk is decoded whole; give "
                f"--max-memory {math.ceil(self.memory_floor / MIB)}MiB or more"
            )
        return min(limit, max(int(1.1 * self.memory_floor), jobs * 384 * MIB))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the output's bytes.

        The source may have been moved, but where nothing else tells it from another of the same
        shapes (stored without OCDBT, and not on this machine), its place has to.
        """
        moved = "manifest.ocdbt" in self.source["metadata"] or "files" in self.source
        content = {
            "moeconv": __version__,
            "source": {k: v for k, v in self.source.items() if k != "path" or not moved},
            "model": self.model.values(),
            "family": self.family.name,
            "untie": self.options.untie,
            "files": [[f.name, f.layout.header.decode("latin-1")] for f in self.files],
            "tensors": [
                [e.target, [part.source.name for part in e.parts], e.steps()]
                for e in self.edges.values()
            ],
            "units": [[u.array.name, u.box] for u in self.units],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_plan(
    *,
    model: ModelDescription,
    layout: Layout,
    family: Target,
    options: Options,
    dtype: str | None,
    edges: Sequence[Edge],
    arrays: Arrays,
    source: Mapping[str, Any],
    max_shard_bytes: int,
    warnings: Sequence[str] = (),
    dropped: Mapping[str, str] | None = None,
) -> Plan:
    """Makes the plan.

    Tensors are assigned to files in the order of the layers, as loaders expect; within a file they
    lie in the order they are made, so that finished parts can be hashed while others are read.
    """
    routes = routes_of(edges)
    units = _units(routes, arrays.info)
    rank = {u.array.name: u.number for u in reversed(units)}
    by_name = {e.target: e for e in edges}
    made = sorted(
        by_name,
        key=lambda n: (
            max((rank[part.source.name] for part in by_name[n].parts), default=-1),
            _model_order(by_name[n]),
        ),
    )
    files, places = _files(by_name, made, max_shard_bytes)
    return Plan(
        model=model,
        layout=layout,
        family=family,
        options=options,
        dtype=dtype,
        edges=by_name,
        files=files,
        places=places,
        routes=routes,
        units=units,
        assemblies=assemblies(routes, units),
        source=source,
        warnings=tuple(warnings),
        dropped=dropped or {},
    )


def _units(
    routes: Mapping[str, tuple[Route, ...]], info: Mapping[str, ArrayInfo]
) -> tuple[Unit, ...]:
    limit = max(UNIT_BYTES, *(info[name].chunk_bytes for name in routes))
    boxes = []
    for name, group in routes.items():
        boxes += [(info[name], box) for box in unit_boxes(info[name], group, limit)]
    boxes.sort(key=lambda b: (-Unit(b[0], b[1], 0).nbytes, b[0].name, b[1]))
    return tuple(Unit(array, box, n) for n, (array, box) in enumerate(boxes))


def _model_order(edge: Edge) -> tuple[Any, ...]:
    """Embedding, layers from the first to the last, final norm, head; names in natural order."""
    ends = {"model.embed_tokens.weight": -1}
    layer = edge.layer if edge.layer is not None else ends.get(edge.target, 10**9)
    natural = [int(p) if p.isdigit() else 0 for p in edge.target.split(".")]
    return (layer, [p if not p.isdigit() else "" for p in edge.target.split(".")], natural)


def _files(
    edges: Mapping[str, Edge], made: Sequence[str], max_shard_bytes: int
) -> tuple[tuple[PlannedFile, ...], dict[str, Place]]:
    from huggingface_hub import split_state_dict_into_shards_factory

    ordered = sorted(edges, key=lambda n: _model_order(edges[n]))
    split = split_state_dict_into_shards_factory(
        {name: edges[name] for name in ordered},
        get_storage_size=lambda edge: edge.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    order = {name: n for n, name in enumerate(made)}
    files: list[PlannedFile] = []
    places: dict[str, Place] = {}
    for number, (file, names) in enumerate(sorted(split.filename_to_tensors.items())):
        tensors = sorted(names, key=order.__getitem__)
        specs = [TensorSpec(n, edges[n].dtype, edges[n].shape) for n in tensors]
        layout = lay_out(specs)
        files.append(
            PlannedFile(file, tuple(sorted(tensors, key=layout.offsets.__getitem__)), layout)
        )
        places |= {n: Place(number, layout.offsets[n]) for n in tensors}
    return tuple(files), places


def index_json(plan: Plan) -> dict[str, Any] | None:
    """Content of model.safetensors.index.json; None when one file holds everything."""
    if len(plan.files) == 1:
        return None
    weights = {name: plan.files[place.file].name for name, place in plan.places.items()}
    return {
        "metadata": {
            # As transformers counts them: a tied table once.
            "total_parameters": sum(math.prod(edge.shape) for edge in plan.edges.values()),
            "total_size": plan.tensor_bytes,
        },
        "weight_map": dict(sorted(weights.items())),
    }
