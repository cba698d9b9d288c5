"""`verify.json`: the verdict, bound to the bytes it speaks of, so that changing one voids it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moeconv import __version__
from moeconv.artifact.names import LEGAL
from moeconv.untrusted.files import is_file
from moeconv.untrusted.strict_json import loads
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Check, Status, worst
from moeconv.verification.files import sha256
from moeconv.verification.levels import RUNNING, Level
from moeconv.verification.measure.tokens import KINDS
from moeconv.verification.report.figures import demand_figures

REPORT_NAME = "verify.json"
# Fewer positions hide a wrong RoPE.
ENOUGH = 512
# Instead of the digest of a file that is not of the manifest's size, however large it is.
_NOT_READ = ""
_ORDER = list(Level)


class Report(BaseModel):
    """The file's schema.

    `files` has the SHA-256 of every file of the output at the time of the verdict, the manifest
    included, and nothing for one of another size than the manifest says; `source` the digest of the
    arrays that were read, as the manifest claims it; `beside` the SHA-256 of the report's plots,
    and of LICENSE and NOTICE, which push sends along.
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
    beside: dict[str, str] = {}

    @classmethod
    def read(cls, raw: bytes) -> "Report":
        """From verify.json, which anybody can have written.

        Raises:
            ValueError: It is no report, or lacks figures that a page would show.
        """
        return cls.of(loads(raw))

    @classmethod
    def of(cls, content: object) -> "Report":
        """From what verify.json holds; raises as `read`."""
        report = cls.model_validate(content)
        for check in report.checks:
            demand_figures(check)
        return report

    @property
    def proves(self) -> bool:
        """True if the levels that ran are enough to call both models the same, warnings aside.

        Right values prove nothing of the RoPE that config.json declares, and what runs alike on
        some tokens may differ in a row of the embedding.
        """
        good = {name for name, found in self.levels.items() if found in (Status.PASS, Status.WARN)}
        ran = good & {*RUNNING}
        return Level.WEIGHTS in good and any(self.positions(level) >= ENOUGH for level in ran)

    def positions(self, level: Level) -> int:
        """Positions of each kind (text, random ids) that a level of running models compared."""
        found = next((c for c in self.checks if (c.level, c.name) == (level, "parity")), None)
        kinds = [found.metrics[kind] for kind in KINDS if kind in found.metrics] if found else []
        return min((int(kind.get("positions") or 0) for kind in kinds), default=0)

    def with_earlier(self, earlier: "Report") -> "Report":
        """Takes over the levels that did not run this time, if they spoke of the same bytes."""
        then = (earlier.moeconv_version, earlier.source, earlier.files)
        now = (self.moeconv_version, self.source, self.files)
        same = then == now and _NOT_READ not in self.files.values()
        kept = [c for c in earlier.checks if c.level not in self.levels] if same else []
        if not kept:
            return self
        checks = sorted([*self.checks, *kept], key=lambda check: _ORDER.index(check.level))
        return self.model_copy(
            update={"checks": checks, "verdict": worst(checks), "levels": levels_of(checks)}
        )


def levels_of(checks: list[Check]) -> dict[Level, Status]:
    """The verdict of every level; one whose checks were all skipped is skipped."""
    levels: dict[Level, list[Check]] = {}
    for check in checks:
        levels.setdefault(check.level, []).append(check)
    return {level: worst(group) for level, group in levels.items()}


def make_report(candidate: Candidate, checks: list[Check]) -> Report:
    """Puts the verdict together.

    Raises:
        OutputError: The bytes are not those that the levels saw.
    """
    names = [*candidate.names, candidate.manifest_path.name]
    present = [n for n in sorted(names) if (candidate.out / n).is_file()]
    files = {name: _digest(candidate, name) for name in present}
    candidate.demand_unchanged()
    return Report(
        verdict=worst(checks),
        levels=levels_of(checks),
        checks=checks,
        source=candidate.manifest.source.digest,
        files=files,
        beside={
            name: sha256(candidate.out / name) for name in LEGAL if _is_own(candidate.out, name)
        },
    )


def _digest(candidate: Candidate, name: str) -> str:
    path, record = candidate.out / name, candidate.manifest.files.get(name)
    if record is not None and path.stat().st_size != record.size:
        return _NOT_READ
    return sha256(path)


def _is_own(folder: Path, name: str) -> bool:
    try:
        return is_file(folder, name, links=False)
    except OSError:  # a link, say: push refuses it
        return False
