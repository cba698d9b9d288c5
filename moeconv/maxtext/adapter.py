"""A checkpoint of a LoRA adapter, alone or beside its base model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv.arch.config_sources import ResolvedConfig, resolve_config
from moeconv.maxtext.checkpoint import (
    Checkpoint,
    StoredCheckpoint,
    find_sidecar,
    open_checkpoint,
    open_stored,
)
from moeconv.maxtext.lora import Factors, factors_of, recorded
from moeconv.maxtext.run_config import run_config, said_of
from moeconv.orbax.locate import locate
from moeconv.orbax.metadata import read_tree
from moeconv.printing import Printable, fold
from moeconv.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Adapter(Printable):
    """An adapter as it is stored; the model that it changes is another checkpoint's.

    Attributes:
        stored: Its factors alone.
        resolved: The run's config and flags.
        notes: Warnings.
    """

    stored: StoredCheckpoint
    resolved: ResolvedConfig
    notes: tuple[str, ...]

    @cached_property
    def factors(self) -> Factors:
        """The two factors of each parameter."""
        return factors_of(self.stored.arrays.info)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Things to know before converting, a sentence each."""
        return self.notes

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv inspect --json` prints."""
        step, infos = self.stored.step, self.stored.arrays.info.values()
        said = [{"source": where, **content} for content, where in recorded(step, self.resolved)]
        return {
            "checkpoint": str(step.items),
            "step": step.number,
            "skipped_steps": list(step.skipped),
            "kind": "LoRA adapter",
            "left_alone": list(self.stored.tree.others),
            "format": self.stored.tree.describe(),
            "adapter": {
                "changes": [".".join(path) for path in self.factors],
                "recorded": said,
            },
            "bytes": sum(info.nbytes for info in infos),
            "warnings": list(self.warnings),
            "parameters": [
                {"name": info.name, "shape": list(info.shape), "dtype": info.dtype,
                 "bytes": info.nbytes}
                for info in infos
            ],
        }  # fmt: skip

    def parts(self) -> "Iterator[RenderableType]":
        """What `moeconv inspect` prints, without the warnings."""
        from rich.table import Table

        report = self.as_dict()
        step = f", step {report['step']}" if report["step"] is not None else ""
        yield f"{report['checkpoint']}{step}"
        yield "a LoRA adapter and no model, as MaxText saves a LoRA training"
        for said in report["adapter"]["recorded"]:
            facts = [
                f"{key} {said[key]}" for key in ("lora_rank", "r", "lora_alpha") if key in said
            ]
            yield f"{', '.join(facts)} ({said['source']})"
        if not report["adapter"]["recorded"]:
            yield "its alpha is not recorded; give it with --set lora_alpha=ALPHA"
        yield (
            f"{len(self.factors)} parameters are changed, "
            f"{len(report['parameters'])} matrices, {format_size(report['bytes'])}"
        )
        table = Table(title="factors", title_justify="left", box=None, pad_edge=False)
        for heading in ("name", "shape", "dtype"):
            table.add_column(heading, overflow="fold")
        rows = [(p["name"], (str(p["shape"]), p["dtype"])) for p in report["parameters"]]
        for name, rest, _ in fold(rows):
            table.add_row(name, *rest)
        yield ""
        yield table
        yield ""
        yield (
            "for PEFT, convert with: moeconv convert CKPT OUT --base BASE, where BASE is the "
            "MaxText checkpoint that it was trained on"
        )
        yield "merged: moeconv convert BASE OUT --merge-lora CKPT"


def open_adapter(
    spec: str,
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    accept: Sequence[str] = (),
    allow_missing_chunks: bool = False,
) -> Adapter:
    """Opens the adapter in a checkpoint; the arguments are those of `open_checkpoint`.

    Raises:
        NotACheckpointError: There is no complete checkpoint, or no adapter in it.
        ConfigError: The config cannot be read.
        TensorError: A factor lacks the other, or is damaged.
        UnsupportedError: A dtype or compression is not supported.
    """
    stored = open_stored(spec, part="adapter", allow_missing_chunks=allow_missing_chunks)
    sidecar = find_sidecar(stored.step, needed=config is None)
    content, provenance = run_config(config, sidecar, stored.step)
    said = said_of(content, provenance, given=config is not None)
    resolved = resolve_config(content, provenance, sets, accept)
    return Adapter(stored, resolved, (*stored.notes, *said))


def open_any(
    spec: str, *, config: Path | None, sets: Sequence[str], accept: Sequence[str]
) -> Checkpoint | Adapter:
    """What `moeconv inspect` shows: a model, also one with an adapter beside it, or an adapter.

    Raises:
        MoeconvError: As `open_checkpoint` and `open_adapter`.
    """
    tree = read_tree(locate(spec).items)
    if tree.adapters and len(tree.adapters) == len(tree.model):
        return open_adapter(spec, config=config, sets=sets, accept=accept)
    both = bool(tree.adapters)
    return open_checkpoint(spec, config=config, sets=sets, accept=accept, beside_adapter=both)
