"""`moeconv.plan` and `moeconv.convert`: every byte of the output first, then the output."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from moeconv.api.arguments import (
    Fields,
    Note,
    Progress,
    Size,
    StrPath,
    jobs_of,
    log,
    optional_path,
    pairs_of,
    size_of,
    unseen,
)
from moeconv.errors import UsageError
from moeconv.printing import Printable
from moeconv.sizes import format_size, parse_file_size

if TYPE_CHECKING:
    from moeconv.artifact.manifest import Manifest
    from moeconv.conversion.api import ConvertOptions
    from moeconv.planning.plan import Plan


class PlanOptions(TypedDict, total=False):
    """The keyword arguments of `plan`, which `convert` takes too."""

    config: StrPath | None
    set: Fields
    accept_keys: Sequence[str]
    target: str
    dtype: str
    max_shard_size: Size
    untie: bool
    tokenizer: StrPath | None
    allow_missing_chunks: bool
    base: StrPath | None
    base_model: str | None
    merge_lora: StrPath | None
    block: str | None
    scan_layers: bool | None
    scan_axis: int
    shards: Mapping[str, int] | None
    zarr2: bool
    ocdbt: bool
    jobs: int | None
    max_memory: Size


def plan(
    src: StrPath,
    *,
    config: StrPath | None = None,
    set: Fields = (),
    accept_keys: Sequence[str] = (),
    target: str = "auto",
    dtype: str = "keep",
    max_shard_size: Size = "5GB",
    untie: bool = False,
    tokenizer: StrPath | None = None,
    allow_missing_chunks: bool = False,
    base: StrPath | None = None,
    base_model: str | None = None,
    merge_lora: StrPath | None = None,
    block: str | None = None,
    scan_layers: bool | None = None,
    scan_axis: int = 1,
    shards: Mapping[str, int] | None = None,
    zarr2: bool = False,
    ocdbt: bool = True,
    jobs: int | None = None,
    max_memory: Size = "4GiB",
) -> "Plan":
    """Plans a conversion from the metadata of what is read; reads no parameter and writes nothing.

    Args:
        src: A MaxText checkpoint, as `open_checkpoint` takes it, which becomes a Hugging Face
            model; or the folder of a Hugging Face model, or `hf://namespace/name[@revision]`, which
            becomes a MaxText run.
        config: MaxText YAML of the run, in place of the `moeconv_run.json` beside the checkpoint.
        set: Fields by their MaxText names, over `config`; see `open_checkpoint`.
        accept_keys: Settings in the config that moeconv does not know; see `open_checkpoint`.
        target: Architecture of the output, by the names in docs/mapping.md; `auto` is the decoder
            block's own.
        dtype: `float32`, `bfloat16`, `float16`, or `keep` for the checkpoint's own.
        max_shard_size: Largest safetensors file, in bytes or as `5GB`.
        untie: Write an explicit output head for a tied model.
        tokenizer: A directory, a file of tiktoken ranks, or an id on the Hub; by default the one
            that the run's `moeconv_run.json` names.
        allow_missing_chunks: Read chunks that an old checkpoint does not store as zeros.
        base: The checkpoint that the LoRA adapter in `src` was trained on; the adapter is converted
            for PEFT then. It may be `src` itself.
        base_model: What PEFT loads as the converted base: an id on the Hub, or a folder.
        merge_lora: The checkpoint of a LoRA adapter that is merged into the model: alpha / rank
            times the product of its factors is added to each weight, and rounded once.
        block: For a Hugging Face model: MaxText's decoder block; by default the first that holds
            it.
        scan_layers: Likewise: layers are stacked, or each has arrays of its own; by default stacked
            where MaxText can.
        scan_axis: Likewise: the axis of the layers, MaxText's `param_scan_axis`.
        shards: Likewise: the sizes of a mesh by axis (`fsdp`, `tensor`, `expert`); arrays are
            stored in chunks as its devices read them.
        zarr2: Likewise: arrays are zarr v2, for readers older than zarr v3.
        ocdbt: Likewise: arrays are one OCDBT database, else a folder each.
        jobs: Chunks worked on at the same time, by default the number of processors; the bytes
            written do not depend on it.
        max_memory: Memory to stay within, in bytes or as `4GiB`.

    Returns:
        The plan, which is data: `print` shows every tensor with its source, `save` writes it as
        `plan.json`, `warnings` are sentences to read first. `convert` carries it out, here or in
        another process.

    Raises:
        NotACheckpointError: There is no complete checkpoint.
        ConfigError: Something about the model is not known, or contradicts the shapes.
        UnsupportedError: No target holds the model exactly.
        TensorError: Parameters are missing, unknown or inconsistent.
        TokenizerError: The tokenizer cannot be read, or does not fit the vocabulary.
        MemoryLimitError: `max_memory` is less than the largest chunk needs.
        StorageError: The store does not answer.
        UsageError: An argument has a value that it cannot have.
    """
    from moeconv.conversion.api import plan_conversion

    options = _options(
        config=config,
        set=set,
        accept_keys=accept_keys,
        target=target,
        dtype=dtype,
        max_shard_size=max_shard_size,
        untie=untie,
        tokenizer=tokenizer,
        allow_missing_chunks=allow_missing_chunks,
        base=base,
        base_model=base_model,
        merge_lora=merge_lora,
        block=block,
        scan_layers=scan_layers,
        scan_axis=scan_axis,
        shards=shards,
        zarr2=zarr2,
        ocdbt=ocdbt,
        jobs=jobs,
        max_memory=max_memory,
    )
    return plan_conversion(os.fspath(src), options).plan


def load_plan(path: StrPath) -> "Plan":
    """Reads a plan that `Plan.save` or `moeconv convert --dry-run --json` has written.

    Args:
        path: The file.

    Returns:
        The plan, for `convert`, on any machine where its checkpoint has the same path or address.

    Raises:
        ConfigError: It is no plan, was changed, or was made by a moeconv that plans otherwise.
    """
    from moeconv.planning import plan_file

    return plan_file.load_plan(Path(path))


def _options(
    *,
    config: StrPath | None = None,
    set: Fields = (),
    accept_keys: Sequence[str] = (),
    max_shard_size: Size = "5GB",
    tokenizer: StrPath | None = None,
    base: StrPath | None = None,
    merge_lora: StrPath | None = None,
    shards: Mapping[str, int] | None = None,
    zarr2: bool = False,
    jobs: int | None = None,
    max_memory: Size = "4GiB",
    **more: Any,
) -> "ConvertOptions":
    from moeconv.conversion.api import ConvertOptions

    return ConvertOptions(
        config=optional_path(config),
        sets=pairs_of(set),
        accept=tuple(accept_keys),
        max_shard_bytes=parse_file_size(str(max_shard_size)),
        tokenizer=None if tokenizer is None else os.fspath(tokenizer),
        base=None if base is None else os.fspath(base),
        merge_lora=None if merge_lora is None else os.fspath(merge_lora),
        shards=dict(shards or {}),
        zarr3=not zarr2,
        jobs=jobs_of(jobs),
        max_memory=size_of(max_memory),
        **more,
    )


@dataclass(frozen=True)
class Converted(Printable):
    """What was written.

    Attributes:
        out: The folder of the model, or of the run.
        tensors: How many tensors, or arrays, it has.
        manifest: Its `moeconv_manifest.json`: what was read and written, with SHA-256.
    """

    out: Path
    tensors: int
    manifest: "Manifest"

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv convert --json` prints."""
        return {"out": str(self.out), **self.manifest.model_dump(mode="json")}

    def parts(self) -> Iterator[str]:
        """What `moeconv convert` prints."""
        size = format_size(sum(file.size for file in self.manifest.files.values()))
        yield f"{self.out}: {self.manifest.architecture}, {self.tensors} tensors, {size}"
        for fold in self.manifest.folds:
            exact = "exact" if fold.exact else "rounded once"
            yield f"folded {fold.factor} into {fold.target} ({exact})"


