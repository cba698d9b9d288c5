"""Converting as a library call: `plan_conversion`, then `convert`."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from moeconv import __version__
from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.artifact.destination import resolve_out
from moeconv.artifact.manifest import (
    MANIFEST_NAME,
    FieldRecord,
    FileRecord,
    Manifest,
    SourceRecord,
    folds,
    rules,
)
from moeconv.errors import (
    ConfigError,
    NotACheckpointError,
    OutputError,
    StorageError,
    TensorError,
    UsageError,
)
from moeconv.execution.engine import Engine, Progress, Result
from moeconv.execution.journal import Journal
from moeconv.execution.memory import resident_bytes
from moeconv.execution.staging import Staging
from moeconv.families import target_for, targets
from moeconv.hf.config import generation_config, model_config, to_json
from moeconv.hf.tokenizer import TokenizerFiles, asked_set, check_fits, read_tokenizer
from moeconv.mapping.edges import expand
from moeconv.mapping.rules import Options
from moeconv.maxtext.checkpoint import Checkpoint, open_checkpoint
from moeconv.maxtext.run_record import RunRecord, read_run
from moeconv.orbax.inventory import stamps
from moeconv.planning.plan import IMPORT_BYTES, Plan, build_plan, index_json
from moeconv.sizes import HUB_FILE_LIMIT, format_size
from moeconv.tensor.dtypes import DTYPES

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class ConvertOptions:
    """Everything `moeconv convert` can be told; see the command's help.

    Attributes:
        config: MaxText YAML.
        sets: `key=value` pairs.
        accept: Settings of the config that no known MaxText has, and that decide nothing.
        target: A family's name, or `auto`.
        dtype: Output dtype, or `keep`.
        max_shard_bytes: Largest safetensors file.
        untie: Write an explicit output head.
        tokenizer: Directory, tiktoken ranks file or Hub id.
        jobs: Workers.
        max_memory: Bytes the process may use.
        overwrite: Replace a non-empty OUT.
        resume: Go on with an interrupted conversion.
        allow_nonfinite: Copy NaN and Inf instead of refusing them.
        allow_missing_chunks: Read chunks that are not stored as zeros, where the checkpoint's
            format leaves out chunks of zeros.
    """

    config: Path | None = None
    sets: Sequence[str] = ()
    accept: Sequence[str] = ()
    target: str = "auto"
    dtype: str = "keep"
    max_shard_bytes: int = 5 * GB
    untie: bool = False
    tokenizer: str | None = None
    jobs: int = 1
    max_memory: int = 4 * GIB
    overwrite: bool = False
    resume: bool = False
    allow_nonfinite: bool = False
    allow_missing_chunks: bool = False


@dataclass(frozen=True)
class Prepared:
    """A conversion that is planned and ready to run."""

    checkpoint: Checkpoint
    plan: Plan
    tokenizer: TokenizerFiles | None
    options: ConvertOptions
    run: RunRecord | None = None
    notes: list[str] = field(default_factory=list)


def plan_conversion(ckpt: str, options: ConvertOptions) -> Prepared:
    """Reads the checkpoint's metadata and makes the plan; writes nothing.

    Raises:
        MoeconvError: Any of its subclasses; see `moeconv.errors`.
    """
    if options.jobs < 1:
        raise UsageError("--jobs takes a whole number from 1")
    if options.target != "auto" and options.target not in targets():
        raise UsageError(f"--target {options.target} is none of auto, {', '.join(targets())}")
    if options.dtype != "keep" and options.dtype not in DTYPES:
        raise UsageError(f"--dtype {options.dtype} is none of keep, {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(
        ckpt,
        config=options.config,
        sets=options.sets,
        accept=options.accept,
        allow_missing_chunks=options.allow_missing_chunks,
    )
    model = checkpoint.resolution.model()
    warnings = list(checkpoint.resolution.warnings)
    if checkpoint.step.skipped:
        warnings.append(
            f"newer steps are unfinished and were passed over: {', '.join(checkpoint.step.skipped)}"
        )
    spec = options.tokenizer or checkpoint.tokenizer
    tokenizer = None
    if spec is not None:
        with suppress(RuntimeError):  # ~name of no user, of which read_tokenizer tells
            checkpoint.unchanged.watch(partial(stamps, Path(asked_set(spec)[1]).expanduser()))
        length = model.max_position_embeddings
        if options.tokenizer is not None:
            tokenizer = read_tokenizer(spec, model_max_length=length)
        else:
            tokenizer = checkpoint.read_tokenizer(length)
        warnings += [*tokenizer.notes, *check_fits(tokenizer, model.vocab_size)]
        model = _with_token_ids(model, tokenizer)
    else:
        warnings.append(
            "no tokenizer was given or found beside the run, so none is written and the token ids "
            "of config.json are null; pass --tokenizer"
        )
    run, unread = read_run(checkpoint.step, checkpoint.sidecar[0] if checkpoint.sidecar else None)
    warnings += unread
    if options.tokenizer is not None and run is not None and run.facts is not None:
        # Of its own tokenizer, which this may not be.
        facts = run.facts.model_copy(update={"tokenizer_license": None})
        run = run.model_copy(update={"facts": facts})
    choices = Options(untie=options.untie)
    if options.untie and not model.tie_word_embeddings:
        warnings.append("--untie changes nothing: the model's output head is its own parameter")
    family = target_for(model, options.target)
    dtype = None if options.dtype == "keep" else options.dtype
    dtypes = {name: info.dtype for name, info in checkpoint.arrays.info.items()}
    edges = expand(family, model, checkpoint.layout, dtypes, dtype=dtype, options=choices)
    warnings += family.caveats(model, choices)
    warnings += [f"{name} is left out: {why}" for name, why in checkpoint.dropped.items()]
    warnings += [
        f"{edge.target} alone has {format_size(edge.nbytes)}, and the Hub takes files of up to "
        f"{format_size(HUB_FILE_LIMIT)} only"
        for edge in edges
        if edge.nbytes > HUB_FILE_LIMIT
    ]
    plan = build_plan(
        model=model,
        layout=checkpoint.layout,
        family=family,
        options=choices,
        dtype=dtype,
        edges=edges,
        arrays=checkpoint.arrays,
        source=checkpoint.identity,
        max_shard_bytes=options.max_shard_bytes,
        warnings=warnings,
        dropped=checkpoint.dropped,
    )
    plan.memory_budget(options.max_memory, options.jobs)
    _demand_json(plan, run, tokenizer)
    return Prepared(checkpoint, plan, tokenizer, options, run)


def _demand_json(plan: Plan, run: RunRecord | None, tokenizer: TokenizerFiles | None) -> None:
    """What others told must fit into the manifest, which is written when all work is done.

    Raises:
        ConfigError: Something is no number or no text.
    """
    told = {
        "model": plan.model.values(),
        "sources": {name: str(source) for name, source in plan.model.sources.items()},
        "tokenizer": tokenizer and tokenizer.source,
        "dropped": dict(plan.dropped),
        "warnings": list(plan.warnings),
        "run": run and run.model_dump(mode="json"),
    }
    for name, value in told.items():
        try:
            to_json(value)
        except ValueError as error:
            raise ConfigError(f"{name}: cannot stand in the manifest: {error}") from None


def convert(
    prepared: Prepared,
    out: Path,
    *,
    progress: Progress = lambda read, written: None,
    note: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Carries out a planned conversion; OUT appears whole, or not at all.

    Args:
        prepared: From `plan_conversion`.
        out: Directory to make.
        progress: Called with bytes read and bytes written, from any thread.
        note: Called with sentences for people.

    Raises:
        MoeconvError: Nothing is left behind, but for storage errors and interruptions, after which
            `resume` goes on.
    """
    options = prepared.options
    out = _place(out, prepared.checkpoint)
    staging = Staging(out, overwrite=options.overwrite, resume=options.resume)
    try:
        for text in staging.notes:
            note(text)
        manifest = _carry_out(prepared, staging, progress, note)
        staging.publish([MANIFEST_NAME, *manifest.files])
    except OutputError:
        # What an earlier process did, or what is done but for the last step, is not lost.
        if staging.resuming or (staging.folder / MANIFEST_NAME).exists():
            staging.keep()
        else:
            staging.discard()
        raise
    except OSError as error:
        staging.keep()
        raise OutputError(
            f"writing to {staging.folder} failed: {error.strerror or error}; when that is "
            "mended, go on with --resume"
        ) from None
    except StorageError:
        staging.keep()
        raise
    except Exception:
        staging.discard()
        raise
    except BaseException:
        if not staging.published:
            staging.keep()
            raise
        staging.discard()  # only the cleaning up was interrupted
    return manifest


