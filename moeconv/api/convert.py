"""`moeconv.plan` and `moeconv.convert`: every byte of the output first, then the output."""

import os
from collections.abc import Iterator, Sequence
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
from moeconv.sizes import format_size

if TYPE_CHECKING:
    from moeconv.artifact.manifest import Manifest
    from moeconv.conversion.api import Prepared


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
    jobs: int | None = None,
    max_memory: Size = "4GiB",
) -> "Prepared":
    """Plans a conversion from a checkpoint's metadata; reads no parameter and writes nothing.

    Args:
        src: A MaxText checkpoint, as `open_checkpoint` takes it.
        config: MaxText YAML of the run, in place of the `moeconv.json` beside the checkpoint.
        set: Fields by their MaxText names, over `config`; see `open_checkpoint`.
        accept_keys: Settings in the config that moeconv does not know; see `open_checkpoint`.
        target: Architecture of the output, by the names in docs/mapping.md; `auto` is the decoder
            block's own.
        dtype: `float32`, `bfloat16`, `float16`, or `keep` for the checkpoint's own.
        max_shard_size: Largest safetensors file, in bytes or as `5GB`.
        untie: Write an explicit output head for a tied model.
        tokenizer: A directory, a file of tiktoken ranks, or an id on the Hub; by default the one
            that the run's `moeconv.json` names.
        allow_missing_chunks: Read chunks that an old checkpoint does not store as zeros.
        jobs: Chunks worked on at the same time, by default the number of processors; the bytes
            written do not depend on it.
        max_memory: Memory to stay within, in bytes or as `4GiB`.

    Returns:
        The plan, for `convert`: `print` shows every tensor with its source, `as_dict()` is the same
        as data, `warnings` are sentences to read first.

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
    from moeconv.conversion.api import ConvertOptions, plan_conversion

    options = ConvertOptions(
        config=optional_path(config),
        sets=pairs_of(set),
        accept=tuple(accept_keys),
        target=target,
        dtype=dtype,
        max_shard_bytes=size_of(max_shard_size),
        untie=untie,
        tokenizer=None if tokenizer is None else os.fspath(tokenizer),
        jobs=jobs_of(jobs),
        max_memory=size_of(max_memory),
        allow_missing_chunks=allow_missing_chunks,
    )
    return plan_conversion(os.fspath(src), options)


@dataclass(frozen=True)
class Converted(Printable):
    """What was written.

    Attributes:
        out: The folder of the model.
        tensors: How many tensors it has.
        manifest: Its `moeconv.json`: what was read and written, with SHA-256.
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
    src: "StrPath | Prepared",
    out: StrPath,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = unseen,
    note: Note = log,
    **options: Unpack[PlanOptions],
) -> Converted:
    """Converts a MaxText checkpoint to a Hugging Face model; OUT appears whole, or not at all.

    Args:
        src: A checkpoint, as `open_checkpoint` takes it, or a plan of `plan`.
        out: The folder to make, on this machine.
        overwrite: Replace the model in `out` once the new one is whole.
        resume: Go on with an interrupted conversion to `out`.
        allow_nonfinite: Copy NaN and Inf instead of refusing them.
        progress: Called with the bytes to be read and to be written; the context manager that it
            returns gives the function that is called with the bytes read and written since the last
            call, from any thread.
        note: Called with one sentence at a time; warnings begin with `warning: `. By default they
            go to the logger `moeconv`.
        **options: The keyword arguments of `plan`, where `src` is no plan.

    Returns:
        The folder and its manifest. `print` shows them as `moeconv convert` does.

    Raises:
        MoeconvError: What `plan` raises.
        OutputError: `out` exists, lies in the checkpoint, or has too little space; with `resume`
            the same conversion goes on after a full disk.
        TensorError: Something stored is damaged, not finite, or changed while it was read.
        StorageError: The store failed; `resume` goes on.
    """
    from moeconv.artifact.destination import resolve_out
    from moeconv.conversion import api

    place = Path(out)
    resolve_out(place)  # before minutes of work
    if not isinstance(src, api.Prepared):
        src = plan(src, **options)
        for text in src.warnings:
            note(f"warning: {text}")
    elif options:
        raise UsageError(f"{', '.join(options)}: decided by the plan; give it to moeconv.plan")
    chosen = replace(
        src.options, overwrite=overwrite, resume=resume, allow_nonfinite=allow_nonfinite
    )
    with progress(src.plan.read_bytes, src.plan.tensor_bytes) as advance:
        manifest = api.convert(replace(src, options=chosen), place, progress=advance, note=note)
    return Converted(place, len(src.plan.edges), manifest)
