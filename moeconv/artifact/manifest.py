"""`moeconv.json`: what was converted, how, and the digest of everything read and written."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from moeconv.arch.blocks import Block, settings_of
from moeconv.arch.description import ModelDescription
from moeconv.families import blocks
from moeconv.hf.config import to_json
from moeconv.maxtext.run_record import RunRecord
from moeconv.planning.plan import Plan
from moeconv.untrusted.text import printable

MANIFEST_NAME = "moeconv.json"
# More than any size or id of a model; two of them multiplied are still a number of 64 bits.
_LARGEST = 2**31
_DESCRIPTION = TypeAdapter(ModelDescription)
_FIELDS = {field.name for field in fields(ModelDescription)} - {"sources", "settings"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(_Frozen):
    """What was read.

    `digest` is SHA-256 over the sorted lines `NAME DIGEST` of `arrays`; an array's digest is that
    of `moeconv.execution.digest.array_digest`. `metadata` has the SHA-256 of the
    checkpoint's own files.
    """

    path: str
    step: int | None
    format: str
    layout: str
    digest: str
    arrays: dict[str, str]
    metadata: dict[str, str]


class FieldRecord(_Frozen):
    """A field of the model's description and who told it."""

    value: Any
    source: str | None


class FoldRecord(_Frozen):
    """A factor that was moved into weights."""

    target: str
    factor: str
    value: float
    exact: bool
    reason: str


class FileRecord(_Frozen):
    """One file of the output."""

    size: int
    sha256: str


class Manifest(_Frozen):
    """The file's schema.

    `dtype` is what config.json names; with `dtype_kept` the tensors have the checkpoint's own, and
    it is the one that most of their bytes have. `run` is null where a run left nothing that tells
    of it. `missing_chunks` has the places, in each array's grid, of the chunks that the checkpoint
    does not store and that were read as zeros, `accepted_keys` the settings that `--accept-key`
    let pass; both are written only where there are any.
    """

    format: Literal["moeconv"] = "moeconv"
    version: Literal[1] = 1
    moeconv_version: str
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

    def to_json(self) -> bytes:
        """Content of the file; what no text may hold (of a path, say) stands as escapes."""
        rare = ("missing_chunks", "accepted_keys")
        left_out = {name for name in rare if not getattr(self, name)}
        return to_json(_plain(self.model_dump(mode="json", exclude=left_out)))

    def description(self) -> ModelDescription:
        """The model that `model` tells of.

        Raises:
            ValueError: It lacks a field, has one too many, or one has a value that no model has.
        """
        values = {name: record.value for name, record in self.model.items()}
        own = {name: values[name] for name in values.keys() & _FIELDS}
        model = _DESCRIPTION.validate_json(json.dumps(own), strict=True)
        kinds = set(model.layer_kinds)
        block = blocks().get(model.decoder_block)
        wanted: list[Any] = [kinds, block and not kinds - set(block.layers)]
        if block:
            settings = {name: values[name] for name in values.keys() - _FIELDS}
            model = replace(model, settings=_settings(settings, model, block))
        # Sizes and ids are multiplied, and go into 64 bits.
        wanted += [abs(value) < _LARGEST for value in values.values() if isinstance(value, int)]
        if model.dense_layers:
            wanted.append(model.intermediate_size)
        if model.moe_layers:
            wanted += [model.moe_intermediate_size, model.num_experts, model.num_experts_per_tok]
        if not all(wanted):
            raise ValueError("it describes no model")
        return model


def _settings(found: Mapping[str, Any], model: ModelDescription, block: Block) -> dict[str, Any]:
    """The settings that a manifest has, which must be those of such a model.

    Raises:
        ValueError: One is missing or too many, or has a value that it cannot have.
    """
    wanted = {spec.name: spec for spec in settings_of(block, vars(model))}
    types = found.get("layer_types")
    if block.layer_types is not None:
        if not isinstance(types, list) or len(types) != model.num_hidden_layers:
            raise ValueError("layer_types is not one for each layer")
        if not all(isinstance(each, str) for each in types):
            raise ValueError("layer_types holds what is no text")
    names = {*wanted, *(["layer_types"] if block.layer_types is not None else [])}
    if names != found.keys():
        raise ValueError(f"the settings are {sorted(found)}, not {sorted(names)}")
    settings: dict[str, Any] = {}
    for name, spec in wanted.items():
        try:
            settings[name] = spec.parse(found[name])
        except (TypeError, OverflowError):
            raise ValueError(f"{name} should be {spec.expects}") from None
        if isinstance(found[name], str) and not isinstance(settings[name], str):
            raise ValueError(f"{name} should be {spec.expects}")
    return settings if types is None else {**settings, "layer_types": tuple(types)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return printable(value) if isinstance(value, str) else value


def folds(plan: Plan) -> list[FoldRecord]:
    """The factors a plan moves into weights, once for each rule."""
    records = {}
    for edge in plan.edges.values():
        for value in edge.values:
            if (fold := value.fold) is not None:
                records[edge.rule.target] = FoldRecord(
                    target=edge.rule.target,
                    factor=fold.why,
                    value=fold.factor,
                    exact=value.bound() == 0.0,
                    reason=fold.reason,
                )
    return list(records.values())


def rules(plan: Plan) -> list[str]:
    """The rules the plan used, one line each."""
    used = {id(edge.rule): edge for edge in plan.edges.values()}
    return [
        f"{' + '.join(edge.rule.sources) or edge.describe()} -> {edge.rule.target}: "
        f"{edge.describe()}"
        for edge in used.values()
    ]
