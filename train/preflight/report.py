"""What the checks found: a pydantic model, printed as a table or as JSON."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from rich.console import Group

Status = Literal["ok", "note", "mended", "warn", "refused", "skipped"]

_COLOURS: dict[Status, str] = {
    "ok": "green",
    "note": "cyan",
    "mended": "yellow",
    "warn": "yellow",
    "refused": "red",
    "skipped": "dim",
}


class Finding(BaseModel):
    """One check and its outcome."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str = Field(description="Its short name, such as `mesh` or `tokenizer`.")
    status: Status
    message: str = Field(description="One sentence that names the key and the fix.")
    mended: dict[str, Any] = Field(
        default_factory=dict, description="MaxText settings that put it right; apply them."
    )


class MemoryRow(BaseModel):
    """One compiled train step, in bytes of one device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    overrides: dict[str, Any]
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    total: int = Field(description="arguments + outputs + temporaries - aliased: XLA's own peak.")
    usable: int = Field(description="What the target leaves to JAX.")
    seconds: float = Field(description="Lowering and compiling.")
    xla_rematerialised: bool = Field(
        description="XLA itself recomputed values to save memory, which no setting asked for."
    )

    @property
    def fits(self) -> bool:
        """Whether the step can run."""
        return self.total <= self.usable


class MemoryReport(BaseModel):
    """The compiled step of the run, and what would need less."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    parameters: int
    state_bytes: int
    rows: list[MemoryRow] = Field(default_factory=list)
    failed: dict[str, str] = Field(
        default_factory=dict, description="Variants that do not compile, and why."
    )


class PreflightReport(BaseModel):
    """All findings of a run."""

    model_config = ConfigDict(extra="forbid")

    target: str
    findings: list[Finding] = Field(default_factory=list)
    memory: MemoryReport | None = None

    @property
    def refused(self) -> list[Finding]:
        """What must be put right before the run may start."""
        return [finding for finding in self.findings if finding.status == "refused"]

    @property
    def ok(self) -> bool:
        """Whether the run may start."""
        return not self.refused

    @property
    def mended(self) -> dict[str, Any]:
        """The MaxText settings to apply over the given ones."""
        return {key: value for found in self.findings for key, value in found.mended.items()}

    def of(self, check: str) -> Finding:
        """The finding of one check."""
        return next(finding for finding in self.findings if finding.check == check)

    def table(self) -> "Group":
        """For people; for machines there is `model_dump(mode="json")`."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"preflight for {self.target}", title_justify="left", box=None)
        for heading in ("check", "", "finding"):
            table.add_column(heading, overflow="fold")
        for finding in self.findings:
            text = finding.message
            if finding.mended:
                text += " -> " + " ".join(f"{k}={word(v)}" for k, v in finding.mended.items())
            table.add_row(
                finding.check, Text(finding.status, style=_COLOURS[finding.status]), Text(text)
            )
        parts: list[Any] = [table]
        if self.memory and self.memory.rows:
            parts += ["", memory_table(self.memory.rows)]
        return Group(*parts)


def memory_table(rows: Iterable[MemoryRow]) -> Any:
    """GiB of each compiled step."""
    from rich.table import Table

    table = Table(title="memory of the compiled train step, GiB per device", title_justify="left")
    for heading in MEMORY_HEADINGS:
        table.add_column(heading, justify="left" if heading == "configuration" else "right")
    for row in rows:
        table.add_row(*memory_cells(row))
    return table


MEMORY_HEADINGS = (
    "configuration",
    "arguments",
    "temporaries",
    "outputs - aliased",
    "total",
    "usable",
    "fits",
)


def memory_cells(row: MemoryRow) -> tuple[str, ...]:
    """One line of the table."""
    fits = "yes" if row.fits else "no"
    return (
        row.name,
        f"{row.arguments / 2**30:.2f}",
        f"{row.temporaries / 2**30:.2f}",
        f"{(row.outputs - row.aliased) / 2**30:.2f}",
        f"{row.total / 2**30:.2f}",
        f"{row.usable / 2**30:.2f}",
        f"{fits} (XLA remat)" if row.xla_rematerialised else fits,
    )


def word(value: Any) -> str:
    """A value as MaxText's command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
