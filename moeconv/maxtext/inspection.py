"""A checkpoint as moeconv understands it: as data, and as lines and tables for people."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moeconv.arch.resolve import Resolution, missing_message
from moeconv.errors import TensorError, UnsupportedError
from moeconv.families import target_for
from moeconv.mapping.edges import expand
from moeconv.maxtext.facts import facts_of
from moeconv.printing import fold
from moeconv.sizes import format_size
from moeconv.tensor.dtypes import DTYPES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moeconv.maxtext.checkpoint import Checkpoint


def as_dict(checkpoint: "Checkpoint") -> dict[str, Any]:
    """Where it is, how it is stored, every field of the model with its source, every parameter."""
    resolution, infos = checkpoint.resolution, checkpoint.arrays.info.values()
    sidecar = checkpoint.sidecar
    return {
        "checkpoint": str(checkpoint.step.items),
        "step": checkpoint.step.number,
        "skipped_steps": list(checkpoint.step.skipped),
        "what": facts_of(checkpoint).as_dict(),
        "kind": "train state" if checkpoint.tree.is_train_state else "parameters only",
        "left_alone": list(checkpoint.tree.others),
        "adapter_matrices": checkpoint.tree.left_adapters,
        "format": checkpoint.tree.describe(),
        "layout": checkpoint.layout.describe(),
        "sidecar": sidecar.path if sidecar else None,
        "tokenizer": checkpoint.tokenizer,
        "num_parameters": sum(math.prod(info.shape) for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "fields": _fields(resolution),
        "missing": list(resolution.missing),
        "refusals": _refusals(checkpoint),
        "warnings": list(resolution.warnings),
        "dropped": dict(checkpoint.dropped),
        "parameters": [
            {
                "name": info.name,
                "shape": list(info.shape),
                "dtype": info.dtype,
                "chunk": list(info.chunk),
                "chunks": math.prod(info.grid),
                "codec": info.codec,
                "bytes": info.nbytes,
            }
            for info in infos
        ],
    }


def _refusals(checkpoint: "Checkpoint") -> list[str]:
    """Why it cannot be converted, also where all settings are known."""
    resolution = checkpoint.resolution
    if resolution.refusals or resolution.missing:
        return list(resolution.refusals)
    dtypes = {name: info.dtype for name, info in checkpoint.arrays.info.items()}
    try:
        model = resolution.model()
        target = target_for(model)
        if not DTYPES.keys() >= {*dtypes.values()}:  # quantised: whether with scales, rules know
            expand(target, model, checkpoint.layout, dtypes)
    except (UnsupportedError, TensorError) as error:
        return [str(error)]
    return []


def _fields(resolution: Resolution) -> dict[str, dict[str, Any]]:
    """Every known field of the model, with what it was read from."""
    layers = resolution.known["layer_kinds"]
    values = {
        name: [str(each) for each in value] if isinstance(value, tuple) else value
        for name, value in resolution.known.items()
        if value is not None and name in resolution.sources
    }
    values["num_hidden_layers"] = len(layers)
    values["moe_layers"] = [n for n, kind in enumerate(layers) if kind.mlp == "moe"]
    sources = {name: str(source) for name, source in resolution.sources.items()}
    by_layers = sources.get("layer_kinds")
    sources |= {} if by_layers is None else dict.fromkeys(_OF_LAYERS, by_layers)
    return {name: {"value": value, "source": sources.get(name)} for name, value in values.items()}


_OF_LAYERS = ("num_hidden_layers", "moe_layers")  # follow from the kinds of the layers


def parts(checkpoint: "Checkpoint") -> "Iterator[RenderableType]":
    """The same for people, and what is still missing before it can be converted."""
    from rich.table import Table

    report = as_dict(checkpoint)
    step = f", step {report['step']}" if report["step"] is not None else ""
    yield f"{report['checkpoint']}{step}"
    yield from facts_of(checkpoint).lines()
    yield f"{report['num_parameters']:,} parameters, {format_size(report['bytes'])}"
    if report["tokenizer"]:
        yield f"tokenizer: {report['tokenizer']}"

    table = Table(title="model", title_justify="left", box=None, pad_edge=False)
    for heading in ("field", "value", "source"):
        table.add_column(heading, overflow="fold")
    for name, field in report["fields"].items():
        value = field["value"]
        if name == "layer_kinds":
            value = " ".join(value)
        table.add_row(name, str(value), field["source"] or "")
    yield ""
    yield table

    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "shape", "dtype", "chunks", "codec"):
        table.add_column(heading, overflow="fold")
    rows = [
        (p["name"], (str(p["shape"]), p["dtype"], f"{p['chunks']} of {p['chunk']}", p["codec"]))
        for p in report["parameters"]
    ]
    for name, rest, _ in fold(rows):
        table.add_row(name, *rest)
    yield ""
    yield table
    yield ""
    if report["refusals"]:
        yield "cannot be converted exactly: " + "; ".join(report["refusals"])
    if report["missing"]:
        yield missing_message(report["missing"], checkpoint.resolution.doubts)
    if count := report["adapter_matrices"]:
        yield (
            f"it holds a LoRA adapter as well ({count} matrices); for the merged model convert "
            "with --merge-lora CKPT, for the adapter alone, for PEFT, with --base CKPT"
        )
    elif not report["refusals"] and not report["missing"]:
        yield "nothing is missing; convert with: moeconv convert CKPT OUT"
