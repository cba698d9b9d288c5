"""The plan: every output tensor with its source, place and bytes, before the first byte is written.

A plan is data. Executing it adds nothing: the engine only carries it out. It can be printed, hashed
(`digest`, which `--resume` compares), pickled, and written to a file that another process executes
(`planning.plan_file`). It knows a `PlannedSource` and an `Output`, and not which of them is
MaxText's.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv import __version__
from moeconv.arch.description import ModelDescription
from moeconv.families import targets
from moeconv.hf.tokenizer import TokenizerFiles
from moeconv.mapping.edges import Edge
from moeconv.mapping.rules import Options, Target
from moeconv.maxtext.run_record import RunRecord
from moeconv.planning.adapter import PlannedAdapter
from moeconv.planning.estimate import Estimate
from moeconv.planning.output import Output, model_order
from moeconv.planning.shown import plan_parts
from moeconv.planning.units import (
    Assembly,
    Route,
    Unit,
    assemblies,
    cut_into_units,
    routes_of,
)
from moeconv.printing import Printable
from moeconv.tensor.axes import Range, Ranges
from moeconv.tensor.form import Form
from moeconv.tensor.stored import ArrayInfo

if TYPE_CHECKING:
    from rich.console import RenderableType

# As `Output.blocks`.
Chunks = Callable[[str, Form, Ranges], Iterator[dict[str, Range]]]
# Given every target, their names in the order in which they are made, and the largest file.
LayOut = Callable[[Mapping[str, Edge], Sequence[str], int], Output]


@dataclass(frozen=True)
class PlannedSource:
    """What is read: which model, and how it is stored.

    Attributes:
        kind: As manifests name it: `maxtext`.
        path: Where it is: a path, or an address.
        step: Of the run, where there is one.
        format: How its files are written, for people.
        layout: How it keeps its layers, for people.
        scan_axis: Axis on which layers are stacked; None where each has arrays of its own.
        metadata: SHA-256 of its own metadata files, by name.
        files: Digest of the names, sizes and times of its files, where they are on this machine.
        may_lack: Chunks that are not stored count as zeros, where the format leaves zeros out.
        arrays: How each array is stored, by name.
        collections: The collection of each array, by name, which its key path does not give.
    """

    kind: str
    path: str
    step: int | None
    format: str
    layout: str
    scan_axis: int | None
    metadata: Mapping[str, str]
    files: str | None
    may_lack: bool
    arrays: Mapping[str, ArrayInfo]
    collections: Mapping[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes it from another source of the same shapes.

        It may have been moved; but without OCDBT, whose manifest changes with every chunk, and not
        on this machine, only its place identifies it.
        """
        identified = "manifest.ocdbt" in self.metadata or self.files is not None
        return {
            "kind": self.kind,
            "step": self.step,
            "metadata": dict(self.metadata),
            "files": None if "manifest.ocdbt" in self.metadata else self.files,
            "path": None if identified else self.path,
        }


@dataclass(frozen=True)
class PlannedTokenizer:
    """The tokenizer that is written next to the tensors.

    Attributes:
        option: `--tokenizer`; None where it is the run's own.
        source: What was read, as the user named it.
        files: SHA-256 of what is written of it, by name.
    """

    option: str | None
    source: str
    files: Mapping[str, str]

    @classmethod
    def of(cls, files: TokenizerFiles, option: str | None) -> "PlannedTokenizer":
        """Of a tokenizer that was read."""
        digests = {n: hashlib.sha256(raw).hexdigest() for n, raw in files.files.items()}
        return cls(option, files.source, digests)


