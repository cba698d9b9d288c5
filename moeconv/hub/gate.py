"""Whether an output is proven to be the model that was trained.

A verdict counts if it was made of the bytes that lie there now, did not fail, and rests on the
levels structure and weights and on one of logits and layers against MaxText itself: equal weights
prove nothing about the RoPE that config.json declares. Warnings pass and are repeated in the card.
"""

from dataclasses import dataclass

from moeconv.errors import UnverifiedError
from moeconv.hub.local import Output
from moeconv.verify.markdown import verdict_line
from moeconv.verify.outcome import Check, Level, Status, passed, worst
from moeconv.verify.report import ENOUGH, REPORT_NAME, Report

_PROVEN = (Status.PASS, Status.WARN)
_ALWAYS: tuple[Level, ...] = ("structure", "weights")
_ONE_OF: tuple[Level, ...] = ("logits", "layers")


@dataclass(frozen=True)
class Judgement:
    """What is known of an output.

    Attributes:
        report: The report of these very bytes, as it is published; None when there is none.
        problem: Why the output is not proven to be the model; None when it is.
        warnings: Of the report, a sentence each.
        skipped: Levels that did not run, each with the reason.
    """

    report: Report | None
    problem: str | None
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether the gate lets it pass."""
        return self.problem is None


def judge(output: Output) -> Judgement:
    """Looks at the verdict and reads every byte; a dry run tells what is wrong, so none is raised.

    Raises:
        OutputError: A file cannot be read.
    """
    report = output.report
    if report is None:
        return Judgement(None, _no_report(output))
    if other := _other_bytes(output, report):
        return Judgement(None, f"{REPORT_NAME} speaks of other bytes than those of {_few(other)}")
    report = _of_what_is_sent(report)
    warned = [c for c in report.checks if c.status is Status.WARN]
    warnings = tuple(f"{c.level}/{c.name}: {c.summary}" for c in warned)
    return Judgement(report, _problem(report), warnings, tuple(_skipped(report)))


def _no_report(output: Output) -> str:
    return f"{REPORT_NAME} is no report" if output.unreadable else f"there is no {REPORT_NAME}"


def _of_what_is_sent(report: Report) -> Report:
    """Without the warning of files beside the model: they are not sent, nor are their names."""
    checks = [
        passed("structure", "files", "every file has the size and SHA-256 of the manifest")
        if (c.level, c.name, c.status) == ("structure", "files", Status.WARN)
        else c
        for c in report.checks
    ]
    if checks == report.checks:
        return report
    levels = {level: worst(c for c in checks if c.level == level) for level in report.levels}
    return report.model_copy(update={"checks": checks, "levels": levels, "verdict": worst(checks)})


def demand(output: Output, judgement: Judgement) -> None:
    """Lets a proven output pass.

    Raises:
        UnverifiedError: It is not proven; says why and what to do.
    """
    _refuse(output, judgement.problem)


def demand_verdict(output: Output) -> None:
    """Lets an output pass whose report proves it, if it is of these bytes, which nobody reads here.

    Raises:
        UnverifiedError: Whatever the bytes are, it is not proven; says why and what to do.
    """
    _refuse(output, _problem(output.report) if output.report else _no_report(output))


def _refuse(output: Output, problem: str | None) -> None:
    if problem is not None:
        raise UnverifiedError(
            f"{output.folder} is not verified: {problem}; run `moeconv verify "
            f"{output.folder}`, or pass --unverified to push it all the same, marked so in its card"
        )


def _other_bytes(output: Output, report: Report) -> list[str]:
    """Files whose bytes are not those of the report, or of the manifest."""
    there = output.digests
    names = report.files.keys() | there.keys()
    wrong = {n for n in names if report.files.get(n) != there.get(n)}
    return sorted(wrong | {*output.changed})


def _problem(report: Report) -> str | None:
    if report.verdict is Status.FAIL:
        return f"it failed ({verdict_line(report)})"
    for level in _ALWAYS:
        if report.levels.get(level) not in _PROVEN:
            return f"level {level} {_why(report, level)}"
    ran = [level for level in _ONE_OF if report.levels.get(level) in _PROVEN]
    long = [level for level in ran if report.positions(level) >= ENOUGH]
    if ran and not long:
        return (
            f"level {ran[0]} ran only {report.positions(ran[0])} positions, and fewer than "
            f"{ENOUGH} hide a wrong RoPE"
        )
    if not ran:
        return "neither level logits nor level layers ran" + "".join(
            f" ({reason})" for reason in dict.fromkeys(_reasons(report, *_ONE_OF))
        )
    if not any(_against_maxtext(report, level) for level in long):
        return f"level {long[0]} compared it with another model than MaxText's"
    return None


def _against_maxtext(report: Report, level: Level) -> bool:
    """Whether a level's reference was MaxText (`--against hf:DIR` takes another)."""
    check = reference(report, level)
    return check is not None and check.metrics.get("against") == "maxtext"


def reference(report: Report, level: Level) -> Check | None:
    """The check that says what a level compared with."""
    return next((c for c in report.checks if (c.level, c.name) == (level, "reference")), None)


def _why(report: Report, level: Level) -> str:
    reasons = _reasons(report, level)
    return f"was skipped ({reasons[0]})" if reasons else "did not run"


def _reasons(report: Report, *levels: Level) -> list[str]:
    """Of levels that were skipped, without their names: several have the same one."""
    return [
        c.summary.removeprefix(f"level {c.level} ")
        for c in report.checks
        if c.level in levels and c.status is Status.SKIP
    ]


def _skipped(report: Report) -> list[str]:
    return [
        f"level {level} {_why(report, level)}"
        for level in (*_ALWAYS, *_ONE_OF)
        if report.levels.get(level) not in (*_PROVEN, Status.FAIL)
    ]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
