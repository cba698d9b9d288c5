"""`verify.json`: the verdict, bound to the bytes it speaks of, so that changing one voids it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from moeconv import __version__
from moeconv.verify.outcome import Check, Level, Status, worst
from moeconv.verify.structure import sha256
from moeconv.verify.subject import Subject

REPORT_NAME = "verify.json"
_ORDER: tuple[Level, ...] = ("structure", "weights", "logits", "layers")


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

    @property
    def proves(self) -> bool:
        """Whether the levels that ran are enough to call both models the same, warnings aside.

        Right values prove nothing of the RoPE that config.json declares, and what runs alike on
        some tokens may differ in a row of the embedding.
        """
        good = {name for name, found in self.levels.items() if found in (Status.PASS, Status.WARN)}
        return "weights" in good and not good.isdisjoint({"logits", "layers"})

    def with_earlier(self, earlier: "Report") -> "Report":
        """Takes over the levels that did not run this time, if they spoke of the same bytes."""
        same = (earlier.moeconv_version, earlier.source, earlier.files) == (
            self.moeconv_version,
            self.source,
            self.files,
        )
        kept = [c for c in earlier.checks if c.level not in self.levels] if same else []
        if not kept:
            return self
        checks = sorted([*self.checks, *kept], key=lambda check: _ORDER.index(check.level))
        return self.model_copy(
            update={"checks": checks, "verdict": worst(checks), "levels": _levels(checks)}
        )


def _levels(checks: list[Check]) -> dict[Level, Status]:
    """The verdict of every level; one whose checks were all skipped is skipped."""
    levels: dict[Level, list[Check]] = {}
    for check in checks:
        levels.setdefault(check.level, []).append(check)
    return {level: worst(group) for level, group in levels.items()}


def make_report(subject: Subject, checks: list[Check]) -> Report:
    """Puts the verdict together."""
    names = [*subject.manifest.files, "moeconv.json"]
    present = [n for n in sorted(names) if (subject.out / n).is_file()]
    return Report(
        verdict=worst(checks),
        levels=_levels(checks),
        checks=checks,
        source=subject.manifest.source.digest,
        files={name: sha256(subject.out / name) for name in present},
    )
