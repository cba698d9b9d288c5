"""Every way a user's input can be wrong, each with the exit code its command ends with.

A message is one sentence (or a sentence and a list) that names the file, the field and the fix.
The table in docs/exit-codes.md is checked against these classes by a test.
"""


class MoeconvError(Exception):
    """Base of all errors shown to a user without a traceback."""

    exit_code = 1


class UsageError(MoeconvError):
    """The command line itself is wrong (same code as click's own usage errors)."""

    exit_code = 2


class NotACheckpointError(MoeconvError):
    """The path holds no complete MaxText checkpoint (absent, unfinished, or something else)."""

    exit_code = 3


class ConfigError(MoeconvError):
    """The model's description is incomplete, contradicts the shapes, or cannot be read."""

    exit_code = 4


class UnsupportedError(MoeconvError):
    """The model computes something that the target format cannot hold exactly."""

    exit_code = 5


class TensorError(MoeconvError):
    """Parameters are missing, extra, of the wrong shape, corrupt, or not finite."""

    exit_code = 6


class OutputError(MoeconvError):
    """OUT cannot be written (it exists, is inside CKPT, has no space), or it is damaged."""

    exit_code = 7


class TokenizerError(MoeconvError):
    """The tokenizer cannot be read or does not fit the model's vocabulary."""

    exit_code = 8


class StorageError(MoeconvError):
    """The store that holds the checkpoint failed (network, permissions); `--resume` goes on."""

    exit_code = 10


class MemoryLimitError(MoeconvError):
    """The memory limit is below what the largest chunk of the checkpoint needs."""

    exit_code = 9


class MissingPackageError(MoeconvError):
    """A command needs a package that is not installed; the message says which extra brings it."""

    exit_code = 11


def to_install(*extras: str) -> str:
    """The command that brings extras of moeconv, which is in no package index."""
    return f'in a checkout of moeconv: pip install ".[{",".join(extras)}]"'


class TimeLimitError(MoeconvError):
    """The time limit of `moeconv train` came before the last step; its state is saved."""

    exit_code = 14


class TrainingError(MoeconvError):
    """The training itself failed: a loss that is no number, too little memory, data that ended."""

    exit_code = 15


class UnverifiedError(MoeconvError):
    """The output is not proven to be the model: `verify.json` is missing, failed, or outdated."""

    exit_code = 12


class HubError(MoeconvError):
    """The Hub refused or could not be reached; no commit was made, unless the message says so."""

    exit_code = 13
