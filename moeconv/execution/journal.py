"""The journal of a conversion under way: what is safely on disk, so that `--resume` can go on.

One JSON line each, appended after the data it speaks of was synced: first the plan's digest, then
finished units, and assemblies of spilled pieces. Each line has a checksum
of its own and one of the bytes that it speaks of: a journal is believed as far as it is whole, and
the files as far as they are what it says.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from moeconv.execution.own_files import open_own
from moeconv.planning.units import Unit
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import read_inside

NAME = "journal.jsonl"

Position = tuple[int, ...]


@dataclass(frozen=True)
class Done:
    """What is recorded of a finished unit.

    Attributes:
        chunks: SHA-256 of each chunk as it was read, by its place in the grid.
        missing: Chunks that the checkpoint does not store.
        written: CRC-32 of the bytes that went to their places, in the order of the routes.
    """

    chunks: Mapping[Position, str]
    missing: Sequence[Position]
    written: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in a line."""
        return {
            "chunks": [[list(position), digest] for position, digest in self.chunks.items()],
            "missing": [list(position) for position in self.missing],
            "written": self.written,
        }

    @classmethod
    def from_json(cls, entry: Any, unit: Unit) -> Self:
        """From a line; ValueError (or KeyError, TypeError) where it is none of this unit."""
        chunks = {tuple(position): str(digest) for position, digest in entry["chunks"]}
        missing = [tuple(position) for position in entry["missing"]]
        if chunks.keys() != {p for p, _ in unit.chunks()} or not chunks.keys() >= set(missing):
            raise ValueError
        return cls(chunks, missing, int(entry["written"]))


class Journal:
    """An append-only file in the staging directory.

    Attributes:
        done: Finished units, by number.
        assemblies: Those whose pieces are in their places, with the CRC-32 of their bytes.
        resumed: An earlier process's journal is taken over.
        notes: Sentences for people.
    """

    def __init__(
        self,
        folder: Path,
        plan_digest: str,
        *,
        units: Sequence[Unit] = (),
        assemblies: Collection[str] = (),
        resume: bool,
    ) -> None:
        """Opens it; with `resume` takes over what an earlier process wrote for the same plan.

        Args:
            folder: The staging directory.
            plan_digest: Of the plan.
            units: The plan's.
            assemblies: The names of its assemblies.
            resume: True to take over what an earlier process did.

        Raises:
            ValueError: There is a journal, but of another plan.
            OSError: It cannot be read or written.
        """
        self.done: dict[int, Done] = {}
        self.assemblies: dict[str, int] = {}
        self.resumed = False
        self.notes: list[str] = []
        self._units, self._names = units, assemblies
        whole = 0
        if resume:
            with contextlib.suppress(FileNotFoundError):
                whole = self._read(read_inside(folder, NAME), plan_digest)
        self._fd = open_own(folder / NAME, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self._fd, whole)
        os.lseek(self._fd, whole, os.SEEK_SET)
        if not self.resumed:
            self._append({"plan": plan_digest})

    def _read(self, raw: bytes, plan_digest: str) -> int:
        """Takes over what is whole; how many bytes that is."""
        end = 0
        for number, line in enumerate(raw.split(b"\n"), 1):
            if end + len(line) == len(raw):
                break  # no line's end: the last line of a process that died while writing it
            try:
                self._take(_checked(line), plan_digest, first=number == 1)
            except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
                if isinstance(error, _AnotherPlanError):
                    raise ValueError("the journal is of another plan") from None
                self.notes.append(
                    f"warning: line {number} of the unfinished conversion's {NAME} is damaged; "
                    + ("what comes after it is done again" if self.resumed else "beginning anew")
                )
                break
            end += len(line) + 1
        return end

    def _take(self, entry: dict[str, Any], plan_digest: str, *, first: bool) -> None:
        if first:
            if entry["plan"] != plan_digest:
                raise _AnotherPlanError
            self.resumed = True
        elif "assembled" in entry:
            if entry["assembled"] not in self._names:
                raise ValueError
            self.assemblies[entry["assembled"]] = int(entry["written"])
        else:
            number = entry["unit"]
            if type(number) is not int or number < 0:
                raise ValueError
            self.done[number] = Done.from_json(entry, self._units[number])

    def unit(self, number: int, done: Done) -> None:
        """Records a unit whose bytes are synced."""
        self._append({"unit": number, **done.to_json()})

    def assembled(self, name: str, written: int) -> None:
        """Records an assembly whose pieces are in their places, synced."""
        self._append({"assembled": name, "written": written})

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps({**entry, "sum": _sum(entry)}) + "\n"
        data = line.encode()
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)


class _AnotherPlanError(ValueError):
    """The journal is whole, and speaks of another conversion."""


def _sum(entry: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry, sort_keys=True).encode())


def _checked(line: bytes) -> dict[str, Any]:
    """A line's content; ValueError (or KeyError, TypeError) where it is not as it was written."""
    entry = strict_json.loads(line)
    if not isinstance(entry, dict) or entry.pop("sum") != _sum(entry):
        raise ValueError
    return entry