def _carry_out(
    prepared: Prepared, staging: Staging, progress: Progress, note: Callable[[str], None]
) -> Manifest:
    """Fills the staging folder; the manifest is written last."""
    options, plan = prepared.options, prepared.plan
    staging.check_space(plan.disk_bytes)
    # A resumed conversion must not inherit units that were let pass.
    identity = f"{plan.digest}, NaN and Inf {'copied' if options.allow_nonfinite else 'refused'}"
    if prepared.checkpoint.files is not None:
        identity += f", files {prepared.checkpoint.files}"
    if options.allow_missing_chunks:
        identity += ", missing chunks read as zeros"
    try:
        journal = Journal(
            staging.folder,
            identity,
            units=plan.units,
            assemblies=[each.name for each in plan.assemblies],
            resume=options.resume,
        )
    except ValueError:
        raise OutputError(
            f"{staging.folder} holds an unfinished conversion of another checkpoint or with "
            "other options; repeat those, or leave out --resume to begin anew"
        ) from None
    for text in journal.notes:
        note(text)
    if journal.resumed:
        note(f"resuming: {len(journal.done)} of {len(plan.units)} units are already written")
    engine = Engine(
        plan,
        prepared.checkpoint.arrays,
        staging.folder,
        jobs=options.jobs,
        # What was set aside for the interpreter and is not used yet will be.
        memory=plan.memory_budget(options.max_memory, options.jobs)
        - max(resident_bytes(), IMPORT_BYTES),
        journal=journal,
        allow_nonfinite=options.allow_nonfinite,
        progress=progress,
        note=note,
    )
    try:
        result = engine.run()
    except (NotACheckpointError, TensorError):
        prepared.checkpoint.unchanged.check()  # what is damaged now may be half of another save
        raise
    finally:
        journal.close()
    prepared.checkpoint.unchanged.check()
    for text in result.warnings:
        note(f"warning: {text}")
    return _write_small_files(prepared, staging, result)


