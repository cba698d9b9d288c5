"""Converting, in two steps: a plan is prepared, then carried out; what both CLI and Python call."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from moeconv.artifact.destination import resolve_out
from moeconv.artifact.manifest import MANIFEST_NAME, Manifest
from moeconv.conversion.contents import make_manifest, small_files
from moeconv.conversion.options import ConvertOptions, Input, Prepared
from moeconv.conversion.prepare import plan_conversion, reopen
from moeconv.errors import (
    NotACheckpointError,
    OutputError,
    StorageError,
    TensorError,
)
from moeconv.execution.engine import Engine, Result
from moeconv.execution.journal import Journal
from moeconv.execution.memory import resident_bytes
from moeconv.execution.mover import Progress
from moeconv.execution.staging import Staging
from moeconv.planning.estimate import IMPORT_BYTES


def convert(
    prepared: Prepared,
    out: Path,
    *,
    progress: Progress = lambda read, written: None,
    note: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Carries out a planned conversion; OUT appears whole, or not at all.

    Args:
        prepared: From `plan_conversion`, or `reopen`.
        out: Directory to make.
        progress: Called with bytes read and bytes written, from any thread.
        note: Called with sentences for people.

    Raises:
        MoeconvError: Nothing is left behind, but for storage errors and interruptions, after which
            `resume` goes on.
    """
    with ExitStack() as stack:
        for read in prepared.read:
            out = _place(out, read)
            stack.enter_context(read.connected())
        return _convert(prepared, out, progress, note)


def _convert(
    prepared: Prepared, out: Path, progress: Progress, note: Callable[[str], None]
) -> Manifest:
    """The same, to a place that is outside of what is read."""
    options = prepared.options
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
    staging.check_space(plan.estimate.disk_bytes)
    try:
        journal = Journal(
            staging.folder,
            _identity(prepared),
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
        prepared.arrays,
        staging.folder,
        jobs=plan.jobs,
        # What was set aside for the interpreter and is not used yet will be.
        memory=plan.memory_budget - max(resident_bytes(), IMPORT_BYTES),
        journal=journal,
        allow_nonfinite=options.allow_nonfinite,
        progress=progress,
        note=note,
    )
    try:
        result = engine.run()
    except (NotACheckpointError, TensorError):
        prepared.demand_unchanged()  # what is damaged now may be half of another save
        raise
    finally:
        journal.close()
    prepared.demand_unchanged()
    for text in result.warnings:
        note(f"warning: {text}")
    return _write_the_rest(prepared, staging, result)


def _identity(prepared: Prepared) -> str:
    """What a resumed conversion must share with the one that was interrupted.

    It must not take over units that were let pass.
    """
    options = prepared.options
    identity = prepared.plan.digest
    identity += f", NaN and Inf {'copied' if options.allow_nonfinite else 'refused'}"
    for source in prepared.read:
        if source.files is not None:
            identity += f", files {source.files}"
    if prepared.plan.source.may_lack:
        identity += ", missing chunks read as zeros"
    return identity


def _write_the_rest(prepared: Prepared, staging: Staging, result: Result) -> Manifest:
    files = small_files(prepared.plan, prepared.tokenizer)
    staging.write(files)
    manifest = make_manifest(prepared.plan, result, files)
    staging.write({MANIFEST_NAME: manifest.to_json()})
    return manifest


def _place(out: Path, source: Input) -> Path:
    """OUT as an absolute path without symbolic links, outside of what is read."""
    place = resolve_out(out)
    for inside in source.folders[:1]:
        if place in inside.parents:
            raise OutputError(f"OUT {out} contains the source {inside}; choose another directory")
    for inside in source.folders:
        if place == inside or inside in place.parents:
            raise OutputError(
                f"OUT {out} is inside the source {inside}; choose a directory outside of it"
            )
    return place


__all__ = ["ConvertOptions", "Prepared", "convert", "plan_conversion", "reopen"]
