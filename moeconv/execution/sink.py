"""Where the values of a conversion go, one side of it as far as it is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from moeconv.artifact.manifest import FileRecord
from moeconv.execution.safetensors_sink import SafetensorsSink
from moeconv.planning.orbax_output import OrbaxOutput
from moeconv.planning.output import Output, SafetensorsOutput
from moeconv.tensor.axes import Array, Ranges
from moeconv.tensor.form import Form


class Sink(Protocol):
    """Takes pieces of target arrays, in any order and from several threads; makes files of them.

    A piece is a box of a target, as ranges on the axes of its form. A conversion writes the pieces
    that the plan's `Output` takes, and others once they are assembled to such.
    """

    def write(self, target: str, form: Form, ranges: Ranges, values: Array) -> None:
        """Writes a piece.

        Args:
            target: Name of the array.
            form: How the piece was made.
            ranges: The box, on `form.target_axes`.
            values: C-contiguous.
        """

    def fill(self, target: str, values: Array) -> None:
        """Writes a whole target that comes from no source."""

    def checksum(self, target: str, form: Form, ranges: Ranges, size: int, before: int) -> int:
        """CRC-32 of what is stored of a piece of `size` bytes.

        Args:
            target: Name of the array.
            form: How the piece was made.
            ranges: Its box.
            size: Its bytes.
            before: CRC-32 of the bytes before it.
        """

    def completed(self, target: str) -> None:
        """Notes that every value of a target is written."""

    def start(self) -> None:
        """Begins to hash what is complete."""

    def sync(self) -> None:
        """Makes safe on disk what was written so far."""

    def finish(self) -> Mapping[str, FileRecord]:
        """Waits until everything is complete; every file by its name, relative to the folder.

        Raises:
            OSError: A file could not be read back.
        """

    def close(self) -> None:
        """Stops hashing and closes the files."""


def open_sink(output: Output, folder: Path, *, keep: bool) -> Sink:
    """The sink of an output.

    Args:
        output: What the plan says of the files.
        folder: The staging directory.
        keep: Reopens what an earlier process has written.

    Raises:
        OutputError: The disk has no room, or a file to reopen is not there as it was left.
    """
    if isinstance(output, SafetensorsOutput):
        return SafetensorsSink(folder, output, keep=keep)
    if isinstance(output, OrbaxOutput):
        from moeconv.execution.orbax_sink import OrbaxSink

        return OrbaxSink(folder, output, keep=keep)
    raise TypeError(f"no sink writes an output of kind {output.kind}")
