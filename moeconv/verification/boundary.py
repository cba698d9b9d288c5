"""Where what OUT holds may raise anything: that is OUT's failure, and never a traceback.

Files that others wrote are read here by Python, transformers, torch, safetensors and tokenizers,
and each raises what it likes. `blaming` draws the one line: trouble of this machine (memory, disk,
packages, the store) means that there is no verdict, everything else is the fault of what was read.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeconv.errors import (
    MemoryLimitError,
    MissingPackageError,
    MoeconvError,
    OutputError,
    StorageError,
)
from moeconv.verification.checks import CandidateError

# Of reading a file: what any content of the folder may meet. EPERM is ours (`UnsafeFileError`).
_MACHINE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EROFS,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
# What torch and XLA say where Python would raise a MemoryError.
_NO_MEMORY = re.compile(r"allocate memory|out of memory", re.IGNORECASE)
# Characters of what others raise: with a hostile config it can be all of it.
_LONGEST = 600


class MachineError(OutputError):
    """This machine cannot read a file of OUT; of OUT itself that says nothing."""


@contextmanager
def blaming(
    what: str, error: type[MoeconvError] = CandidateError, *, check: str = "model"
) -> Iterator[None]:
    """Whatever is raised within, as one sentence.

    Args:
        what: What cannot be done, e.g. `transformers cannot load OUT`.
        error: Raised where the model is at fault.
        check: The check that then fails, if `error` is `CandidateError`.

    Raises:
        CandidateError: OUT is at fault, with the check.
        MoeconvError: `error`, if that is another.
        MachineError: A file cannot be read here, whatever it holds.
        MemoryLimitError: The machine has too little memory.
        MissingPackageError: A package is not installed.
        StorageError: The checkpoint's store failed.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as problem:  # a panic of tokenizers is no Exception
        raise _as_error(problem, what, error, check) from (
            None if isinstance(problem, MoeconvError) else problem
        )


def _as_error(
    problem: BaseException, what: str, error: type[MoeconvError], check: str
) -> MoeconvError:
    if isinstance(
        problem,
        CandidateError | MachineError | MemoryLimitError | MissingPackageError | StorageError,
    ):
        return problem
    own = isinstance(problem, MoeconvError)
    cause = (own and problem.__context__) or problem
    said = " ".join(str(getattr(cause, "strerror", None) or cause).split()) or type(cause).__name__
    if isinstance(cause, MemoryError) or _NO_MEMORY.search(said):
        return MemoryLimitError(
            f"{what}: this machine has too little memory; level layers holds one layer at a time"
        )
    if isinstance(cause, OSError) and cause.errno in _MACHINE:
        file = Path(str(cause.filename or "")).name
        where = "" if file in what else f"{file}: "
        return MachineError(f"{what}: {where}{cause.strerror}")
    if isinstance(problem, MoeconvError):
        return CandidateError(str(problem), check) if error is CandidateError else problem
    sentence = f"{what}: {said[:_LONGEST]}"
    return CandidateError(sentence, check) if error is CandidateError else error(sentence)
