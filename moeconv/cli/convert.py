"""`moeconv convert`: from what MaxText wrote to a model that loads anywhere."""

import os
import sys
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
from moeconv.cli.output import Output
from moeconv.cli.streams import say
from moeconv.cli.tables import fold


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
    help="A tokenizer directory, a sentencepiece model, tiktoken ranks, or a Hub id "
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
def command(ckpt: str, out: Path, json_mode: bool, quiet: bool, **options: Any) -> None:
    """Convert a MaxText checkpoint to a Hugging Face model.

    CKPT is a run directory, its checkpoints/, a step, a step's items/, or a gs://, s3:// or http://
    address of one; the newest complete step is taken unless one is named. OUT appears whole or not
    at all.
    """
    from moeconv.artifact.destination import resolve_out
    from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
    from moeconv.sizes import format_size, parse_file_size, parse_size

    output = output_of(json_mode, quiet)
    dry_run = options.pop("dry_run")
    settings = ConvertOptions(
        max_shard_bytes=parse_file_size(options.pop("max_shard_size")),
        max_memory=parse_size(options.pop("max_memory")),
        **options,
    )
    resolve_out(out)  # before minutes of work
    tell_of_store(output, ckpt)
    prepared = plan_conversion(ckpt, settings)
    plan = prepared.plan
    for text in plan.warnings:
        output.warn(text)
    if dry_run:
        report = describe_plan(prepared)
        output.data(report)
        if not json_mode:
            _print_plan(output, report)
        return
    try:
        with output.progress(plan.read_bytes, plan.tensor_bytes) as meter:
            manifest = convert(prepared, out, progress=meter, note=output.note)
    except KeyboardInterrupt:
        say(f"interrupted: {out} is untouched; go on with --resume")
        sys.exit(130)
    output.data({"out": str(out), **manifest.model_dump(mode="json")})
    size = sum(f.size for f in manifest.files.values())
    output.print(
        f"{out}: {plan.family.architecture}, {len(plan.edges)} tensors, {format_size(size)}"
    )
    for fold_ in manifest.folds:
        exact = "exact" if fold_.exact else "rounded once"
        output.print(f"folded {fold_.factor} into {fold_.target} ({exact})")


def describe_plan(prepared: Any) -> dict[str, Any]:
    """The plan as data."""
    plan, options = prepared.plan, prepared.options
    tensors = [
        {
            "name": edge.target,
            "shape": list(edge.shape),
            "dtype": edge.dtype,
            "sources": [part.source.name for part in edge.parts],
            "ops": edge.steps(),
            "summary": edge.describe(),
            "error_bound": edge.bound(),
            "file": plan.files[plan.places[name].file].name,
            "offset": plan.places[name].offset,
            "bytes": edge.nbytes,
        }
        for name, edge in plan.edges.items()
    ]
    return {
        "target": plan.family.name,
        "architecture": plan.family.architecture,
        "digest": plan.digest,
        "tensors": tensors,
        "files": [{"name": f.name, "bytes": f.layout.size} for f in plan.files],
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "disk_bytes": plan.disk_bytes,
        "memory_floor": plan.memory_floor,
        "memory_budget": plan.memory_budget(options.max_memory, options.jobs),
        "units": len(plan.units),
        "warnings": list(plan.warnings),
        "dropped": dict(plan.dropped),
    }


def _print_plan(output: Output, report: dict[str, Any]) -> None:
    from rich.table import Table

    from moeconv.sizes import format_size

    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "shape", "dtype", "from", "by", "exact"):
        table.add_column(heading, overflow="fold")
    rows = []
    for tensor in report["tensors"]:
        bound = tensor["error_bound"]
        exact = "yes" if bound == 0 else f"within {bound:.1g}"
        sources = " + ".join(tensor["sources"]) or "—"
        rest = (str(tensor["shape"]), tensor["dtype"], sources, tensor["summary"])
        rows.append((tensor["name"], (*rest, exact)))
    for name, line, _ in fold(rows):
        table.add_row(name, *line)
    output.print(f"{report['architecture']}, {len(report['tensors'])} tensors")
    output.print(table)
    output.print()
    for file in report["files"]:
        output.print(f"{file['name']}  {format_size(file['bytes'])}")
    output.print(
        f"reads {format_size(report['read_bytes'])} in {report['units']} units, writes "
        f"{format_size(report['write_bytes'])}; disk {format_size(report['disk_bytes'])}"
        + (f" (scratch {format_size(report['scratch_bytes'])})" if report["scratch_bytes"] else "")
    )
    output.print(
        f"memory: at most {format_size(report['memory_budget'])}, at least "
        f"{format_size(report['memory_floor'])}"
    )
