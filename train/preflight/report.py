"""What the checks found: pydantic models, printed as tables or as JSON."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from moeconv.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

Status = Literal["ok", "note", "mended", "warn", "refused", "skipped"]

_COLOURS = {"ok": "green", "mended": "yellow", "warn": "yellow", "refused": "red"}


class Finding(BaseModel):
    """One check and its outcome."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str = Field(description="Its short name, such as `mesh` or `tokenizer`.")
    status: Status
    message: str = Field(description="One sentence that names the key and the fix.")
    mended: dict[str, Any] = Field({}, description="MaxText settings that put it right.")
    exit_code: int = Field(
        ConfigError.exit_code, description="What a run that is refused for it ends with."
    )


class MemoryRow(BaseModel):
    """One compiled run, in bytes of one device."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # what is computed is written too

    name: str
    overrides: dict[str, Any]
    arguments: int = Field(description="Of the train step: the state and a batch.")
    outputs: int
    temporaries: int
    aliased: int
    evaluation: int = Field(description="What an evaluation needs beside the state; 0 if none is.")
    usable: int = Field(description="What the target leaves to JAX.")
    seconds: float = Field(description="Lowering and compiling.")
    xla_rematerialised: bool = Field(
        description="XLA itself recomputed values to save memory, which no setting asked for."
    )

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> int:
        """The larger of the train step's peak, by XLA, and the state with an evaluation."""
        train = self.outputs + self.temporaries - self.aliased
        return self.arguments + max(train, self.evaluation)

    @property
    def fits(self) -> bool:
        """Whether the run has room."""
        return self.total <= self.usable


class MemoryReport(BaseModel):
    """The compiled run, and what would need less."""

    model_config = ConfigDict(extra="forbid")

    rows: list[MemoryRow] = []
    failed: dict[str, str] = Field({}, description="Variants that do not compile, and why.")


class PreflightReport(BaseModel):
    """All findings of a run."""

    model_config = ConfigDict(extra="forbid")

    target: str
    findings: list[Finding] = []
    memory: MemoryReport | None = None

    @property
    def refused(self) -> list[Finding]:
        """What must be put right before the run may start."""
        return [finding for finding in self.findings if finding.status == "refused"]

    @property
    def mended(self) -> dict[str, Any]:
        """The MaxText settings to apply over the given ones."""
        return {key: value for found in self.findings for key, value in found.mended.items()}

    def of(self, check: str) -> Finding:
        """The finding of one check."""
        return next(finding for finding in self.findings if finding.check == check)

    def tables(self) -> Iterable["Table"]:
        """For people; what is refused has its sentence in the error that follows."""
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "", "finding", box=None)
        table.title, table.title_justify = f"preflight for {self.target}", "left"
        for each in self.findings:
            text = "see below" if each.status == "refused" else each.message
            text += " -> " * bool(each.mended) + name_of(each.mended)
            table.add_row(
                each.check, Text(each.status, _COLOURS.get(each.status, "dim")), Text(text)
            )
        yield table
        if self.memory:
            sizes = Table(*MEMORY_HEADINGS, title_justify="left")
            sizes.title = "memory of the compiled steps, GiB per device"
            for row in self.memory.rows:
                sizes.add_row(*memory_cells(row))
            yield sizes


MEMORY_HEADINGS = ("configuration", "state", "train step", "evaluation", "total", "usable", "fits")


def memory_cells(row: MemoryRow) -> tuple[str, ...]:
    """One line of the table."""
    train = row.outputs + row.temporaries - row.aliased
    sizes = (row.arguments, train, row.evaluation, row.total, row.usable)
    fits = "yes" if row.fits else "no"
    remat = " (XLA remat)" * row.xla_rematerialised
    return (row.name, *(f"{size / 2**30:.2f}" for size in sizes), fits + remat)


def name_of(settings: Mapping[str, Any]) -> str:
    """Settings as MaxText's command line takes them."""
    return " ".join(f"{key}={word(value)}" for key, value in settings.items())


def word(value: Any) -> str:
    """A value as MaxText's command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
