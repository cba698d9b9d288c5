"""`moeconv_manifest.json`: what was converted, how, and the digests of all read and written."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moeconv.arch.description import ModelDescription
from moeconv.hf.config import to_json
from moeconv.maxtext.run_record import RunRecord
from moeconv.planning.model_values import model_of
from moeconv.untrusted.text import printable

MANIFEST_NAME = "moeconv_manifest.json"
# Of moeconv 0.1.0, whose training runs have a file of this name as well.
OLD_MANIFEST_NAME = "moeconv.json"
MANIFEST_NAMES = (MANIFEST_NAME, OLD_MANIFEST_NAME)


def manifest_name(folder: Path) -> str:
    """The name that the manifest in a folder has: the old one only where the new one is absent."""
    there = [name for name in MANIFEST_NAMES if os.path.lexists(folder / name)]
    return there[0] if there else MANIFEST_NAME


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(_Frozen):
    """What was read.

    `digest` is SHA-256 over the sorted lines `NAME DIGEST` of `arrays`; an array's digest is that
    of `moeconv.execution.digest.array_digest`. `metadata` has the SHA-256 of the
    source's own metadata files, `scan_axis` the axis on which it stacks layers.
    """

    kind: Literal["maxtext", "huggingface"] = "maxtext"
    path: str
    step: int | None
    format: str
    layout: str
    digest: str
    arrays: dict[str, str]
    metadata: dict[str, str]
    scan_axis: int | None = None


class FieldRecord(_Frozen):
    """A field of the model's description and the source of its value."""

    value: Any
    source: str | None


class FoldRecord(_Frozen):
    """A factor that was moved into weights.

    `factor` has it in words, `value` as a number; what is added to the product is in the words.
    """

    target: str
    factor: str
    value: float
    exact: bool
    reason: str


class FileRecord(_Frozen):
    """One file of the output."""

    size: int
    sha256: str


class AdapterRecord(_Frozen):
    """A LoRA adapter: `scale · A·B` is added to a weight, where `scale` is alpha / rank.

    With `merged` the output is the sum, computed in float64 and rounded once to the output's dtype,
    and `checkpoint` is the adapter's; else the output is the adapter, and `checkpoint` the one that
    it was trained on. `metadata` has the SHA-256 of that checkpoint's metadata files, `base_model`
    how PEFT finds the converted base.
    """

    rank: int
    alpha: float
    alpha_source: str
    scale: float
    merged: bool
    checkpoint: str
    metadata: dict[str, str]
    base_model: str | None = None


class Manifest(_Frozen):
    """The file's schema.

    `kind` says what the output is, `source.kind` what it was made from. Version 1 had neither.
    `dtype` is what config.json names; with `dtype_kept` the tensors have the checkpoint's own, and
    it is the one that most of their bytes have. `run` is null where a run left no record of its
    training. `missing_chunks` has the places, in each array's grid, of the chunks that the
    checkpoint does not store and that were read as zeros, `accepted_keys` the settings that
    `--accept-key` let pass, `narrowed` the dtype of what parameters became that are wider in the
    checkpoint than in the model that it was made from; these are written only where there are any.
    Of an adapter for PEFT `model` describes the base.
    """

    format: Literal["moeconv"] = "moeconv"
    version: Literal[1, 2] = 2
    moeconv_version: str
    kind: Literal["huggingface", "peft", "maxtext"] = "huggingface"
    source: SourceRecord
    target: str
    architecture: str
    dtype: str
    dtype_kept: bool
    untied: bool
    model: dict[str, FieldRecord]
    rules: list[str]
    folds: list[FoldRecord]
    dropped: dict[str, str]
    warnings: list[str]
    tokenizer: str | None
    plan: str
    files: dict[str, FileRecord]
    run: RunRecord | None = None
    missing_chunks: dict[str, list[list[int]]] = {}
    accepted_keys: list[str] = []
    adapter: AdapterRecord | None = None
    narrowed: dict[str, str] = {}

    def to_json(self) -> bytes:
        """Content of the file; what no text may hold (of a path, say) stands as escapes."""
        rare = ("missing_chunks", "accepted_keys", "adapter", "narrowed")
        left_out = {name for name in rare if not getattr(self, name)}
        return to_json(_plain(self.model_dump(mode="json", exclude=left_out)))

    def description(self) -> ModelDescription:
        """The model that `model` describes.

        Raises:
            ValueError: It lacks a field, has one too many, or one has a value that no model has.
        """
        return model_of({name: record.value for name, record in self.model.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return printable(value) if isinstance(value, str) else value
