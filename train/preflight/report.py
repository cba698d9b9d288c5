"""What the checks found, for people as lines and for machines as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moeconv.errors import ConfigError

Status = Literal["ok", "note", "mended", "warn", "refused", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One check and its outcome.

    Attributes:
        check: Its short name, such as `mesh` or `tokenizer`.
        message: One sentence that names the key and the fix.
        mended: MaxText settings that put it right.
        exit_code: What a run that is refused for it ends with.
    """

    check: str
    status: Status
    message: str
    mended: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = ConfigError.exit_code


@dataclass(frozen=True)
class MemoryRow:
    """One compiled run, in bytes of one device.

    Attributes:
        arguments: Of the train step: the state and a batch.
        evaluation: What an evaluation needs beside the state; 0 if none is.
        usable: What the target leaves to JAX.
        seconds: Lowering and compiling.
        xla_rematerialised: XLA itself recomputed values to save memory, which no setting asked for.
    """

    name: str
    overrides: Mapping[str, Any]
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    evaluation: int
    usable: int
    seconds: float
    xla_rematerialised: bool

    @property
    def train(self) -> int:
        """What the train step needs beside its arguments."""
        return self.outputs + self.temporaries - self.aliased

    @property
    def total(self) -> int:
        """The larger of the train step's peak, by XLA, and the state with an evaluation."""
        return self.arguments + max(self.train, self.evaluation)

    @property
    def fits(self) -> bool:
        """Whether the run has room."""
        return self.total <= self.usable

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "total": self.total}


@dataclass
class PreflightReport:
    """All findings of a run."""

    target: str
    findings: list[Finding] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)

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

    def lines(self) -> Iterator[str]:
        """For people; what is refused has its sentence in the error that follows."""
        yield f"preflight for {self.target}:"
        for each in self.findings:
            text = "see below" if each.status == "refused" else each.message
            mended = f" -> {name_of(each.mended)}" if each.mended else ""
            yield f"  {each.status:8}{each.check}: {text}{mended}"

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "memory": [row.to_json() for row in self.memory]}


def name_of(settings: Mapping[str, Any]) -> str:
    """Settings as MaxText's command line takes them."""
    return " ".join(f"{key}={word(value)}" for key, value in settings.items())


def word(value: Any) -> str:
    """A value as MaxText's command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
