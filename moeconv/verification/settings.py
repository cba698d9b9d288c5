"""What the user chose about the comparison of logits and layers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeconv.errors import UsageError
from moeconv.untrusted.files import is_address, without_access

# Called with what is being done, for people who wait.
Note = Callable[[str], None]

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
    def side(self) -> Literal["maxtext", "hf"]:
        """Which kind of model is compared with."""
        return "maxtext" if self.against is None else "hf"


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
