"""An output of `convert` as it is on the disk: its manifest, its verdict, every file's digest."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moeconv.arch.description import ModelDescription
from moeconv.artifact.manifest import Manifest, manifest_name
from moeconv.artifact.names import is_output_name
from moeconv.errors import NotACheckpointError, OutputError, UnsupportedError
from moeconv.families import targets
from moeconv.hub.weights import Weights
from moeconv.mapping.edges import cannot_hold
from moeconv.maxtext.sidecar import SIDECAR_NAME
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import is_file, read_inside
from moeconv.untrusted.text import printable
from moeconv.verification.checks import first_line
from moeconv.verification.report.markdown import to_markdown
from moeconv.verification.report.report import REPORT_NAME, Report

_DATASET = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Of a manifest or report: far more than a model of any size has.
_JSON_LIMIT = 64 * 2**20
# How deep below the current directory an output is looked for.
_DEPTH = 4


@dataclass(frozen=True)
class File:
    """One file as it is to be on the Hub.

    Attributes:
        name: Its name there.
        size: In bytes.
        sha256: Its digest.
        content: All of it, read once: what was looked at is what is sent; None of weights.
        weights: A file too large for that.
        path: Where it is stored, if it is sent as it is.
    """

    name: str
    size: int
    sha256: str
    content: bytes | None = field(default=None, repr=False)
    weights: Weights | None = None
    path: Path | None = None

    @classmethod
    def of(cls, name: str, content: bytes, path: Path | None = None) -> "File":
        """A file that is kept in memory."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content, path=path)

    @classmethod
    def read(cls, folder: Path, name: str) -> "File":
        """A file of OUT.

        Raises:
            OutputError: It cannot be read.
        """
        path = folder / name
        if not name.endswith(".safetensors"):
            return cls.of(name, read_own(folder, name), path)
        weights = Weights.read(folder, name)
        return cls(name, weights.size, weights.sha256, weights=weights, path=path)

    @property
    def looked_at(self) -> bytes:
        """What may hold a secret: all of it, or of weights the header with its names."""
        return self.weights.header if self.weights is not None else self.content or b""

    @cached_property
    def git_oid(self) -> str:
        """What git calls it, where it is no LFS file."""
        digest = hashlib.sha1(b"blob %d\0" % self.size)
        for chunk in self.weights.chunks() if self.weights else (self.looked_at,):
            digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True)
