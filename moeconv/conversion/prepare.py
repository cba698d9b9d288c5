"""The first step of converting: a plan, made from metadata or read back, and its source opened."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.conversion.adapter import merge, plan_adapter
from moeconv.conversion.contents import demand_json
from moeconv.conversion.incoming import model_folder, plan_incoming
from moeconv.conversion.options import ConvertOptions, Prepared, planned_source
from moeconv.errors import (
    TensorError,
    TokenizerError,
    UsageError,
)
from moeconv.families import target_for, targets, targets_of
from moeconv.hf.tokenizer import TokenizerFiles, asked_set, check_fits, read_tokenizer
from moeconv.mapping.edges import expand
from moeconv.mapping.rules import Options
from moeconv.maxtext.checkpoint import (
    Checkpoint,
    StoredCheckpoint,
    find_sidecar,
    open_checkpoint,
    open_stored,
)
from moeconv.maxtext.run_record import RunRecord, read_run
from moeconv.maxtext.tokenizer import run_tokenizer
from moeconv.maxtext.whole import Part
from moeconv.orbax.inventory import fingerprints
from moeconv.planning.output import safetensors_output
from moeconv.planning.plan import Plan, PlannedSource, PlannedTokenizer, build_plan
from moeconv.sizes import HUB_FILE_LIMIT, format_size
from moeconv.tensor.dtypes import DTYPES


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
    if (folder := model_folder(ckpt)) is not None:
        return plan_incoming(folder, options)
    if options.base is not None and options.merge_lora is not None:
        raise UsageError("--base converts an adapter alone, and --merge-lora merges it; give one")
    if options.base is not None:
        return plan_adapter(ckpt, options.base, options)
    if options.base_model is not None:
        raise UsageError("--base-model is of an adapter's conversion; give --base with it")
    checkpoint = open_checkpoint(
        ckpt,
        config=options.config,
        sets=options.sets,
        accept=options.accept,
        allow_missing_chunks=options.allow_missing_chunks,
        beside_adapter=options.merge_lora is not None,
    )
    model = checkpoint.resolution.model()
    warnings = list(checkpoint.resolution.warnings)
    if checkpoint.step.skipped:
        warnings.append(f"newer steps were passed over: {'; '.join(checkpoint.step.skipped)}")
    tokenizer = _tokenizer(checkpoint, options, model.max_position_embeddings)
    if tokenizer is not None:
        warnings += [*tokenizer.notes, *check_fits(tokenizer, model.vocab_size)]
        model = _with_token_ids(model, tokenizer)
    else:
        warnings.append(
            "no tokenizer was given or found beside the run, so none is written and the token ids "
            "of config.json are null; pass --tokenizer"
        )
    run, unread = _run(checkpoint, options)
    warnings += unread
    choices = Options(untie=options.untie)
    if options.untie and not model.tie_word_embeddings:
        warnings.append("--untie changes nothing: the model's output head is its own parameter")
    page = target_for(model, _target(checkpoint, model, options))
    dtype = None if options.dtype == "keep" else options.dtype
    dtypes = {name: info.dtype for name, info in checkpoint.arrays.info.items()}
    narrowed = _narrowed(checkpoint) if dtype is None else {}
    edges = expand(
        page,
        model,
        checkpoint.layout,
        dtypes,
        dtype=dtype,
        narrowed=narrowed,
        options=choices,
    )
    source, merging = planned_source(checkpoint, checkpoint.layout), None
    if options.merge_lora is not None:
        merging = merge(options.merge_lora, checkpoint, edges, options)
        edges, warnings = merging.edges, [*warnings, *merging.warnings]
        source = replace(source, arrays={**source.arrays, **merging.adapter.arrays.info})
    warnings += page.caveats(model, choices)
    warnings += [f"{name} is left out: {why}" for name, why in checkpoint.dropped.items()]
    warnings += [
        f"{edge.target} alone has {format_size(edge.nbytes)}, and the Hub takes files of up to "
        f"{format_size(HUB_FILE_LIMIT)} only"
        for edge in edges
        if edge.nbytes > HUB_FILE_LIMIT
    ]
    plan = build_plan(
        model=model,
        target=page.name,
        options=choices,
        dtype=dtype,
        edges=edges,
        source=source,
        adapter=merging and merging.planned,
        lay_out=safetensors_output,
        max_shard_bytes=options.max_shard_bytes,
        warnings=tuple(warnings),
        dropped=checkpoint.dropped,
        tokenizer=tokenizer and PlannedTokenizer.of(tokenizer, _absolute(options.tokenizer)),
        run=run,
        accepted_keys=tuple(checkpoint.resolved.accepted),
        narrowed=narrowed,
        jobs=options.jobs,
        max_memory=options.max_memory,
    )
    _ = plan.memory_budget  # or it raises: the limit is too low
    demand_json(plan)
    return Prepared(plan, checkpoint, tokenizer, options, merging.adapter if merging else None)


def reopen(
    plan: Plan,
    checkpoint: str | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    allow_nonfinite: bool = False,
) -> Prepared:
    """Opens what a plan reads, which another process may have made.

    Args:
        plan: What to do.
        checkpoint: Where the checkpoint is; None where the plan says.
        overwrite: As in `ConvertOptions`.
        resume: As there.
        allow_nonfinite: As there.

    Raises:
        MemoryLimitError: The plan's limit is too low.
        NotACheckpointError: The source is not there.
        TensorError: It is not the one that was planned.
        TokenizerError: The tokenizer is not there, or not the one that was planned.
    """
    stored, beside = _opened(plan, checkpoint)
    tokenizer = None
    if (wanted := plan.tokenizer) is not None:
        length = plan.model.max_position_embeddings
        if wanted.option is not None:
            tokenizer = read_tokenizer(wanted.option, model_max_length=length)
        elif (sidecar := find_sidecar(stored.step, needed=True)) and sidecar.content.tokenizer:
            tokenizer = run_tokenizer(sidecar, model_max_length=length)
        if tokenizer is None or PlannedTokenizer.of(tokenizer, None).files != wanted.files:
            raise TokenizerError(
                f"the tokenizer {wanted.source} is not as it was when the plan was made; make the "
                "plan again"
            )
    _ = plan.memory_budget  # or it raises
    return Prepared(
        plan,
        stored,
        tokenizer,
        ConvertOptions(overwrite=overwrite, resume=resume, allow_nonfinite=allow_nonfinite),
        beside,
    )


def _opened(plan: Plan, checkpoint: str | None) -> tuple[StoredCheckpoint, StoredCheckpoint | None]:
    """What a plan reads: its source, and the adapter that is merged into it.

    Raises:
        TensorError: One is not as it was.
    """
    adapter = plan.adapter
    if adapter is None or not adapter.merged:
        part: Part = "model" if adapter is None else "adapter"
        return _as_planned(plan.source, part, checkpoint), None
    own = {name: i for name, i in plan.source.arrays.items() if name not in adapter.other.arrays}
    base = replace(plan.source, arrays=own)
    return _as_planned(base, "model alone", checkpoint), _as_planned(adapter.other, "adapter")


def _as_planned(planned: PlannedSource, part: Part, place: str | None = None) -> StoredCheckpoint:
    stored = open_stored(place or planned.path, part=part, allow_missing_chunks=planned.may_lack)
    found = (stored.metadata, stored.files, dict(stored.arrays.info))
    if found != (dict(planned.metadata), planned.files, dict(planned.arrays)):
        raise TensorError(
            f"{stored.step.items} is not as it was when the plan was made; make the plan again"
        )
    return stored


def _absolute(option: str | None) -> str | None:
    """`--tokenizer` for a process in another folder."""
    if option is None:
        return None
    with suppress(OSError, RuntimeError):  # no path, or ~name of no user
        path = Path(asked_set(option)[1]).expanduser()
        if path.exists():
            return option.removesuffix(asked_set(option)[1]) + str(path.absolute())
    return option


def _tokenizer(
    checkpoint: Checkpoint, options: ConvertOptions, length: int
) -> TokenizerFiles | None:
    """The tokenizer that the user names, else the run's own, else None."""
    spec = options.tokenizer or checkpoint.tokenizer
    if spec is None:
        return None
    with suppress(RuntimeError):  # ~name of no user, which read_tokenizer reports
        checkpoint.unchanged.watch(partial(fingerprints, Path(asked_set(spec)[1]).expanduser()))
    if options.tokenizer is not None:
        return read_tokenizer(spec, model_max_length=length)
    return checkpoint.read_tokenizer(length)


