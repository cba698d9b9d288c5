"""`verify`: the levels in order, each with what it needs, and one report."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from moeconv.errors import MissingPackageError, MoeconvError, UnsupportedError, to_install
from moeconv.untrusted.files import is_address
from moeconv.verification.adapter import SourceGoneError
from moeconv.verification.checks import CandidateError, Check, CheckFactory, Status, worst
from moeconv.verification.context import Verification
from moeconv.verification.levels import LEVELS, Level, runner
from moeconv.verification.levels.structure import demand_loadable
from moeconv.verification.peft import PeftCandidate, check_adapter, open_candidate
from moeconv.verification.report.report import Report, make_report
from moeconv.verification.settings import Meter, Note, ParityOptions, VerifyOptions, unseen


def verify(
    out: Path,
    *,
    source: str | None,
    options: VerifyOptions,
    note: Note = lambda text: None,
    meter: Meter = unseen,
) -> Report:
    """Verifies an output of `convert`.

    Args:
        out: The output.
        source: Its checkpoint, None for the one that the manifest names.
        options: What to do.
        note: Called with what is being done.
        meter: Shows how far level weights is.

    Raises:
        MoeconvError: Something needed is missing or cannot be read, and nothing has failed before:
            there is no verdict. What is wrong with the output itself is a failed check instead.
    """
    candidate = open_candidate(out, source)
    run = Verification(candidate, options, note, meter)
    checks: list[Check] = []
    for level, spec in LEVELS.items():
        if level not in options.levels:
            continue
        reads = spec.reads_source and is_address(candidate.source)
        note(f"level {level}" + (f", reading {candidate.source}" if reads else ""))
        of = CheckFactory(level)
        try:
            if isinstance(candidate, PeftCandidate):
                checks += check_adapter(candidate, level, run)
                continue
            _require(level, options.parity)
            if spec.runs_models:
                demand_loadable(candidate)
            checks += runner(level)(run)
        except CandidateError as error:
            checks.append(of.failed(error.check, str(error)))
        except MoeconvError as error:
            # What has failed has failed, whatever later levels cannot do with it.
            lacks = isinstance(error, MissingPackageError | UnsupportedError | SourceGoneError)
            if not (options.skip and lacks) and worst(checks) is not Status.FAIL:
                raise
            checks.append(of.skipped(level, str(error)))
    return make_report(candidate, checks)


def _require(level: Level, options: ParityOptions) -> None:
    """Looks for the packages of a level; those that OUT is loaded by are imported.

    Raises:
        MissingPackageError: One is not installed, or cannot be imported.
    """
    spec = LEVELS[level]
    packages = {**spec.packages, **(spec.maxtext_packages if options.against is None else {})}
    missing = {p: extra for p, extra in packages.items() if find_spec(p) is None}
    if missing:
        extras = sorted(set(missing.values()), reverse=True)
        verb = "is" if len(missing) == 1 else "are"
        raise MissingPackageError(
            f"level {level} compares two running models, but {' and '.join(missing)} {verb} not "
            f"installed; {to_install(*extras)}"
        )
    for package in spec.packages:
        try:
            import_module(package)
        except ImportError as error:
            raise MissingPackageError(
                f"level {level} needs {package}, which cannot be imported here: {error}"
            ) from None
