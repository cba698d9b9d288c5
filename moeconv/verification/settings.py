"""What the user chose, and how the work is shown while it is done."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moeconv.errors import UsageError
from moeconv.untrusted.files import is_address, without_access
from moeconv.verification.levels import LEVELS

# Called with what is being done.
Note = Callable[[str], None]
# Called with the bytes that were compared since the last call.
Progress = Callable[[int], None]
# Given the bytes that a level will compare, a context in which it reports those it has.
Meter = Callable[[int], AbstractContextManager[Progress]]


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ParityOptions:
    """See `moeconv verify --help`.

    Attributes:
        tokens: Positions of running text, and as many of random ids.
        prompts: Text to run instead of the run's own.
        dtype: What the converted model is computed in.
        against: A Hugging Face model to compare with, None for MaxText.
        config: MaxText YAML of the run, None for its sidecar or the manifest.
        accept: Settings of it that no known MaxText has, and that decide nothing.
        scratch: Where layers are laid out, None for the system's temporary folder.
    """

    tokens: int = 512
    prompts: Path | None = None
    dtype: str = "float32"
    against: Path | None = None
    config: Path | None = None
    accept: tuple[str, ...] = ()
    scratch: Path | None = None

    @property
    def reference_kind(self) -> Literal["maxtext", "hf"]:
        """Which kind of model is compared with."""
        return "maxtext" if self.against is None else "hf"


@dataclass(frozen=True)
class VerifyOptions:
    """What is verified, and with how much.

    Attributes:
        levels: Which ones.
        jobs: Chunks worked on at the same time.
        memory: Bytes that level weights may take.
        parity: Of the levels logits and layers.
        skip: True to skip a level whose packages are missing, or whose checkpoint is not there or
            cannot be read where it is; otherwise that is an error. A checkpoint that
            the user named must be there.
    """

    levels: Sequence[str] = tuple(LEVELS)
    jobs: int = 2
    memory: int = 4 << 30
    parity: ParityOptions = field(default_factory=ParityOptions)
    skip: bool = False


@contextmanager
def unseen(total: int) -> Iterator[Progress]:
    """A meter that shows nothing."""
    yield lambda done: None


def parse_against(text: str) -> Path | None:
    """`maxtext` (None) or `hf:DIR`.

    Raises:
        UsageError: It is neither.
    """
    if text == "maxtext":
        return None
    kind, separator, folder = text.partition(":")
    if kind != "hf" or not separator or not folder:
        raise UsageError(f"--against {text} is neither maxtext nor hf:DIR")
    if is_address(folder):
        raise UsageError(f"--against: {without_access(folder)} is an address; give a local folder")
    return Path(folder)
