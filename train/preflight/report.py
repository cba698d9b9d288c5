"""What the checks found, for people as lines and for machines as JSON."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moeconv_train.preflight.config import name_of

from moeconv.errors import ConfigError, MoeconvError

if TYPE_CHECKING:
    from moeconv_train.plan import Plan

Status = Literal["ok", "note", "mended", "warn", "refused", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One check and its outcome.

    Attributes:
        check: Its short name, such as `mesh` or `tokenizer`.
        message: One sentence that names the key and the fix.
        mended: MaxText settings that put it right.
        error: What a run that is refused for it ends with.
    """

    check: str
    status: Status
    message: str
    mended: Mapping[str, Any] = field(default_factory=dict)
    error: type[MoeconvError] = ConfigError

    def __str__(self) -> str:
        return self.message + (f" -> {name_of(self.mended)}" if self.mended else "")

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        told = {**asdict(self), "exit_code": self.error.exit_code}
        del told["error"]
        return told


@dataclass(frozen=True)
class MemoryRow:
    """One compiled run, in bytes of one device.

    Attributes:
        arguments: Of the train step: the state and a batch.
        evaluation: What an evaluation needs beside the state; 0 if none is.
        usable: What the target leaves to JAX.
        xla_rematerialised: XLA itself recomputed values to save memory, which no setting asked for.
    """

    name: str
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    evaluation: int
    usable: int
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
class Preflight:
    """A plan, with what the checks mend in it, and what they found."""

    plan: "Plan"
    findings: list[Finding]
    memory: list[MemoryRow] = field(default_factory=list)

    def of(self, check: str) -> Finding:
        """The finding of one check."""
        return next(finding for finding in self.findings if finding.check == check)

    def refuse(self) -> None:
        """Says why a run may not start.

        Raises:
            MoeconvError: A sentence for each reason; the first decides which.
        """
        if refused := [finding for finding in self.findings if finding.status == "refused"]:
            told = "\n".join(f"{finding.check}: {finding.message}" for finding in refused)
            raise refused[0].error(told)

    def lines(self) -> Iterator[str]:
        """For people; what is refused has its sentence in the error that follows."""
        yield f"preflight for {self.plan.target.name}:"
        for each in self.findings:
            text = "see below" if each.status == "refused" else str(each)
            yield f"  {each.status:8}{each.check}: {text}"

    def sentences(self, known: Collection[Finding] = ()) -> Iterator[str]:
        """What was mended, and what should be known before the run starts.

        Args:
            known: Findings that were shown before, and are left out.
        """
        for finding in self.findings:
            if finding in known:
                continue
            if finding.status == "mended":
                yield f"mended: {finding.check}: {finding}"
            elif finding.status == "warn":
                yield f"warning: {finding.check}: {finding.message}"

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "target": self.plan.target.name,
            "findings": [finding.to_json() for finding in self.findings],
            "memory": [row.to_json() for row in self.memory],
        }
