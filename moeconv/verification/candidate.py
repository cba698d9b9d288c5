"""What is being verified: an output directory, its manifest, and the checkpoint it came from.

The expectation is built anew, from the manifest's description of the model and the structure of the
source: nothing that the conversion computed is taken over but what it claims.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from moeconv.arch.blocks import Block
from moeconv.arch.description import ModelDescription
from moeconv.arch.detection import detect_layout
from moeconv.arch.layout import Layout
from moeconv.artifact.fingerprint import Fingerprint, fingerprint
from moeconv.artifact.manifest import Manifest, manifest_name
from moeconv.artifact.names import is_leftover, is_output_name
from moeconv.errors import (
    ConfigError,
    NotACheckpointError,
    OutputError,
    TensorError,
    UnsupportedError,
)
from moeconv.families import blocks, targets
from moeconv.hf.config import model_config
from moeconv.mapping.edges import Edge, cannot_hold, expand
from moeconv.mapping.rules import Options, Target
from moeconv.maxtext.checkpoint import UNUSED
from moeconv.maxtext.fused import take_apart
from moeconv.maxtext.whole import Part, part_of
from moeconv.orbax.arrays import Arrays
from moeconv.orbax.locate import Step, locate
from moeconv.orbax.metadata import read_tree
from moeconv.orbax.store import Folder
from moeconv.tensor.axes import Array
from moeconv.tensor.form import Form
from moeconv.tensor.stored import Source, Together
from moeconv.untrusted.files import read_inside
from moeconv.untrusted.strict_json import loads
from moeconv.verification.adapter import MergedAdapter, SourceGoneError
from moeconv.verification.boundary import blaming
from moeconv.verification.checks import CandidateError
from moeconv.verification.files import demand_loadable_files, read_object
from moeconv.verification.measure.routing import Choice
from moeconv.verification.stored import Stored, stored_tensors

# Tensors that a small model may lack, and which are still listed one by one.
_FEW = 1000


class OtherKindError(UnsupportedError):
    """OUT is an output of another kind than its class is for."""


@dataclass(frozen=True)
class Candidate:
    """An output directory under verification.

    Attributes:
        out: The directory.
        manifest: What it claims.
        given: The checkpoint that the user named, None for the manifest's own.
        fingerprints: Size and time of every file at the beginning.
        manifest_path: The manifest's file.
    """

    out: Path
    manifest: Manifest
    given: str | None
    fingerprints: Mapping[str, Fingerprint | None]
    manifest_path: Path

    kind: ClassVar[str] = "huggingface"
    config_name: ClassVar[str] = "config.json"
    origin: ClassVar[str] = "the checkpoint"
    declared_ids: ClassVar[tuple[str, ...]] = ("bos_token_id", "eos_token_id")

    @classmethod
    def open(cls, out: Path, *, source: str | None = None) -> "Candidate":
        """Reads the manifest.

        Raises:
            NotACheckpointError: OUT is no output of `moeconv convert`.
            OtherKindError: It is one of another kind.
            ConfigError: The manifest is damaged.
        """
        name = manifest_name(out)
        path = out / name
        if not out.is_dir():
            raise NotACheckpointError(f"{out} does not exist; give an output of moeconv convert")
        demand_loadable_files(out)
        try:
            first = fingerprint(path)
            raw = read_inside(out, name)
        except FileNotFoundError:
            raise NotACheckpointError(
                f"{out} has no {name}, so it was not written by moeconv convert"
            ) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        try:
            manifest = Manifest.model_validate(loads(raw))
            if manifest.kind != cls.kind:
                raise OtherKindError(f"{out} is of kind {manifest.kind}, not {cls.kind}")
            names = filter(cls.may_hold, manifest.files)
            fingerprints = {name: first, **{n: fingerprint(out / n) for n in names}}
            candidate = cls(out, manifest, source, fingerprints, path)
            candidate.demand_description()
        except Exception as error:  # rules and config keys of a page meet any values
            if isinstance(error, MemoryError | OtherKindError):
                raise
            raise ConfigError(
                f"{path} is not a manifest that this moeconv can read; convert again"
            ) from None
        return candidate

    @staticmethod
    def may_hold(name: str) -> bool:
        """Returns True if convert writes a file of this name into such an output."""
        return is_output_name(name)

    def demand_description(self) -> None:
        """Computes what the manifest describes: what describes no model is a damaged manifest.

        Raises:
            Exception: Of any kind; it does not.
        """
        if reason := cannot_hold(self.family, self.model):
            raise ValueError(reason)
        _ = self.count, self.wanted_config

    def demand_unchanged(self) -> None:
        """What was looked at is still there.

        Raises:
            OutputError: A file was written since the beginning.
        """
        moved = [
            name for name, one in self.fingerprints.items() if fingerprint(self.out / name) != one
        ]
        if moved:
            raise OutputError(
                f"{self.out} changed while it was verified ({', '.join(moved[:3])}); verify again"
            )

    @cached_property
    def model(self) -> ModelDescription:
        """The model that the manifest claims."""
        return self.manifest.description()

    @property
    def source(self) -> str:
        """The checkpoint to compare with."""
        return self.given or self.manifest.source.path

    @property
    def names(self) -> list[str]:
        """The files of the manifest that convert can have written; no other is opened."""
        return [name for name in self.fingerprints if name != self.manifest_path.name]

    @property
    def family(self) -> Target:
        """The target that was written."""
        return targets()[self.manifest.target]

    @property
    def choice(self) -> Choice:
        """How the model chooses the experts of a token."""
        top_k, eligible = self.model.num_experts_per_tok or 1, self.block.taps.eligible
        if eligible is None:
            return Choice(top_k)
        return Choice(top_k, lambda scores: eligible(scores, self.model))

    @property
    def block(self) -> Block:
        """The decoder block that was converted."""
        return blocks()[self.model.decoder_block]

    @property
    def options(self) -> Options:
        """The choices about tensors."""
        return Options(untie=self.manifest.untied)

    @cached_property
    def step(self) -> Step:
        """The source, found.

        Raises:
            NotACheckpointError: The one that the user named is not there.
            SourceGoneError: The one that only the manifest names is not on this machine.
        """
        if self.given is not None:
            return locate(self.given)
        named = f"{self.manifest_path} names"
        if Folder.open(self.source).local is None:
            raise SourceGoneError(
                f"{self.source}, which {named}, is at an address; an address that only OUT "
                "names is not contacted: give it with --source"
            )
        try:
            return locate(self.source)
        except NotACheckpointError as error:
            raise SourceGoneError(
                f"{error} (the one that {named}; --source gives another, "
                "and level structure needs none)"
            ) from None

    @property
    def items(self) -> Path | None:
        """The source's `items` directory, None when it is remote."""
        return self.step.items.local

    @cached_property
    def arrays(self) -> Arrays:
        """The source's parameters, opened."""
        part: Part = "model" if self.manifest.adapter is None else "model alone"
        tree = part_of(self.step, read_tree(self.step.items), part)
        missing = bool(self.manifest.missing_chunks)
        arrays = Arrays(self.step.items, tree, allow_missing=missing)
        take_apart(arrays)
        return arrays

    @cached_property
    def adapter(self) -> MergedAdapter | None:
        """The LoRA adapter that was merged; None where none was.

        Raises:
            SourceGoneError: The manifest names one that is not on this machine.
        """
        record = self.manifest.adapter
        return MergedAdapter.open(record, self.manifest_path) if record is not None else None

    @cached_property
    def read(self) -> Source:
        """All arrays that the output was made from."""
        return self.arrays if self.adapter is None else Together(self.arrays, self.adapter.arrays)

    @cached_property
    def layout(self) -> Layout:
        """How the source keeps them."""
        return self.layout_of(self.arrays)

    def layout_of(self, arrays: Arrays) -> Layout:
        """How a checkpoint of the described model keeps its layers."""
        used = {i.path: i.shape for i in arrays.info.values() if i.path[0] not in UNUSED}
        block, collections = [self.block], arrays.tree.collections
        try:
            return detect_layout(used, block, collections=collections)
        except ConfigError:
            # The shapes leave the scan axis open; the manifest describes the one that was taken.
            for axis in range(max(map(len, used.values()))):
                with suppress(ConfigError, TensorError):
                    found = detect_layout(used, block, scan_axis=axis, collections=collections)
                    if found.describe() == self.manifest.source.layout:
                        return found
            raise

    @cached_property
    def edges(self) -> Mapping[str, Edge]:
        """What every tensor should be, by name.

        Raises:
            CandidateError: The checkpoint's parameters do not give the model that OUT describes.
        """
        self.demand_count()
        layout = self.layout
        dtypes = {name: info.dtype for name, info in self.arrays.info.items()}
        dtype = None if self.manifest.dtype_kept else self.manifest.dtype
        what = f"the model that {self.manifest_path} describes is not that of {self.source}"
        with blaming(what, check="tensors"):
            try:
                edges = expand(
                    self.family,
                    self.model,
                    layout,
                    dtypes,
                    dtype=dtype,
                    narrowed=self.manifest.narrowed,
                    options=self.options,
                )
                if self.adapter is not None:
                    edges = self.adapter.merged(edges, layout)
            except (TensorError, UnsupportedError) as error:
                raise CandidateError(f"{what}: {error}", "tensors") from None
        return {edge.target: edge for edge in edges}

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` as it is stored.

        Raises:
            CandidateError: It is no JSON object, or not there.
        """
        return read_object(self.out / self.config_name)

    def token_id(self, name: str) -> Any:
        """What the config has for `eos_token_id`, say: an id, a list of them, or neither."""
        return self.config.get(name)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is, if there is one."""
        return self.out

    @property
    def entries(self) -> set[str]:
        """The names of what is in OUT."""
        return {path.name for path in self.out.iterdir() if not is_leftover(path)}

    def wrong(self, form: Form, block: Array, piece: Array, others: Sequence[Array]) -> Array:
        """Where a block of an array and a piece of a tensor are not one: a mask like the piece."""
        return form.wrong(block, piece, others)

    def is_exact(self, edge: Edge) -> bool:
        """True if a tensor is judged bit for bit, without a rounding."""
        return edge.bound() == 0.0

    @cached_property
    def wrong_keys(self) -> list[str]:
        """Keys of config.json that the described model has otherwise, or has not.

        Raises:
            CandidateError: It is no JSON object, or not there.
        """
        wanted, found = self.wanted_config, self.config
        keys = wanted.keys() | found.keys()
        with blaming(f"{self.out / self.config_name} cannot be compared", check="config"):
            return sorted(k for k in keys if not _same(wanted.get(k), found.get(k)))

    @cached_property
    def wanted_config(self) -> dict[str, Any]:
        """config.json as convert writes it for the described model."""
        return model_config(self.family, self.model, self.manifest.dtype, self.options)

    @cached_property
    def count(self) -> int:
        """Tensors of the described model, by the rules; nothing is expanded for it."""
        model, found = self.model, 0
        for rule in self.family.rules:
            if rule.when.holds(model, self.options):
                kinds = rule.layers
                layers = 1 if kinds is None else sum(kind in kinds for kind in model.layer_kinds)
                found += layers * ((model.num_experts or 0) if "{E}" in rule.target else 1)
        return found

    def demand_count(self) -> None:
        """The described model has no more tensors than files of this size can have lost.

        What is expanded or built from the description takes time by its numbers of layers and
        experts, and anybody can write 10^9 there.

        Raises:
            CandidateError: It has, or a header cannot be read.
        """
        if self.count > 2 * len(self.tensors) + _FEW:
            raise CandidateError(
                f"the described model has {self.count:,} tensors, the files hold "
                f"{len(self.tensors):,}",
                "tensors",
            )

    def demand_described(self) -> None:
        """What transformers would build is the described model, as far as that is known before.

        Raises:
            CandidateError: config.json is another model's, or as `demand_count`.
        """
        if self.wrong_keys:
            raise CandidateError(
                f"{self.config_name} differs from the described model in: "
                f"{', '.join(self.wrong_keys)}",
                "config",
            )
        self.demand_count()

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor of every safetensors file, from the headers.

        Raises:
            CandidateError: A header cannot be read.
        """
        return stored_tensors(self.out)


def _same(one: Any, other: Any) -> bool:
    """Equal, and of one kind: in JSON true is not 1, and 2 may be written 2.0."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
