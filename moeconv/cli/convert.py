"""`moeconv convert`: from what MaxText wrote to a model that loads anywhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from moeconv.cli.options import (
    ACCEPT,
    CONFIG,
    JOBS,
    JSON,
    QUIET,
    SET,
    LocalPath,
    Mesh,
    output_of,
    tell_of_store,
)
from moeconv.cli.streams import interruptible

if TYPE_CHECKING:
    from moeconv.api.convert import PlanOptions
    from moeconv.planning.plan import Plan


@click.command("convert")
@click.argument("ckpt", metavar="SRC", required=False)
@click.argument("out", metavar="OUT", required=False)
@click.option(
    "--plan",
    "plan_file",
    type=LocalPath(dir_okay=False),
    help="Carry out a plan that --dry-run --json has printed; it decides the output. CKPT is only "
    "needed where the checkpoint was moved.",
)
@CONFIG
@SET
@ACCEPT
@click.option(
    "--target",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Architecture of the output, as docs/mapping.md names it; auto: the decoder block's own.",
)
@click.option(
    "--dtype",
    default="keep",
    show_default=True,
    metavar="keep|float32|bfloat16|float16",
    help="Dtype of the weights.",
)
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Largest safetensors file.",
)
@click.option("--untie", is_flag=True, help="Write an explicit output head for a tied model.")
@click.option(
    "--tokenizer",
    metavar="PATH_OR_ID",
    help="A tokenizer directory, a sentencepiece model, tiktoken ranks, or a Hub id "
    "(with HF_TOKEN from the environment). Default: the one the run's moeconv_run.json names.",
)
@click.option(
    "--base",
    metavar="CKPT",
    help="Convert the LoRA adapter in CKPT for PEFT; this is the MaxText checkpoint that it was "
    "trained on, which may be the same.",
)
@click.option(
    "--base-model",
    metavar="PATH_OR_ID",
    help="With --base: what PEFT loads as the converted base.",
)
@click.option(
    "--merge-lora",
    metavar="CKPT",
    help="Merge the LoRA adapter in this checkpoint into the model: alpha / rank times the product "
    "of its factors is added to each weight that it changes, and rounded once.",
)
@click.option(
    "--block",
    metavar="NAME",
    help="To MaxText: the decoder block. Default: the first that holds the model exactly.",
)
@click.option(
    "--scan-layers/--no-scan-layers",
    default=None,
    help="To MaxText: layers stacked in one array, or one array each. Default: stacked where "
    "MaxText can hold the model so.",
)
@click.option(
    "--scan-axis",
    type=click.IntRange(0, 4),
    default=1,
    show_default=True,
    help="To MaxText: the axis of stacked layers (param_scan_axis).",
)
@click.option(
    "--shards",
    type=Mesh(),
    metavar="AXIS=N,…",
    help="To MaxText: the mesh that will read the checkpoint, such as fsdp=8,expert=4; each of its "
    "devices reads only its own chunks.",
)
@click.option("--zarr2", is_flag=True, help="To MaxText: zarr v2, for readers older than v3.")
@click.option(
    "--ocdbt/--no-ocdbt",
    default=True,
    help="To MaxText: all arrays in one OCDBT database (default), or a folder each.",
)
@JOBS
@click.option(
    "--max-memory",
    default="4GiB",
    show_default=True,
    metavar="SIZE",
    help="Memory to stay within.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace the model in OUT once the new one is whole."
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted conversion to OUT.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--allow-nonfinite", is_flag=True, help="Copy NaN and Inf instead of refusing them.")
@click.option(
    "--allow-missing-chunks",
    is_flag=True,
    help="Read chunks that an old checkpoint does not store as zeros instead of refusing them.",
)
@JSON
@QUIET
@click.pass_context
def command(
    ctx: click.Context,
    /,
    ckpt: str | None,
    out: str | None,
    plan_file: Path | None,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    allow_nonfinite: bool,
    json_mode: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Convert a MaxText checkpoint to a Hugging Face model, or such a model to a MaxText run.

    What SRC is decides. A checkpoint is a run directory, its checkpoints/, a step, a step's items/,
    or a gs://, s3:// or http:// address of one; the newest complete step is taken unless one is
    named. A model is a folder with config.json and safetensors, or hf://namespace/name[@revision],
    of which only what is needed is downloaded. OUT appears whole or not at all.
    """
    from moeconv.api.convert import convert, load_plan, plan, with_limits
    from moeconv.artifact.destination import resolve_out

    output = output_of(json_mode, quiet)
    if plan_file is not None and out is None:
        ckpt, out = None, ckpt
    if (ckpt is None and plan_file is None) or (out is None and not dry_run):
        raise click.UsageError("give SRC and OUT, or --plan FILE and OUT", ctx)
    planned: Plan | None = None
    if plan_file is not None:
        planned = with_limits(load_plan(plan_file), _of_the_machine(ctx, options))
        options = {}
    tell_of_store(output, ckpt or (planned.source.path if planned is not None else ""))
    place = None if out is None else LocalPath().convert(out, None, ctx)
    if place is not None:
        resolve_out(place)  # before minutes of work
    if dry_run or place is None:
        planned = planned or plan(str(ckpt), **options)
        for text in planned.warnings:
            output.warn(text)
        output.answer(planned)
        return

    @contextmanager
    def progress(read_bytes: int, write_bytes: int) -> Iterator[Callable[[int, int], None]]:
        with (
            interruptible(f"{out} is untouched; go on with --resume"),
            output.progress(read_bytes, write_bytes) as meter,
        ):
            yield meter

    output.answer(
        convert(
            planned or str(ckpt),
            place,
            checkpoint=ckpt if planned is not None else None,
            overwrite=overwrite,
            resume=resume,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            note=output.note,
            **options,
        )
    )


def _of_the_machine(ctx: click.Context, options: dict[str, Any]) -> "PlanOptions":
    """The options that were given, of those that may still be given to a plan.

    Raises:
        click.UsageError: Another was given.
    """
    default = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    given = {n: v for n, v in options.items() if ctx.get_parameter_source(n) not in default}
    decided = given.keys() - {"jobs", "max_memory"}
    if flags := [param.opts[0] for param in ctx.command.params if param.name in decided]:
        raise click.UsageError(f"{', '.join(flags)}: decided by the plan; make another", ctx)
    return cast("PlanOptions", given)
