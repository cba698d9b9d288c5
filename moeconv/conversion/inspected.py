"""A Hugging Face model as moeconv understands it, and whether MaxText can hold it."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeconv.conversion.incoming import model_files, plan_incoming
from moeconv.conversion.options import ConvertOptions
from moeconv.errors import MoeconvError, StorageError, UsageError
from moeconv.hf.model import HfModel, open_model
from moeconv.planning.orbax_output import OrbaxOutput
from moeconv.planning.plan import Plan
from moeconv.printing import Printable, fold
from moeconv.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


@dataclass(frozen=True)
class Model(Printable):
    """A Hugging Face model, its headers read.

    Attributes:
        hf: What is stored.
        plan: What convert would do; None where it refuses.
        refusal: Why it refuses; None where it does not.
    """

    hf: HfModel
    plan: Plan | None
    refusal: str | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Things to know before converting, a sentence each."""
        return self.plan.warnings if self.plan is not None else ()

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv inspect --json` prints."""
        tensors, plan = self.hf.tensors, self.plan
        sizes = self.hf.files.sizes()
        quantised = self.hf.config.get("quantization_config")
        return {
            "model": self.hf.name,
            "kind": "Hugging Face model",
            "architectures": self.hf.config.get("architectures"),
            "model_type": self.hf.config.get("model_type"),
            "quantization": quantised.get("quant_method") if isinstance(quantised, dict) else None,
            "num_parameters": sum(math.prod(each.spec.shape) for each in tensors.values()),
            "bytes": sum(each.spec.nbytes for each in tensors.values()),
            "dtypes": dict(Counter(each.spec.dtype for each in tensors.values())),
            "files": {name: sizes[name] for name in sorted(sizes)},
            "converts": plan is not None,
            "refusals": [] if self.refusal is None else [self.refusal],
            "decoder_block": None if plan is None else plan.model.decoder_block,
            "scan_layers": plan.output.scan_layers
            if plan is not None and isinstance(plan.output, OrbaxOutput)
            else None,
            "tokenizer": plan.tokenizer.source if plan is not None and plan.tokenizer else None,
            "fields": _fields(plan),
            "left_out": {} if plan is None else dict(plan.dropped),
            "warnings": list(self.warnings),
            "tensors": [
                {
                    "name": name,
                    "shape": list(each.spec.shape),
                    "dtype": each.spec.dtype,
                    "file": each.file,
                    "bytes": each.spec.nbytes,
                }
                for name, each in tensors.items()
            ],
        }

    def parts(self) -> "Iterator[RenderableType]":
        """What `moeconv inspect` prints, without the warnings."""
        report = self.as_dict()
        named = report["architectures"]
        yield f"{report['model']}: Hugging Face model"
        yield ", ".join(map(str, named)) if isinstance(named, list) else f"architectures: {named}"
        yield f"{report['num_parameters']:,} parameters, {format_size(report['bytes'])}"
        dtypes = ", ".join(f"{name} ({count})" for name, count in report["dtypes"].items())
        quantised = report["quantization"]
        yield f"tensors: {dtypes}" + (f"; quantised by {quantised}" if quantised else "")
        if report["tokenizer"]:
            yield f"tokenizer: {report['tokenizer']}"
        if report["fields"]:
            yield ""
            yield _table("model", ("field", "value", "source"), _rows(report["fields"]))
        yield ""
        files = [(name, format_size(size)) for name, size in report["files"].items()]
        yield _table("files", ("name", "size"), [(n, s) for n, s, _ in fold(files)])
        yield ""
        each = [(t["name"], (str(t["shape"]), t["dtype"])) for t in report["tensors"]]
        rows = [(name, *rest) for name, rest, _ in fold(each)]
        yield _table("tensors", ("name", "shape", "dtype"), rows)
        yield ""
        if self.refusal is not None:
            yield f"cannot be converted to MaxText: {self.refusal}"
            return
        layers = "stacked" if report["scan_layers"] else "one by one"
        yield (
            f"becomes MaxText's {report['decoder_block']}, layers {layers}; convert with: moeconv "
            "convert SRC OUT"
        )


def _rows(fields: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    for name, field in fields.items():
        value = field["value"]
        shown = " ".join(map(str, value)) if name == "layer_kinds" else str(value)
        yield name, shown, field["source"] or ""


def _table(title: str, headings: Sequence[str], rows: Iterable[tuple[str, ...]]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _fields(plan: Plan | None) -> dict[str, dict[str, Any]]:
    """Every field of the model that has a value, with what it was read from."""
    if plan is None:
        return {}
    sources = plan.model.sources
    return {
        name: {"value": value, "source": str(sources[name]) if name in sources else None}
        for name, value in plan.model.values().items()
        if value is not None
    }


def inspect_model(source: str, *, accept: Sequence[str] = (), others: bool = False) -> Model | None:
    """Reads the metadata of a Hugging Face model.

    Args:
        source: A folder, or `hf://namespace/name[@revision]`.
        accept: Keys of its config.json that moeconv does not know, and that decide nothing.
        others: Options of a MaxText checkpoint were given.

    Returns:
        The model; None where the source is none.

    Raises:
        MoeconvError: It cannot be read; why it would not convert is in `Model.refusal`.
    """
    if (files := model_files(source)) is None:
        return None
    if others:
        raise UsageError(
            f"--config and --set describe a MaxText checkpoint; {files.name} has a config.json"
        )
    with files.connected():
        hf = open_model(files)
        try:
            plan = plan_incoming(files, ConvertOptions(accept=accept), hf).plan
        except StorageError:
            raise
        except MoeconvError as error:
            return Model(hf, None, str(error))
    return Model(hf, plan, None)
