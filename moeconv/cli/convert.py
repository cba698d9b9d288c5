"""`moeconv convert`: from what MaxText wrote to a model that loads anywhere."""

import os
from pathlib import Path
from typing import Any

import click

from moeconv.cli.options import (
    ACCEPT,
    CKPT,
    CONFIG,
    JSON,
    QUIET,
    SET,
    LocalPath,
    output_of,
    tell_of_store,
)
from moeconv.cli.streams import interruptible


@click.command("convert")
@CKPT
@click.argument("out", metavar="OUT", type=LocalPath())
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
    help="A tokenizer directory, a file of tiktoken ranks (Llama 3), or a Hub id "
    "(with HF_TOKEN from the environment). Default: the one the run's moeconv.json names.",
)
@click.option(
    "--jobs",
    type=int,
    default=lambda: os.cpu_count() or 1,
    show_default="number of processors",
    metavar="N",
    help="Chunks worked on at the same time; the bytes written do not depend on it.",
)
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
def command(
    ckpt: str,
    out: Path,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    allow_nonfinite: bool,
    json_mode: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Convert a MaxText checkpoint to a Hugging Face model.

    CKPT is a run directory, its checkpoints/, a step, a step's items/, or a gs://, s3:// or http://
    address of one; the newest complete step is taken unless one is named. OUT appears whole or not
    at all.
    """
    from moeconv.api.convert import convert, plan
    from moeconv.artifact.destination import resolve_out

    output = output_of(json_mode, quiet)
    resolve_out(out)  # before minutes of work
    tell_of_store(output, ckpt)
    planned = plan(ckpt, **options)
    for text in planned.warnings:
        output.warn(text)
    if dry_run:
        output.answer(planned)
        return
    with interruptible(f"{out} is untouched; go on with --resume"):
        made = convert(
            planned,
            out,
            overwrite=overwrite,
            resume=resume,
            allow_nonfinite=allow_nonfinite,
            progress=output.progress,
            note=output.note,
        )
    output.answer(made)
