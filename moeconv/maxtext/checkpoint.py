"""Opening a checkpoint: finding it, reading its metadata, and understanding the model in it."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv.arch.blocks import Block
from moeconv.arch.config_file import ConfigFile
from moeconv.arch.config_sources import ResolvedConfig, resolve_config
from moeconv.arch.detection import detect_layout
from moeconv.arch.keys import refusals_of
from moeconv.arch.layout import Layout
from moeconv.arch.resolve import Resolution, resolve
from moeconv.arch.stacks import KeyPath
from moeconv.errors import (
    ConfigError,
    NotACheckpointError,
    TensorError,
    UnsupportedError,
)
from moeconv.families import block_of, blocks
from moeconv.hf.tokenizer import TokenizerFiles
from moeconv.maxtext import inspection
from moeconv.maxtext.facts import is_unmarked
from moeconv.maxtext.fused import demand_order, take_apart
from moeconv.maxtext.run_config import run_config, said_of
from moeconv.maxtext.sidecar import OLD_SIDECAR_NAME, SIDECAR_NAMES, FoundSidecar, RunSidecar
from moeconv.maxtext.sidecar import first_fault as _first_fault
from moeconv.maxtext.tokenizer import run_tokenizer
from moeconv.maxtext.unchanged import Unchanged
from moeconv.maxtext.whole import Part, demand_whole, part_of, refuse_older, refuse_unclaimed
from moeconv.orbax.arrays import Arrays
from moeconv.orbax.inventory import Fingerprint, fingerprints, inventory, versions
from moeconv.orbax.locate import METADATA, Step, locate, read_beside
from moeconv.orbax.metadata import Tree, read_tree
from moeconv.printing import Printable
from moeconv.untrusted import strict_json

if TYPE_CHECKING:
    from rich.console import RenderableType

# Parameters that the model's logits do not use, by their first key; left out, and said so.
UNUSED = {
    "mtp_block": "multi-token prediction heads, which the main logits do not use "
    "(MaxText models/models.py)",
    "vision_encoder": "the encoder of images, which text does not go through (MaxText "
    "models/models.py); the text model is converted alone",
    "audio_encoder": "the encoder of sound, which text does not go through (MaxText "
    "models/models.py); the text model is converted alone",
}

# Settings that say something of these alone, by how their names begin.
_SETTINGS_OF = {
    "mtp_block": ("mtp_", "quantize_mtp"),
    "vision_encoder": ("use_multimodal", "vision_"),
    "audio_encoder": ("use_multimodal", "use_audio", "audio_"),
}
# Settings of LoRA, as one and as several (before `lora`).
LORA = ("lora", "enable_lora", "lora_rank", "lora_alpha")
# Why an array of `Tree.superseded` is left out.
SUPERSEDED = (
    "a copy from before another collection has it; MaxText loads that one's "
    "(common/checkpointing.py `load_params_from_path`)"
)

# Of its items, beside the arrays.
_OWN = ("_METADATA", "manifest.ocdbt")
_SIDECAR_LIMIT = 4 * 2**20  # a resolved config has some 60 KB


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint as it is stored, whatever model is in it.

    Attributes:
        step: Where it is.
        tree: Its leaves.
        arrays: Its parameters, opened.
        files: Digest of the names, sizes and times of all its files; None where it is remote.
        unchanged: Looks for changes since before it was read.
        notes: Warnings about how it is stored.
        fused: Settings by which it has parameters in one array, which are taken apart.
    """

    step: Step
    tree: Tree
    arrays: Arrays
    files: str | None
    unchanged: Unchanged
    notes: tuple[str, ...]
    fused: frozenset[str]

    @property
    def folders(self) -> tuple[Path, ...]:
        """The step on this machine, its item, and the folder of a run's steps.

        That belongs to Orbax: a directory 600 in it would be a step, to be resumed or deleted.
        """
        items = self.step.items.local
        if items is None:
            return ()
        step = (items.parent if items.name == "items" else items).resolve()
        steps = [step.parent] if step.parent.name == "checkpoints" else []
        return (step, items.resolve(), *steps)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """SHA-256 of its metadata files, by name.

        OCDBT's manifest changes with every chunk. Without one nothing among them does.
        """
        items = self.step.items
        parts = {name: items.read(name) for name in _OWN}
        if self.step.folder != items:
            parts[METADATA] = self.step.folder.read(METADATA)
        return {n: hashlib.sha256(raw).hexdigest() for n, raw in parts.items() if raw}


