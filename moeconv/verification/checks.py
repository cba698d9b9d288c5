"""What a check found: pass, warn, fail or skipped, with the numbers and the tensors it is about."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from moeconv.errors import OutputError
from moeconv.untrusted.text import printable
from moeconv.verification.levels import LEVELS, Level

# Of the checks of OUT itself, which any level may find to fail (`CandidateError`).
_OF_OUT = ("model", *LEVELS[Level.STRUCTURE].always)
# Characters of a summary, values deep of a metric: what OUT holds may be of any length and depth.
_LONGEST, _DEEPEST = 2000, 12


class Status(StrEnum):
    """A graded verdict."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skipped"


class CandidateError(OutputError):
    """OUT itself is at fault: a failed check, where trouble of the machine means no verdict.

    Attributes:
        check: The name of the check that fails: "model", one of the level's own, or of structure's.
    """

    def __init__(self, message: str, check: str = "model") -> None:
        super().__init__(message)
        self.check = check


_RANK = {Status.SKIP: 0, Status.PASS: 1, Status.WARN: 2, Status.FAIL: 3}


class Check(BaseModel):
    """One thing that was looked at.

    Attributes:
        level: The level it belongs to.
        name: Short, stable, e.g. `sha256`.
        status: The verdict.
        summary: One sentence with the numbers.
        tensors: Tensors at fault, or files.
        layer: First layer at fault, where there is one.
        metrics: Numbers for machines; null where one is NaN or infinite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Level
    name: str
    status: Status
    summary: str
    tensors: list[str] = []
    layer: int | None = None
    metrics: dict[str, Any] = {}

    @field_validator("summary")
    @classmethod
    def _sentence(cls, text: str) -> str:
        return printable(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")

    @field_validator("tensors")
    @classmethod
    def _names(cls, names: list[str]) -> list[str]:
        return [printable(name) for name in names]

    @field_validator("metrics")
    @classmethod
    def _numbers(cls, metrics: dict[str, Any]) -> dict[str, Any]:
        return {printable(str(name)): _as_json(value) for name, value in metrics.items()}

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        known = LEVELS[self.level]
        # A level that cannot run here is skipped under its own name.
        skipped = self.name == self.level and self.status is Status.SKIP
        of_out = self.name in _OF_OUT and self.status is Status.FAIL
        if not (skipped or of_out) and self.name not in (*known.always, *known.at_times):
            raise ValueError(f"level {self.level} has no check {self.name!a}")
        return self


def _as_json(value: Any, depth: int = 0) -> Any:
    """What JSON can hold of a value: null for what is no finite number."""
    if depth > _DEEPEST:
        return "…"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(k)): _as_json(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one, depth + 1) for one in value]
    return value


def worst(checks: Iterable[Check]) -> Status:
    """The verdict of several checks together; nothing checked is nothing passed."""
    return max((c.status for c in checks), key=_RANK.__getitem__, default=Status.SKIP)


def more_severe(one: Status, other: Status) -> Status:
    """The more severe of two verdicts."""
    return max(one, other, key=_RANK.__getitem__)


@dataclass(frozen=True)
class CheckFactory:
    """Makes the checks of one level, which all bear its name."""

    level: Level

    def passed(self, name: str, summary: str, **more: Any) -> Check:
        """A check that found nothing wrong."""
        return self.graded(Status.PASS, name, summary, **more)

    def warned(self, name: str, summary: str, **more: Any) -> Check:
        """A check that found what may be wrong."""
        return self.graded(Status.WARN, name, summary, **more)

    def failed(self, name: str, summary: str, **more: Any) -> Check:
        """A check that found something wrong."""
        return self.graded(Status.FAIL, name, summary, **more)

    def skipped(self, name: str, why: str) -> Check:
        """A check that could not be made here."""
        return self.graded(Status.SKIP, name, why)

    def graded(self, status: Status, name: str, summary: str, **more: Any) -> Check:
        """A check with the verdict that was measured."""
        return Check(level=self.level, name=name, status=status, summary=summary, **more)


def first_line(error: Exception) -> str:
    """The first line of an error that a library raised, or at least its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