def convert(
    src: "StrPath | Plan",
    out: StrPath,
    *,
    checkpoint: StrPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = unseen,
    note: Note = log,
    **options: Unpack[PlanOptions],
) -> Converted:
    """Converts between MaxText and Hugging Face; OUT appears whole, or not at all.

    Args:
        src: What `plan` takes, or a plan of `plan` or `load_plan`.
        out: The folder to make, on this machine.
        checkpoint: Where the checkpoint of a plan is, if it was moved, or its address needs a user
            and password, which no plan holds.
        overwrite: Replace the model in `out` once the new one is whole.
        resume: Go on with an interrupted conversion to `out`.
        allow_nonfinite: Copy NaN and Inf instead of refusing them.
        progress: Called with the bytes to be read and to be written; the context manager that it
            returns gives the function that is called with the bytes read and written since the last
            call, from any thread.
        note: Called with one sentence at a time; warnings begin with `warning: `. By default they
            go to the logger `moeconv`.
        **options: The keyword arguments of `plan`; where `src` is a plan, of these `jobs` and
            `max_memory`.

    Returns:
        The folder and its manifest. `print` shows them as `moeconv convert` does.

    Raises:
        MoeconvError: What `plan` raises.
        OutputError: `out` exists, is inside the checkpoint, or has too little space; with `resume`
            the same conversion goes on after a full disk.
        TensorError: Something stored is damaged, not finite, or changed while it was read.
        StorageError: The store failed; `resume` goes on.
    """
    from moeconv.artifact.destination import resolve_out
    from moeconv.conversion import api
    from moeconv.planning.plan import Plan

    place = Path(out)
    resolve_out(place)  # before minutes of work
    allowed = {"overwrite": overwrite, "resume": resume, "allow_nonfinite": allow_nonfinite}
    if isinstance(src, Plan):
        place_of = None if checkpoint is None else os.fspath(checkpoint)
        prepared = api.reopen(with_limits(src, options), place_of, **allowed)
    else:
        prepared = api.plan_conversion(os.fspath(src), _options(**options, **allowed))
    for text in prepared.plan.warnings:
        note(f"warning: {text}")
    estimate = prepared.plan.estimate
    with progress(estimate.read_bytes, prepared.plan.target_bytes) as advance:
        manifest = api.convert(prepared, place, progress=advance, note=note)
    return Converted(place, len(prepared.plan.edges), manifest)


def with_limits(plan: "Plan", options: PlanOptions) -> "Plan":
    """A plan with what `convert` may say anew of it: how much of this machine it takes.

    Raises:
        UsageError: There is something else, which the plan has decided.
    """
    if decided := sorted(options.keys() - {"jobs", "max_memory"}):
        raise UsageError(f"{', '.join(decided)}: decided by the plan; give it to moeconv.plan")
    if "jobs" in options:
        plan = replace(plan, jobs=jobs_of(options["jobs"]))
    if "max_memory" in options:
        plan = replace(plan, max_memory=size_of(options["max_memory"]))
    return plan