class Output:
    """An output of `convert`; its files are read when they are asked for, once.

    Attributes:
        folder: Where it is stored.
        manifest: What it claims.
        raw: The manifest's bytes.
        manifest_name: Its file's name.
        report: `verify.json`, None when there is none.
        unreadable: Why `verify.json` is no report, where it is there.
    """

    folder: Path
    manifest: Manifest
    raw: bytes = field(repr=False)
    manifest_name: str
    report: Report | None
    unreadable: str | None = None

    @classmethod
    def open(cls, folder: Path) -> "Output":
        """Reads the manifest and the verdict.

        Raises:
            NotACheckpointError: It is no output of `convert`.
            UnsupportedError: It is an adapter.
            OutputError: The manifest is damaged, or names what convert never writes.
        """
        name = manifest_name(folder)
        path = folder / name
        try:
            if not folder.is_dir():
                raise NotACheckpointError(
                    f"{folder} does not exist; give an output of moeconv convert"
                )
            raw = read_inside(folder, name, links=False, limit=_JSON_LIMIT)
        except (FileNotFoundError, ValueError):  # ValueError: a NUL in the path
            if os.path.lexists(folder / SIDECAR_NAME):
                raise _is_run(folder) from None
            raise NotACheckpointError(
                f"{folder} has no {name}, so it was not written by moeconv convert"
            ) from None
        except OSError as error:
            raise OutputError(f"{path} cannot be read: {error.strerror}") from None
        try:
            content = strict_json.loads(raw)
            if isinstance(content, dict) and content.get("format") == "moeconv-run":
                raise _is_run(folder)
            demand_plain(content)
            manifest = Manifest.model_validate(content)
            # What describes no model, or one that its target cannot hold, is no manifest.
            if reason := cannot_hold(targets()[manifest.target], manifest.description()):
                raise ValueError(reason)
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            raise OutputError(
                f"{path} is not a manifest that this moeconv can read; convert again"
            ) from None
        if manifest.kind == "peft":
            raise UnsupportedError(
                f"{folder} is a LoRA adapter for PEFT, and push sends whole models; send it with "
                "hf upload REPO FOLDER, or convert its base with --merge-lora and push that"
            )
        if foreign := sorted(name for name in manifest.files if not is_output_name(name)):
            raise OutputError(
                f"{path} names {printable(', '.join(foreign))[:200]}, which moeconv convert never "
                "writes; nothing is sent, convert again"
            )
        return cls(folder, manifest, raw, name, *_read_report(folder))

    @property
    def names(self) -> list[str]:
        """The files it consists of, the manifest's own included."""
        return sorted({*self.manifest.files, self.manifest_name})

    @property
    def missing(self) -> list[str]:
        """Files that are not there."""
        return [name for name in self.names if not is_own(self.folder, name)]

    @cached_property
    def files(self) -> dict[str, File]:
        """Each file as it is stored.

        Raises:
            OutputError: One cannot be read.
        """
        name = self.manifest_name
        manifest = File.of(name, self.raw, self.folder / name)
        found = {each: File.read(self.folder, each) for each in self.manifest.files}
        return {**found, name: manifest}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {name: file.sha256 for name, file in self.files.items()}

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
        """The Hub's id of the training data, where the run names one."""
        run = self.manifest.run
        name = run.facts.dataset if run is not None and run.facts is not None else None
        return name if name is not None and _DATASET.fullmatch(name) else None

    @property
    def has_tokenizer(self) -> bool:
        """True if the tokenizer is part of it."""
        return "tokenizer.json" in self.manifest.files

    def left_behind(self, sent: Iterable[str]) -> list[str]:
        """Files in the folder that are not sent."""
        known = set(sent)
        try:
            there = sorted(self.folder.iterdir())
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be listed: {error.strerror}") from None
        return [f"{p.name}/" if p.is_dir() else p.name for p in there if p.name not in known]


def _is_run(folder: Path) -> NotACheckpointError:
    return NotACheckpointError(
        f"{folder} is a training run; give the output of `moeconv convert {folder} OUT`"
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
    """True if OUT has such a file.

    Raises:
        OutputError: It is a link, or no regular file.
    """
    try:
        return is_file(folder, name, links=False)
    except OSError as error:
        raise OutputError(f"{folder / name} cannot be read: {error.strerror}") from None


def _read_report(folder: Path) -> tuple[Report | None, str | None]:
    """The report, or why what is there is none."""
    try:
        content = strict_json.loads(
            read_inside(folder, REPORT_NAME, links=False, limit=_JSON_LIMIT)
        )
        demand_plain(content)
        report = Report.of(content)
        to_markdown(report, ())  # figures that cannot be shown are none
    except FileNotFoundError:
        return None, None
    except OSError as error:
        return None, error.strerror or type(error).__name__
    except ValidationError as error:
        first = error.errors()[0]
        return None, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        return None, first_line(error)
    except RecursionError:
        return None, "it is nested too deeply"
    return report, None


def demand_plain(content: Any) -> None:
    """Refuses JSON with numbers that no count, digest or figure is.

    Raises:
        ValueError: There is one.
    """
    if isinstance(content, int) and not -(2**63) <= content < 2**63:
        raise ValueError("it holds a number of more than 64 bits")
    if isinstance(content, dict | list):
        for one in content.values() if isinstance(content, dict) else content:
            demand_plain(one)


def newest_output(below: Path) -> Path | None:
    """The output of `convert` that was written last, at most four folders below."""
    found = [(path.stat().st_mtime_ns, path.parent) for path in _manifests(below, _DEPTH)]
    return max(found)[1] if found else None


def _manifests(folder: Path, depth: int) -> Iterator[Path]:
    if _is_output(folder):
        yield folder / manifest_name(folder)
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
    """True if it holds a manifest; a run's sidecar once had the same name."""
    try:
        content = strict_json.loads(
            read_inside(folder, manifest_name(folder), links=False, limit=_JSON_LIMIT)
        )
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == "moeconv"
