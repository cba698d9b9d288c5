"""`verify`: the levels in order, each with what it needs, and one report."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moeconv.errors import MissingPackageError, MoeconvError, UnsupportedError, to_install
from moeconv.untrusted.files import is_address
from moeconv.verification.candidate import SourceGoneError, Subject
from moeconv.verification.checks import CandidateError, Check, Level, Status, failed, skipped, worst
from moeconv.verification.levels.structure import check_structure, demand_loadable
from moeconv.verification.levels.tokenizers import check_own_tokenizer
from moeconv.verification.levels.weights import Progress, check_weights, source_bytes
from moeconv.verification.measure.tokens import Rows, find_sample, make_rows
from moeconv.verification.report.report import Report, make_report
from moeconv.verification.settings import Note, ParityOptions

LEVELS: tuple[Level, ...] = ("structure", "weights", "logits", "layers")

# Given the bytes that a level will compare, a context in which it tells of those it has.
Meter = Callable[[int], AbstractContextManager[Progress]]


@contextmanager
def _unseen(total: int) -> Iterator[Progress]:
    yield lambda done: None


@dataclass(frozen=True)
class VerifyOptions:
    """What is verified, and with how much.

    Attributes:
        levels: Which ones.
        jobs: Chunks worked on at the same time.
        memory: Bytes that level weights may take.
        parity: Of the levels logits and layers.
        skip: Whether a level whose packages are missing, or whose checkpoint is not there or
            cannot be read where it is, is skipped; otherwise that is an error. A checkpoint that
            the user named must be there.
    """

    levels: Sequence[Level] = LEVELS
    jobs: int = 2
    memory: int = 4 << 30
    parity: ParityOptions = field(default_factory=ParityOptions)
    skip: bool = False


def verify(
    out: Path,
    *,
    source: str | None,
    options: VerifyOptions,
    note: Note = lambda text: None,
    meter: Meter = _unseen,
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
    subject = Subject.open(out, source=source)
    checks: list[Check] = []
    rows: Rows | None = None
    for level in (level for level in LEVELS if level in options.levels):
        where = f", reading {subject.source}" if level != "structure" else ""
        note(f"level {level}{where if is_address(subject.source) else ''}")
        try:
            if level == "structure":
                checks += check_structure(subject)
            elif level == "weights":
                with meter(source_bytes(subject)) as progress:
                    checks += check_weights(
                        subject, jobs=options.jobs, memory=options.memory, progress=progress
                    )
                checks += check_own_tokenizer(subject)
            else:
                _require(level, options.parity)
                demand_loadable(subject)
                rows = rows or _rows(subject, options.parity)
                checks += _parity_level(level, subject, rows, options.parity, note)
        except CandidateError as error:
            checks.append(failed(level, error.check, str(error)))
        except MoeconvError as error:
            # What has failed has failed, whatever later levels cannot do with it.
            lacks = isinstance(error, MissingPackageError | UnsupportedError | SourceGoneError)
            if not (options.skip and lacks) and worst(checks) is not Status.FAIL:
                raise
            checks.append(skipped(level, level, str(error)))
    return make_report(subject, checks)


def _parity_level(
    level: Level, subject: Subject, rows: Rows, options: ParityOptions, note: Note
) -> list[Check]:
    # Imported here: structure and weights need neither.
    if level == "logits":
        from moeconv.verification.levels.logits import check_logits

        return check_logits(subject, rows, options, note)
    from moeconv.verification.levels.layers import check_layers

    return check_layers(subject, rows, options, note)


def _require(level: Level, options: ParityOptions) -> None:
    """The packages of a level.

    Raises:
        MissingPackageError: One is not installed.
    """
    packages = {"torch": "verify", "transformers": "verify", "tokenizers": "verify"}
    if options.against is None:
        packages["maxtext"] = "train"
    missing = {p: extra for p, extra in packages.items() if importlib.util.find_spec(p) is None}
    if missing:
        extras = sorted(set(missing.values()), reverse=True)
        verb = "is" if len(missing) == 1 else "are"
        raise MissingPackageError(
            f"level {level} compares two running models, but {' and '.join(missing)} {verb} not "
            f"installed; {to_install(*extras)}"
        )


def _rows(subject: Subject, options: ParityOptions) -> Rows:
    try:
        step = subject.step
    except MoeconvError:
        if options.against is None:
            raise
        step = None  # two Hugging Face models are compared without the checkpoint
    return make_rows(
        subject.out,
        find_sample(options.prompts, step),
        count=options.tokens,
        vocab_size=subject.model.vocab_size,
        context=subject.model.max_position_embeddings,
    )
