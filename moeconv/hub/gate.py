"""The gate of push: is an output proven to be the model that was trained?

A verdict counts if it was made of the bytes that are there now, did not fail, and rests on the
levels structure and weights and on one of logits and layers against MaxText itself: equal weights
prove nothing about the RoPE that config.json declares. Warnings pass and are repeated in the card.

The verdict is not taken at its word: it is computed again from the checks, each level must have
those that it always makes, and the source must be the manifest's. It is evidence and not a
signature: a forged report that is consistent in itself is believed.
"""

import hashlib
from dataclasses import dataclass

from moeconv.errors import UnverifiedError
from moeconv.hub.local import Output
from moeconv.untrusted.text import printable
from moeconv.verification.checks import CheckFactory, Status, worst
from moeconv.verification.levels import LEVELS, RUNNING, Level
from moeconv.verification.report.markdown import verdict_line
from moeconv.verification.report.plots import find
from moeconv.verification.report.report import ENOUGH, REPORT_NAME, Report, levels_of

_PROVEN = (Status.PASS, Status.WARN)
_ALWAYS = tuple(level for level in LEVELS if level not in RUNNING)


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
        """True if the gate lets it pass."""
        return self.problem is None


def judge(output: Output) -> Judgement:
    """Reads the verdict and every byte; a dry run reports what is wrong, so nothing is raised.

    Raises:
        OutputError: A file cannot be read.
    """
    report = output.report
    if report is None:
        return Judgement(None, _no_report(output))
    if other := _other_bytes(output, report):
        return Judgement(None, f"{REPORT_NAME} speaks of other bytes than those of {_few(other)}")
    if (wrong := _contradiction(output, report)) is not None:
        return Judgement(None, f"{REPORT_NAME} contradicts itself: {wrong}")
    report = _of_what_is_sent(report)
    warned = [c for c in report.checks if c.status is Status.WARN]
    warnings = tuple(f"{c.level}/{c.name}: {c.summary}" for c in warned)
    return Judgement(report, _problem(report), warnings, tuple(_skipped(report)))


def _no_report(output: Output) -> str:
    if output.unreadable is not None:
        return f"{REPORT_NAME} is no report ({printable(output.unreadable)[:200]})"
    return f"there is no {REPORT_NAME}"


def _contradiction(output: Output, report: Report) -> str | None:
    """What in a report does not follow from its checks, or from the manifest."""
    names = [(c.level, c.name) for c in report.checks]
    if len(set(names)) != len(names):
        return "a check is there twice"
    levels = levels_of(report.checks)
    if report.levels != levels:
        apart = {name for name, _ in report.levels.items() ^ levels.items()}
        return f"its checks do not give the verdict of level {_few(sorted(apart))}"
    if report.verdict is not worst(report.checks):
        return f"its checks give {worst(report.checks)}, its verdict is {report.verdict}"
    for level, status in levels.items():
        if status in _PROVEN and (lacking := _lacking(output, report, level)):
            return f"level {level} lacks {_few(lacking)}"
    claimed = output.manifest.source
    lines = [f"{name} {digest}" for name, digest in sorted(claimed.arrays.items())]
    read = find(report, Level.WEIGHTS, "source")
    digests = {report.source, hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    if read is not None and read.status is Status.PASS:
        digests.add(str(read.metrics.get("digest")))
    if digests != {claimed.digest}:
        return f"it speaks of another checkpoint than {output.manifest_name}"
    return None


def _lacking(output: Output, report: Report, level: Level) -> list[str]:
    """Checks that a level has whenever it ran, and that are not there or were not made."""
    known = LEVELS[level]
    made = {c.name for c in report.checks if c.level == level and c.status in _PROVEN}
    there = {c.name for c in report.checks if c.level == level}
    wanted = {name: there if name in known.can_skip else made for name in known.always}
    if level in RUNNING and output.model.moe_layers:
        wanted["router"] = made
    return [f"check {name}" for name, among in wanted.items() if name not in among]


def _of_what_is_sent(report: Report) -> Report:
    """Without the warning of files beside the model: they are not sent, nor are their names."""
    checks = [
        CheckFactory(c.level).passed(c.name, "every file has the size and SHA-256 of the manifest")
        if (c.level, c.name, c.status) == (Level.STRUCTURE, "files", Status.WARN)
        else c
        for c in report.checks
    ]
    if checks == report.checks:
        return report
    return report.model_copy(
        update={"checks": checks, "levels": levels_of(checks), "verdict": worst(checks)}
    )


def demand(output: Output, judgement: Judgement) -> None:
    """Lets a proven output pass.

    Raises:
        UnverifiedError: It is not proven; says why and what to do.
    """
    _refuse(output, judgement.problem)


def demand_verdict(output: Output) -> None:
    """Lets an output pass whose report proves it, without reading the bytes that it is about.

    Raises:
        UnverifiedError: Whatever the bytes are, it is not proven; says why and what to do.
    """
    if output.report is None:
        _refuse(output, _no_report(output))
    elif (wrong := _contradiction(output, output.report)) is not None:
        _refuse(output, f"{REPORT_NAME} contradicts itself: {wrong}")
    else:
        _refuse(output, _problem(output.report))


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
    ran = [level for level in RUNNING if report.levels.get(level) in _PROVEN]
    long = [level for level in ran if report.positions(level) >= ENOUGH]
    if ran and not long:
        return (
            f"level {ran[0]} ran only {report.positions(ran[0])} positions, and fewer than "
            f"{ENOUGH} hide a wrong RoPE"
        )
    if not ran:
        return "neither level logits nor level layers ran" + "".join(
            f" ({reason})" for reason in dict.fromkeys(_reasons(report, *RUNNING))
        )
    if not any(_against_maxtext(report, level) for level in long):
        return f"level {long[0]} compared it with another model than MaxText's"
    return None


def _against_maxtext(report: Report, level: Level) -> bool:
    """True if a level's reference was MaxText (`--against hf:DIR` takes another)."""
    check = find(report, level, "reference")
    return check is not None and check.metrics.get("against") == "maxtext"


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
        for level in (*_ALWAYS, *RUNNING)
        if report.levels.get(level) not in (*_PROVEN, Status.FAIL)
    ]


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
