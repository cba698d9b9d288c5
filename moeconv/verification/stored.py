"""The tensors of an output, by their files' headers."""

from dataclasses import dataclass
from pathlib import Path

from moeconv.hf.safetensors import TensorSpec, read_header
from moeconv.verification.boundary import blaming


@dataclass(frozen=True)
class Stored:
    """A tensor: how its bytes are laid out, its file, and the byte at which it begins there."""

    spec: TensorSpec
    file: Path
    offset: int


def stored_tensors(out: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files, by name.

    Raises:
        CandidateError: A header cannot be read.
    """
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        with blaming(f"{file} cannot be read", check="tensors"):
            header = read_header(file)
        for name, (spec, offset) in header.items():
            found[name] = Stored(spec, file, offset)
    return found