@dataclass(frozen=True)
class Plan(Printable):
    """A whole conversion.

    Attributes:
        model: What the model is.
        target: Name of the family's page that it becomes, of which `page` is the value.
        options: The user's choices about tensors.
        dtype: `--dtype`; None keeps the source's.
        max_shard_bytes: Largest file of tensors, unless one tensor is larger.
        edges: Every target array, by name.
        output: The files, and the place of every target.
        routes: Work by source array.
        units: Work in the order it is begun, largest first.
        assemblies: What goes through a scratch file, as the output does not take it as it comes.
        source: What is read.
        warnings: Sentences for people.
        dropped: Parameters left out on purpose, with the reason.
        tokenizer: What is written next to the tensors.
        run: The record of the source's training run.
        accepted_keys: Settings that `--accept-key` let pass.
        narrowed: Dtype of what some arrays become, by name, where `dtype` keeps the others' own.
        adapter: The LoRA adapter that is converted, of which `model` is the base, or that is merged
            into `model`.
        jobs: Units worked on at the same time, unless `convert` says otherwise.
        max_memory: Bytes of memory to stay within, unless `convert` says otherwise.
    """

    model: ModelDescription
    target: str
    options: Options
    dtype: str | None
    max_shard_bytes: int
    edges: Mapping[str, Edge]
    output: Output
    routes: Mapping[str, tuple[Route, ...]]
    units: tuple[Unit, ...]
    assemblies: tuple[Assembly, ...]
    source: PlannedSource
    warnings: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    tokenizer: PlannedTokenizer | None = None
    run: RunRecord | None = None
    accepted_keys: tuple[str, ...] = ()
    narrowed: Mapping[str, str] = field(default_factory=dict)
    adapter: PlannedAdapter | None = None
    jobs: int = 1
    max_memory: int = 4 << 30

    @property
    def page(self) -> Target:
        """The Hugging Face half of the family's page."""
        return targets()[self.target]

    @cached_property
    def constants(self) -> tuple[Edge, ...]:
        """Targets without a source."""
        return tuple(e for e in self.edges.values() if not e.parts)

    @cached_property
    def estimate(self) -> Estimate:
        """What carrying it out takes."""
        return Estimate.of(self.units, self.assemblies, self.output)

    @property
    def target_bytes(self) -> int:
        """Bytes of all target arrays."""
        return sum(e.nbytes for e in self.edges.values())

    @cached_property
    def main_dtype(self) -> str:
        """The dtype that most bytes have, which config.json names."""
        if self.dtype is not None:
            return self.dtype
        weight: dict[str, int] = {}
        for edge in self.edges.values():
            weight[edge.dtype] = weight.get(edge.dtype, 0) + edge.nbytes
        return max(sorted(weight), key=weight.__getitem__)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the output's bytes."""
        content = {
            "moeconv": __version__,
            "source": self.source.identity,
            "model": self.model.values(),
            "target": self.target,
            "untie": self.options.untie,
            "output": [self.output.kind, self.output.identity],
            "tensors": [[e.target, list(e.sources), e.steps()] for e in self.edges.values()],
            "units": [[u.array.name, u.box] for u in self.units],
        }
        if self.adapter is not None:
            strength, other = self.adapter.strength, self.adapter.other
            content["adapter"] = [strength.alpha, self.adapter.base_model, other.identity]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def memory_budget(self) -> int:
        """Memory that carrying it out keeps within.

        Raises:
            MemoryLimitError: `max_memory` is below what one unit at a time needs.
        """
        return self.estimate.memory_budget(self.max_memory, self.jobs)

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv convert --dry-run --json` prints: the content of plan.json."""
        from moeconv.planning.plan_file import to_json

        return to_json(self)

    def parts(self) -> "Iterable[RenderableType]":
        """What `moeconv convert --dry-run` prints."""
        return plan_parts(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes plan.json, which `load_plan` reads.

        Raises:
            OutputError: It cannot be written.
        """
        from moeconv.planning.plan_file import save_plan

        save_plan(self, Path(path))


def build_plan(
    *,
    model: ModelDescription,
    target: str,
    options: Options,
    dtype: str | None,
    edges: Sequence[Edge],
    source: PlannedSource,
    max_shard_bytes: int,
    lay_out: LayOut,
    chunks: Chunks | None = None,
    **attributes: Any,
) -> Plan:
    """Makes the plan: units of work, the order of tensors, files and places.

    Args:
        model: As the attributes of `Plan`.
        target: As there.
        options: As there.
        dtype: As there.
        edges: Every target array, from `mapping.edges.expand`.
        source: As the attributes of `Plan`.
        max_shard_bytes: As there.
        lay_out: Makes the output, such as `safetensors_output`.
        chunks: As in `cut_into_units`.
        attributes: The attributes of `Plan` that say nothing of its tensors.
    """
    routes = routes_of(edges)
    units = cut_into_units(routes, source.arrays, chunks)
    rank = {u.array.name: u.number for u in reversed(units)}
    by_name = {e.target: e for e in edges}
    made = sorted(
        by_name,
        key=lambda n: (
            max((rank[part.source] for part in by_name[n].parts), default=-1),
            model_order(by_name[n]),
        ),
    )
    output = lay_out(by_name, made, max_shard_bytes)
    return Plan(
        model=model,
        target=target,
        options=options,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        edges=by_name,
        output=output,
        routes=routes,
        units=units,
        assemblies=assemblies(routes, units, output.takes),
        source=source,
        **attributes,
    )