@dataclass(frozen=True)
class Checkpoint(StoredCheckpoint, Printable):
    """A checkpoint as moeconv understands it.

    Attributes:
        layout: How layers are stored.
        resolved: Config and flags, resolved.
        resolution: What is known of the model, and what is missing.
        sidecar: The run's sidecar and where it is, if one was found.
        dropped: Parameters left out on purpose, with the reason.
    """

    layout: Layout
    resolved: ResolvedConfig
    resolution: Resolution
    sidecar: FoundSidecar | None
    dropped: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv inspect --json` prints."""
        return inspection.as_dict(self)

    def parts(self) -> "Iterable[RenderableType]":
        """What `moeconv inspect` prints, without the warnings."""
        return inspection.parts(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Things to know before converting, a sentence each."""
        left_out = [f"{name} is left out: {why}" for name, why in self.dropped.items()]
        return (*self.resolution.warnings, *left_out)

    @property
    def tokenizer(self) -> str | None:
        """The run's tokenizer directory, if its sidecar names one."""
        if self.sidecar is None or self.sidecar.content.tokenizer is None:
            return None
        return str(self.sidecar.folder / self.sidecar.content.tokenizer)

    def read_tokenizer(self, model_max_length: int) -> TokenizerFiles:
        """Reads it; see `run_tokenizer`."""
        assert self.sidecar is not None
        return run_tokenizer(self.sidecar, model_max_length=model_max_length)


def _look(step: Step) -> Mapping[str, object]:
    """What changes when the checkpoint does: on this machine, the fingerprint of every file."""
    if (local := step.items.local) is not None:
        step_metadata = (step.folder.local or local.parent) / METADATA
        return {**inventory(local), **fingerprints(step_metadata)}
    return versions(step.items, _OWN) | versions(step.folder, [METADATA])


def _files_digest(files: Mapping[str, Fingerprint]) -> str:
    lines = sorted(f"{name} {size} {changed}" for name, (size, changed, *_) in files.items())
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def open_checkpoint(
    spec: str,
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    accept: Sequence[str] = (),
    allow_missing_chunks: bool = False,
    beside_adapter: bool = False,
) -> Checkpoint:
    """Opens CKPT and resolves what is known of its model.

    Args:
        spec: A run, its `checkpoints/`, a step, a step's `items/`, or a URL of one.
        config: MaxText YAML; replaces the run's sidecar.
        sets: `key=value` flags; win over both.
        accept: Settings of the config that no known MaxText has, and that decide nothing.
        allow_missing_chunks: Chunks that are not stored count as zeros, where zeros need not be.
        beside_adapter: A LoRA adapter in it is left out, and settings of LoRA decide nothing.

    Raises:
        NotACheckpointError: There is no complete checkpoint.
        ConfigError: The config cannot be read, or contradicts the shapes.
        TensorError: Parameters are missing, unknown or inconsistent.
        UnsupportedError: The decoder block or a dtype is not supported.
    """
    part: Part = "model alone" if beside_adapter else "model"
    stored = open_stored(spec, part=part, allow_missing_chunks=allow_missing_chunks)
    step, arrays, tree = stored.step, stored.arrays, stored.tree
    sidecar, unread = None, list(stored.notes)
    try:
        sidecar = _read_sidecar(step)
    except _DamagedError as error:
        if config is None:
            raise error.needed() from None
        unread.append(
            f"{error}; --config replaces it, but its tokenizer and the run's facts are lost"
        )
    content, provenance = run_config(config, sidecar, step)
    unread += said_of(content, provenance, given=config is not None)
    resolved = resolve_config(content, provenance, sets, accept)
    demand_order(stored.fused, content, sets)
    used = {i.path: i.shape for i in arrays.info.values() if i.path[0] not in UNUSED}
    dropped = {i.name: UNUSED[i.path[0]] for i in arrays.info.values() if i.path[0] in UNUSED}
    dropped |= {leaf.stored_name: SUPERSEDED for leaf in tree.superseded}
    layout = _layout(used, resolved, tree.collections)
    if sidecar is not None:
        refuse_older(sidecar.path, sidecar.content.maxtext_version, layout.block)
    if isinstance(content, ConfigFile):
        refuse_older(provenance.detail, content.release, layout.block)
    unused = [name for module in UNUSED for name in _SETTINGS_OF[module] if _has(arrays, module)]
    deciding = resolved.without(lambda key: key in stored.fused or key.startswith(tuple(unused)))
    if beside_adapter:
        deciding = deciding.neutral(LORA)
    resolution = resolve(
        layout, deciding, scan_layers=step.scan_layers, dated=step.dated, unread=is_unmarked(step)
    )
    resolution = replace(resolution, warnings=(*unread, *resolution.warnings))
    return Checkpoint(
        step,
        stored.tree,
        arrays,
        stored.files,
        stored.unchanged,
        stored.notes,
        stored.fused,
        layout,
        resolved,
        resolution,
        sidecar,
        dropped,
    )


def open_stored(
    spec: str, *, part: Part = "model", allow_missing_chunks: bool = False
) -> StoredCheckpoint:
    """Opens a checkpoint without asking what model it is; see `open_checkpoint`.

    Args:
        spec: As there.
        part: What of it: the model, alone in it or without a LoRA adapter; or that adapter.
        allow_missing_chunks: As there.

    Raises:
        NotACheckpointError: There is no complete checkpoint, or no adapter where one is asked for.
        TensorError: Arrays are damaged.
        UnsupportedError: A dtype or compression is not supported.
    """
    step = locate(spec)
    unchanged = Unchanged()
    unchanged.watch(partial(_look, step))
    local = step.items.local
    files = _files_digest(inventory(local)) if local is not None else None
    tree = part_of(step, read_tree(step.items), part)
    if part != "adapter":
        refuse_unclaimed(step.items, tree, unused=UNUSED)
    if local is None and not tree.use_ocdbt:
        name = "zarr.json" if tree.use_zarr3 else ".zarray"
        names = [f"{leaf.stored_name}/{name}" for leaf in tree.model]
        unchanged.watch(partial(versions, step.items, names))
    arrays = Arrays(step.items, tree, allow_missing=allow_missing_chunks)
    notes = demand_whole(step, arrays)
    fused = take_apart(arrays) if part != "adapter" else frozenset[str]()
    return StoredCheckpoint(step, tree, arrays, files, unchanged, tuple(notes), fused)


def _has(arrays: Arrays, module: str) -> bool:
    return any(info.path[0] == module for info in arrays.info.values())


def _layout(
    shapes: Mapping[KeyPath, tuple[int, ...]],
    resolved: ResolvedConfig,
    collections: Mapping[KeyPath, str] | None = None,
) -> Layout:
    """How layers are stored, by the configured decoder block, or any that fits.

    Raises:
        UnsupportedError: The decoder block is not one moeconv converts.
        ConfigError: It is, but the checkpoint is of another.
    """
    axis, entry = _scan_axis(resolved), resolved.get("decoder_block")
    if entry is None:
        every = list(blocks().values())
        return detect_layout(shapes, every, scan_axis=axis, collections=collections)
    block = block_of(entry.value, entry.provenance)
    try:
        return detect_layout(shapes, [block], scan_axis=axis, collections=collections)
    except TensorError:
        plain = {key: each.value for key, each in resolved.items()}
        if reasons := refusals_of(block, plain):
            raise UnsupportedError(
                f"this model cannot be converted exactly: {'; '.join(reasons)}"
            ) from None
        others = [other for other in blocks().values() if other is not block]
        if (fits := _fitting(shapes, others)) is None:
            raise
        raise ConfigError(
            f"decoder_block={block.name} ({entry.provenance}) has other parameters than the "
            f"checkpoint, which may be one of {fits.name}; give the config of this run"
        ) from None


def _fitting(shapes: Mapping[KeyPath, tuple[int, ...]], possible: Sequence[Block]) -> Block | None:
    """The first block that has exactly these parameters."""
    for block in possible:
        with suppress(TensorError, ConfigError):
            return detect_layout(shapes, [block]).block
    return None


def _scan_axis(resolved: ResolvedConfig) -> int | None:
    """`param_scan_axis`, where it was written for this run."""
    axis = resolved.get("param_scan_axis")
    if axis is None or not axis.explicit:
        return None
    if isinstance(axis.value, bool) or axis.value not in range(8):
        raise ConfigError(
            f"param_scan_axis={axis.value} ({axis.provenance}) should be a whole number from 0"
        )
    return int(axis.value)


class _DamagedError(Exception):
    """The sidecar is there and of no use; says where and why."""

    def needed(self) -> ConfigError:
        """Where nothing replaces it."""
        return ConfigError(f"{self}; mend it, or give the run's config with --config")


def find_sidecar(step: Step, *, needed: bool) -> FoundSidecar | None:
    """The run's sidecar; a damaged one is an error only where its config is needed."""
    try:
        return _read_sidecar(step)
    except _DamagedError as error:
        if needed:
            raise error.needed() from None
        return None


def _read_sidecar(step: Step) -> FoundSidecar | None:
    for folder, name in itertools.product(step.beside, SIDECAR_NAMES):
        try:
            raw = read_beside(folder, name, limit=_SIDECAR_LIMIT)
        except NotACheckpointError as error:
            raise _DamagedError(str(error)) from None
        if raw is None:
            continue
        try:
            content = strict_json.loads(raw)
            manifest = isinstance(content, dict) and content.get("format") == "moeconv"
            if manifest and name == OLD_SIDECAR_NAME:
                continue  # of a model that moeconv 0.1.0 converted
            return FoundSidecar(RunSidecar.model_validate(content), folder, name)
        except ValueError as error:  # pydantic's is one
            raise _DamagedError(
                f"{folder / name} is not the sidecar that moeconv train writes "
                f"({_first_fault(error)})"
            ) from None
    return None
