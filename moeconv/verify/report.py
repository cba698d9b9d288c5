"""`verify.json`: the verdict, bound to the bytes it speaks of, so that changing one voids it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from moeconv import __version__
from moeconv.verify.outcome import Check, Level, Status, worst
from moeconv.verify.structure import sha256
from moeconv.verify.subject import Subject

REPORT_NAME = "verify.json"


class Report(BaseModel):
    """The file's schema.

    `files` has the SHA-256 of every file of the output at the time of the verdict, the manifest
    included; `source` the digest of the arrays that were read, as the manifest claims it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["moeconv-verify"] = "moeconv-verify"
    version: Literal[1] = 1
    moeconv_version: str = __version__
    verdict: Status
    levels: dict[Level, Status]
    checks: list[Check]
    source: str
    files: dict[str, str]


def make_report(subject: Subject, checks: list[Check]) -> Report:
    """Puts the verdict together; a level whose checks were all skipped is skipped."""
    levels: dict[Level, list[Check]] = {}
    for check in checks:
        levels.setdefault(check.level, []).append(check)
    names = [*subject.manifest.files, "moeconv.json"]
    present = [n for n in sorted(names) if (subject.out / n).is_file()]
    return Report(
        verdict=worst(checks),
        levels={level: worst(group) for level, group in levels.items()},
        checks=checks,
        source=subject.manifest.source.digest,
        files={name: sha256(subject.out / name) for name in present},
    )