def _place(out: Path, checkpoint: Checkpoint) -> Path:
    """OUT as an absolute path without symbolic links, outside of the checkpoint."""
    place = resolve_out(out)
    items = checkpoint.step.items.local
    if items is None:
        return place
    step = (items.parent if items.name == "items" else items).resolve()
    if place in step.parents:
        raise OutputError(f"OUT {out} contains the checkpoint {step}; choose another directory")
    # What lies beside a run's steps belongs to Orbax: a directory 600 would be a step of its, to be
    # resumed or deleted.
    steps = [step.parent] if step.parent.name == "checkpoints" else []
    for inside in (step, items.resolve(), *steps):
        if place == inside or inside in place.parents:
            raise OutputError(
                f"OUT {out} lies inside the checkpoint {inside}; choose a directory outside of it"
            )
    return place


def _with_token_ids(model: ModelDescription, tokenizer: TokenizerFiles) -> ModelDescription:
    """Token ids nobody told come from the tokenizer."""
    where = Provenance(Origin.TOKENIZER, tokenizer.source)
    found = {
        name: ids for name, ids in tokenizer.token_ids().items() if getattr(model, name) is None
    }
    sources = {**model.sources, **dict.fromkeys(found, where)}
    return replace(model, **found, sources=sources)


def _write_small_files(prepared: Prepared, staging: Staging, result: Result) -> Manifest:
    plan = prepared.plan
    dtype = plan.dtype or _main_dtype(plan)
    files: dict[str, bytes] = {}
    if prepared.tokenizer is not None:
        files |= prepared.tokenizer.files
    files["config.json"] = to_json(model_config(plan.family, plan.model, dtype, plan.options))
    own = prepared.tokenizer.generation if prepared.tokenizer is not None else None
    files["generation_config.json"] = to_json(generation_config(plan.family, plan.model, own))
    if (index := index_json(plan)) is not None:
        files["model.safetensors.index.json"] = to_json(index)
    staging.write(files)
    manifest = make_manifest(prepared, result, files, dtype)
    staging.write({MANIFEST_NAME: manifest.to_json()})
    return manifest


def _main_dtype(plan: Plan) -> str:
    """The dtype most bytes have, which config.json names."""
    weight: dict[str, int] = {}
    for edge in plan.edges.values():
        weight[edge.dtype] = weight.get(edge.dtype, 0) + edge.nbytes
    return max(sorted(weight), key=weight.__getitem__)


def make_manifest(
    prepared: Prepared, result: Result, files: dict[str, bytes], dtype: str
) -> Manifest:
    """Puts the manifest together from what was planned and what was done."""
    import hashlib

    plan, checkpoint = prepared.plan, prepared.checkpoint
    records = {
        f.name: FileRecord(size=f.layout.size, sha256=result.files[f.name]) for f in plan.files
    }
    records |= {
        name: FileRecord(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        for name, raw in files.items()
    }
    lines = [f"{name} {digest}" for name, digest in sorted(result.arrays.items())]
    values: dict[str, Any] = plan.model.values()
    return Manifest(
        moeconv_version=__version__,
        source=SourceRecord(
            path=str(checkpoint.step.items),
            step=checkpoint.step.number,
            format=checkpoint.tree.describe(),
            layout=checkpoint.layout.describe(),
            digest=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            arrays=dict(sorted(result.arrays.items())),
            metadata=checkpoint.identity["metadata"],
        ),
        target=plan.family.name,
        architecture=plan.family.architecture,
        dtype=dtype,
        dtype_kept=plan.dtype is None,
        untied=plan.options.untie,
        model={
            name: FieldRecord(
                value=value,
                source=str(plan.model.sources[name]) if name in plan.model.sources else None,
            )
            for name, value in values.items()
        },
        rules=rules(plan),
        folds=folds(plan),
        dropped=dict(plan.dropped),
        warnings=[*plan.warnings, *result.warnings],
        tokenizer=prepared.tokenizer.source if prepared.tokenizer else None,
        plan=plan.digest,
        files=dict(sorted(records.items())),
        run=prepared.run,
        missing_chunks={n: [list(p) for p in places] for n, places in result.missing.items()},
        accepted_keys=list(checkpoint.told.accepted),
    )


__all__ = ["ConvertOptions", "Prepared", "convert", "make_manifest", "plan_conversion"]
