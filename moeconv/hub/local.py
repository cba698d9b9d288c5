"""An output of `convert` as it lies on the disk: its manifest, its verdict, every file's digest."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from moeconv.arch.description import ModelDescription
from moeconv.convert.beside import is_output_name
from moeconv.convert.manifest import MANIFEST_NAME, Manifest
from moeconv.convert.stamps import Stamp, stamp
from moeconv.errors import NotACheckpointError, OutputError
from moeconv.untrusted.files import is_file, read_inside
from moeconv.verify.report import REPORT_NAME, Report
from moeconv.verify.structure import sha256

_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# How deep below the current directory an output is looked for.
_DEPTH = 4


@dataclass(frozen=True)
class File:
    """One file as it is to be on the Hub.

    Attributes:
        name: Its name there.
        size: In bytes.
        sha256: Its digest.
        path: Where it lies; None when `content` has it.
        content: What is sent instead of a file on the disk.
    """

    name: str
    size: int
    sha256: str
    path: Path | None = None
    content: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, content: bytes) -> "File":
        """A file that lies nowhere."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content=content)

    def read(self) -> bytes:
        """All of it."""
        if self.content is not None:
            return self.content
        assert self.path is not None
        return read_own(self.path.parent, self.path.name)

    @property
    def is_text(self) -> bool:
        """Whether it is neither weights nor a picture."""
        return not self.name.endswith((".safetensors", ".png", ".model"))

    @cached_property
    def git_oid(self) -> str:
        """What git calls it, where it is no LFS file."""
        return hashlib.sha1(b"blob %d\0" % self.size + self.read()).hexdigest()


@dataclass(frozen=True)
class Output:
    """An output of `convert`; its weights are read when their digests are asked for, once.

    Attributes:
        folder: Where it lies.
        manifest: What it claims.
        report: `verify.json`, None when there is none.
        unreadable: `verify.json` is there, but is no report.
    """

    folder: Path
    manifest: Manifest
    report: Report | None
    unreadable: bool = False

    @classmethod
    def open(cls, folder: Path) -> "Output":
        """Reads the manifest and the verdict.

        Raises:
            NotACheckpointError: It is no output of `convert`.
            OutputError: The manifest is damaged, or names what convert never writes.
        """
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise NotACheckpointError(f"{folder} does not exist; give an output of moeconv convert")
        try:
            manifest = Manifest.model_validate(
                json.loads(read_inside(folder, MANIFEST_NAME, links=False))
            )
            manifest.description()  # what describes no model is no manifest
        except FileNotFoundError:
            raise NotACheckpointError(
                f"{folder} has no {MANIFEST_NAME}, so it was not written by moeconv convert"
            ) from None
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
            raise OutputError(
                f"{path} is not a manifest that this moeconv can read; convert again"
            ) from None
        if foreign := sorted(name for name in manifest.files if not is_output_name(name)):
            raise OutputError(
                f"{path} names {', '.join(foreign)}, which moeconv convert never writes; nothing "
                "is sent, convert again"
            )
        report, unreadable = _read_report(folder)
        return cls(folder, manifest, report, unreadable)

    @property
    def names(self) -> list[str]:
        """The files it consists of, the manifest's own included."""
        return sorted({*self.manifest.files, MANIFEST_NAME})

    @property
    def missing(self) -> list[str]:
        """Files that are not there."""
        return [name for name in self.names if not is_own(self.folder, name)]

    @cached_property
    def _seen(self) -> dict[str, tuple[Stamp | None, str]]:
        """By name: what tells the file from a later one, taken before it was read; its SHA-256.

        Raises:
            OutputError: A file cannot be read.
        """
        seen = {}
        for name in self.names:
            here = self.folder / name
            seen[name] = stamp(here), sha256(here, links=False)
        return seen

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {name: digest for name, (_, digest) in self._seen.items()}

    @property
    def stamps(self) -> dict[Path, Stamp | None]:
        """What tells each file from a later one, taken before it was read."""
        return {self.folder / name: before for name, (before, _) in self._seen.items()}

    @cached_property
    def model(self) -> ModelDescription:
        """The model that the manifest describes."""
        return self.manifest.description()

    @cached_property
    def changed(self) -> list[str]:
        """Files that are not as convert wrote them."""
        records, digests = self.manifest.files, self.digests
        return [n for n, record in records.items() if digests[n] != record.sha256]

    @property
    def dataset(self) -> str | None:
        """The Hub's id of the training data, where that is what the run told."""
        run = self.manifest.run
        name = run.facts.dataset if run is not None and run.facts is not None else None
        return name if name is not None and _DATASET.fullmatch(name) else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer is part of it."""
        return "tokenizer.json" in self.manifest.files

    def left_behind(self, sent: Iterable[str]) -> list[str]:
        """What lies in the folder and is not sent."""
        known = set(sent)
        return sorted(
            f"{p.name}/" if p.is_dir() else p.name
            for p in self.folder.iterdir()
            if p.name not in known
        )


def read_own(folder: Path, name: str) -> bytes:
    """Content of a file of OUT: no link, as what it leads to would go to the Hub.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        return read_inside(folder, name, links=False)
    except OSError as error:
        raise OutputError(f"{folder / name} cannot be read: {error.strerror}") from None


def is_own(folder: Path, name: str) -> bool:
    """Whether OUT has such a file.

    Raises:
        OutputError: It is a link, or no regular file.
    """
    try:
        return is_file(folder, name, links=False)
    except OSError as error:
        raise OutputError(f"{folder / name} cannot be read: {error.strerror}") from None


def _read_report(folder: Path) -> tuple[Report | None, bool]:
    try:
        return Report.read(read_inside(folder, REPORT_NAME, links=False)), False
    except FileNotFoundError:
        return None, False
    except (OSError, ValueError, RecursionError, ValidationError):
        return None, True


def newest_output(below: Path) -> Path | None:
    """The output of `convert` that was written last, at most four folders below."""
    found = [(path.stat().st_mtime_ns, path.parent) for path in _manifests(below, _DEPTH)]
    return max(found)[1] if found else None


def _manifests(folder: Path, depth: int) -> Iterator[Path]:
    if _is_output(folder):
        yield folder / MANIFEST_NAME
        return
    if depth == 0:
        return
    try:
        children = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink())
    except OSError:
        return
    for child in children:
        if not child.name.startswith("."):
            yield from _manifests(child, depth - 1)


def _is_output(folder: Path) -> bool:
    """Whether it holds a manifest; a run's sidecar has the same name."""
    try:
        content = json.loads(read_inside(folder, MANIFEST_NAME, links=False))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == "moeconv"