def _target(checkpoint: Checkpoint, model: ModelDescription, options: ConvertOptions) -> str:
    """The target that is asked for; by default the one that a converted checkpoint came from."""
    said = checkpoint.sidecar.content.target if checkpoint.sidecar is not None else None
    if options.target != "auto" or said not in {page.name for page in targets_of(model)}:
        return options.target
    return said


def _narrowed(checkpoint: Checkpoint) -> dict[str, str]:
    """What the sidecar of a converted checkpoint says of parameters that are wider than it was."""
    if checkpoint.sidecar is None:
        return {}
    said = checkpoint.sidecar.content.narrowed
    return {
        n: said[n]
        for n, info in checkpoint.arrays.info.items()
        if n in said and info.dtype == "float32"
    }


def _run(checkpoint: Checkpoint, options: ConvertOptions) -> tuple[RunRecord | None, Sequence[str]]:
    """The run's record of its training, and warnings about what could not be read."""
    sidecar = checkpoint.sidecar.content if checkpoint.sidecar else None
    run, unread = read_run(checkpoint.step, sidecar)
    if options.tokenizer is not None and run is not None and run.facts is not None:
        # Of its own tokenizer, which this may not be.
        facts = run.facts.model_copy(update={"tokenizer_license": None})
        run = run.model_copy(update={"facts": facts})
    return run, unread


def _with_token_ids(model: ModelDescription, tokenizer: TokenizerFiles) -> ModelDescription:
    """Token ids that no config gives come from the tokenizer."""
    where = Provenance(Origin.TOKENIZER, tokenizer.source)
    found = {
        name: ids for name, ids in tokenizer.token_ids().items() if getattr(model, name) is None
    }
    sources = {**model.sources, **dict.fromkeys(found, where)}
    return replace(model, **found, sources=sources)
