"""What is being verified: an output directory, its manifest, and the checkpoint it came from.

The expectation is built anew, from the manifest's description of the model and the structure of the
source: nothing that the conversion computed is taken over but what it claims.
"""

import contextlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moeconv.arch.description import ModelDescription
from moeconv.arch.layout import Layout, detect_layout
from moeconv.convert.manifest import MANIFEST_NAME, Manifest
from moeconv.convert.source import UNUSED
from moeconv.convert.stamps import Stamp, stamp
from moeconv.errors import ConfigError, NotACheckpointError, OutputError, TensorError
from moeconv.hf.safetensors import TensorSpec, read_header
from moeconv.mapping.edges import Edge, expand
from moeconv.mapping.families import FAMILIES
from moeconv.mapping.rules import Family, Options
from moeconv.orbax.arrays import Arrays
from moeconv.orbax.locate import Step, locate
from moeconv.orbax.metadata import read_tree
from moeconv.untrusted.files import UnsafeFileError, demand_inside, read_inside

_INDEX = "model.safetensors.index.json"
# The folder that transformers looks into for more chat templates (its `utils/hub.py`).
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Stored:
    """A tensor of the output: its file and how its bytes are laid out."""

    file: Path
    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class Subject:
    """An output directory under verification.

    Attributes:
        out: The directory.
        manifest: What it claims.
        source: The checkpoint to compare with: the manifest's own, or another one.
        stamps: Size and time of every file at the beginning.
    """

    out: Path
    manifest: Manifest
    source: str
    stamps: Mapping[str, Stamp | None]

    @classmethod
    def open(cls, out: Path, *, source: str | None = None) -> "Subject":
        """Reads the manifest.

        Raises:
            NotACheckpointError: OUT is no output of `moeconv convert`.
            ConfigError: The manifest is damaged.
        """
        path = out / MANIFEST_NAME
        if not out.is_dir():
            raise NotACheckpointError(f"{out} does not exist; give an output of moeconv convert")
        demand_loadable_files(out)
        try:
            first = stamp(path)
            content = json.loads(path.read_text(encoding="utf-8"))
            manifest = Manifest.model_validate(content)
            stamps = {MANIFEST_NAME: first, **{n: stamp(out / n) for n in manifest.files}}
            subject = cls(out, manifest, source or manifest.source.path, stamps)
            # Read once here, so that what does not describe a model is a damaged manifest.
            _ = subject.model, subject.family
        except FileNotFoundError:
            raise NotACheckpointError(
                f"{out} has no {MANIFEST_NAME}, so it was not written by moeconv convert"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError):
            raise ConfigError(
                f"{path} is not a manifest that this moeconv can read; convert again"
            ) from None
        return subject

    def demand_unchanged(self) -> None:
        """What was looked at is still there.

        Raises:
            OutputError: A file was written since the beginning.
        """
        moved = [name for name, one in self.stamps.items() if stamp(self.out / name) != one]
        if moved:
            raise OutputError(
                f"{self.out} changed while it was verified ({', '.join(moved[:3])}); verify again"
            )

    @cached_property
    def model(self) -> ModelDescription:
        """The model that the manifest claims."""
        return self.manifest.description()

    @property
    def family(self) -> Family:
        """The target that was written."""
        return FAMILIES[self.manifest.target]

    @property
    def options(self) -> Options:
        """The choices about tensors."""
        return Options(untie=self.manifest.untied)

    @cached_property
    def step(self) -> Step:
        """The source, found.

        Raises:
            NotACheckpointError: It is not there.
        """
        try:
            return locate(self.source)
        except NotACheckpointError as error:
            if self.source != self.manifest.source.path:
                raise
            raise NotACheckpointError(
                f"{error} (the one that {self.out / MANIFEST_NAME} names; --source gives another, "
                "and level structure needs none)"
            ) from None

    @property
    def items(self) -> Path | None:
        """The source's `items` directory, None when it is remote."""
        return self.step.items.local

    @cached_property
    def arrays(self) -> Arrays:
        """The source's parameters, opened."""
        return Arrays(self.step.items, read_tree(self.step.items))

    @cached_property
    def layout(self) -> Layout:
        """How the source keeps them."""
        used = {i.path: i.shape for i in self.arrays.info.values() if i.path[0] not in UNUSED}
        try:
            return detect_layout(used)
        except ConfigError:
            # The shapes leave the scan axis open; the manifest describes the one that was taken.
            for axis in range(max(map(len, used.values()))):
                with suppress(ConfigError, TensorError):
                    found = detect_layout(used, scan_axis=axis)
                    if found.describe() == self.manifest.source.layout:
                        return found
            raise

    @cached_property
    def edges(self) -> Mapping[str, Edge]:
        """What every tensor should be, by name."""
        dtypes = {name: info.dtype for name, info in self.arrays.info.items()}
        dtype = None if self.manifest.dtype_kept else self.manifest.dtype
        edges = expand(
            self.family, self.model, self.layout, dtypes, dtype=dtype, options=self.options
        )
        return {edge.target: edge for edge in edges}

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` as it lies there.

        Raises:
            ConfigError: It is no JSON object, or not there.
        """
        return read_object(self.out / "config.json")

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor of every safetensors file, from the headers.

        Raises:
            TensorError: A header cannot be read.
        """
        found = {}
        for file in sorted(self.out.glob("*.safetensors")):
            for name, (spec, offset) in read_header(file).items():
                found[name] = Stored(file, spec, offset)
        return found


def demand_loadable_files(folder: Path) -> None:
    """A model's folder that transformers may be given, which opens what it finds there.

    Raises:
        ConfigError: A link in it leads out, or something there is no regular file.
    """
    try:
        demand_inside(folder)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            demand_inside(folder / _TEMPLATES)
        _demand_own_shards(folder)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def _demand_own_shards(folder: Path) -> None:
    """Refuses an index with names that lead out: transformers opens the files that it names."""
    try:
        index = json.loads(read_inside(folder, _INDEX))
        names = {str(name) for name in index["weight_map"].values()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # no index, or one that nothing is read by; level structure says so
    if out := sorted(name for name in names if "/" in name):
        raise UnsafeFileError(folder / _INDEX, f"it names {out[0]}, which leads out of {folder}")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: The file holds none, or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no JSON object")
    return content
