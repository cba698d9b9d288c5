"""`moeconv inspect`: the model as moeconv understands it, and what still has to be told."""

import math
from pathlib import Path
from typing import Any

import click

from moeconv.cli.options import ACCEPT, CKPT, CONFIG, JSON, SET, output_of, tell_of_store
from moeconv.cli.output import Output
from moeconv.cli.tables import fold


@click.command("inspect")
@CKPT
@CONFIG
@SET
@ACCEPT
@JSON
def command(
    ckpt: str,
    config: Path | None,
    sets: tuple[str, ...],
    accept: tuple[str, ...],
    json_mode: bool,
) -> None:
    """Show a MaxText checkpoint as moeconv understands it.

    CKPT is a run directory, its checkpoints/, a step, a step's items/, or a gs://, s3:// or http://
    address of one; the newest complete step is taken unless one is named.
    """
    from moeconv.maxtext.checkpoint import open_checkpoint

    output = output_of(json_mode)
    tell_of_store(output, ckpt)
    checkpoint = open_checkpoint(ckpt, config=config, sets=sets, accept=accept)
    report = _report(checkpoint)
    output.data(report)
    if not json_mode:
        _print(output, report)


def _report(checkpoint: Any) -> dict[str, Any]:

    resolution, arrays = checkpoint.resolution, checkpoint.arrays
    fields = {
        name: {"value": _plain(value), "source": _source(resolution, name)}
        for name, value in resolution.known.items()
        if value is not None and name in resolution.sources
    }
    layers = resolution.known["layer_kinds"]
    fields["num_hidden_layers"] = {
        "value": len(layers),
        "source": _source(resolution, "layer_kinds"),
    }
    fields["moe_layers"] = {
        "value": [n for n, kind in enumerate(layers) if kind.mlp == "moe"],
        "source": _source(resolution, "layer_kinds"),
    }
    parameters = [
        {
            "name": info.name,
            "shape": list(info.shape),
            "dtype": info.dtype,
            "chunk": list(info.chunk),
            "chunks": math.prod(info.grid),
            "codec": info.codec,
            "bytes": info.nbytes,
        }
        for info in arrays.info.values()
    ]
    return {
        "checkpoint": str(checkpoint.step.items),
        "step": checkpoint.step.number,
        "skipped_steps": list(checkpoint.step.skipped),
        "kind": "train state" if checkpoint.tree.is_train_state else "parameters only",
        "left_alone": list(checkpoint.tree.others),
        "format": checkpoint.tree.describe(),
        "layout": checkpoint.layout.describe(),
        "sidecar": str(checkpoint.sidecar[1] / "moeconv.json") if checkpoint.sidecar else None,
        "tokenizer": checkpoint.tokenizer,
        "num_parameters": sum(math.prod(i.shape) for i in arrays.info.values()),
        "bytes": sum(i.nbytes for i in arrays.info.values()),
        "fields": fields,
        "missing": list(resolution.missing),
        "refusals": list(resolution.refusals),
        "warnings": list(resolution.warnings),
        "dropped": dict(checkpoint.dropped),
        "parameters": parameters,
    }


def _plain(value: Any) -> Any:
    return [str(v) for v in value] if isinstance(value, tuple) else value


def _source(resolution: Any, name: str) -> str | None:
    source = resolution.sources.get(name)
    return str(source) if source is not None else None


def _print(output: Output, report: dict[str, Any]) -> None:
    from rich.table import Table

    from moeconv.arch.resolve import missing_message
    from moeconv.sizes import format_size

    step = f", step {report['step']}" if report["step"] is not None else ""
    output.print(f"{report['checkpoint']}{step}")
    others = f" (left alone: {', '.join(report['left_alone'])})" if report["left_alone"] else ""
    output.print(f"{report['kind']}{others}, {report['format']}, {report['layout']}")
    count = report["num_parameters"]
    output.print(f"{count:,} parameters, {format_size(report['bytes'])}")
    if report["tokenizer"]:
        output.print(f"tokenizer: {report['tokenizer']}")

    table = Table(title="model", title_justify="left", box=None, pad_edge=False)
    for heading in ("field", "value", "told by"):
        table.add_column(heading, overflow="fold")
    for name, field in report["fields"].items():
        value = field["value"]
        if name == "layer_kinds":
            value = " ".join(value)
        table.add_row(name, str(value), field["source"] or "")
    output.print()
    output.print(table)

    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "shape", "dtype", "chunks", "codec"):
        table.add_column(heading, overflow="fold")
    rows = [
        (
            p["name"],
            (str(p["shape"]), p["dtype"], f"{p['chunks']} of {p['chunk']}", p["codec"]),
        )
        for p in report["parameters"]
    ]
    for name, rest, _ in fold(rows):
        table.add_row(name, *rest)
    output.print()
    output.print(table)

    for text in report["warnings"]:
        output.warn(text)
    for name, why in report["dropped"].items():
        output.warn(f"{name} is left out: {why}")
    output.print()
    if report["refusals"]:
        output.print("cannot be converted exactly: " + "; ".join(report["refusals"]))
    if report["missing"]:
        output.print(missing_message(report["missing"]))
    if not report["refusals"] and not report["missing"]:
        output.print("nothing more has to be told; convert with: moeconv convert CKPT OUT")
