"""Proof records: what was proven, when, and the SHA-256 of everything that it depends on.

`make prove` writes one file for each proof into tests/proofs/ (proof_plugin.py). A record is
current while its digest is that of the tree: the Python files that its tests import, at any depth,
start, or name in a string, without comments and docstrings; what lies in their packages besides;
the pins; and the `inputs` of the proof's marker.
"""

import ast
import functools
import hashlib
import re
import tomllib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pydantic import BaseModel, ConfigDict

RECORDS = "tests/proofs"
# What `make test-slow` spends on proofs whose record is current.
BUDGET_SECONDS = 240.0
_PINS = "requirements/dev.txt"
_PACKAGES = {"moeconv": "moeconv", "moeconv_train": "train"}
_FILE_NAME = re.compile(r"[\w-]+\.\w+")
_MODULE_NAME = re.compile(rf"\b(?:{'|'.join(_PACKAGES)})(?:\.\w+)+")


class Claim(BaseModel):
    """What a proof consists of, as its marker says.

    `inputs` are globs of files that no import shows; `without` are globs of modules that are named
    and never imported by its tests.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tests: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def digest(self, tree: "Tree") -> str:
        """The SHA-256 of everything it depends on."""
        modules = sorted({test.partition("::")[0] for test in self.tests})
        return tree.digest([*modules, *self.inputs, _PINS], self.without)


class Record(Claim):
    """A proof that was run whole, and passed."""

    date: date
    seconds: float
    cores: int
    python: str
    sha256: str

    @property
    def claim(self) -> Claim:
        """What was claimed when it was run."""
        return Claim(**{name: getattr(self, name) for name in Claim.model_fields})

    def is_current(self, tree: "Tree") -> bool:
        """True if all that it depends on is as it was."""
        try:
            return self.digest(tree) == self.sha256
        except FileNotFoundError:
            return False

    def write(self, root: Path) -> None:
        """Replaces the proof's file in a checkout."""
        path = root / RECORDS / f"{self.name.replace(' ', '_')}.json"
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_records(root: Path) -> dict[str, Record]:
    """All records of a checkout, by the name of the proof."""
    paths = sorted((root / RECORDS).glob("*.json"))
    records = [Record.model_validate_json(path.read_bytes()) for path in paths]
    return {record.name: record for record in records}


def sample(records: Collection[Record], day: date, budget: float = BUDGET_SECONDS) -> set[str]:
    """The proofs that are run again on that day though their record is current.

    A part that changes each day, so that every proof has its turn; then, as far as the budget
    goes, those that were renewed last.
    """
    if not records:
        return set()
    parts = _parts(records, budget / 2)
    chosen = parts[day.toordinal() % len(parts)]
    for record in sorted(records, key=lambda r: (-r.date.toordinal(), _draw(day, r.name))):
        if record not in chosen and sum(r.seconds for r in [*chosen, record]) <= budget:
            chosen.append(record)
    return {record.name for record in chosen}


def _parts(records: Collection[Record], limit: float) -> list[list[Record]]:
    """All records in parts of at most so many seconds; a longer one is alone."""
    parts: list[list[Record]] = []
    for record in sorted(records, key=lambda r: (-r.seconds, r.name)):
        for part in parts:
            if sum(r.seconds for r in [*part, record]) <= limit:
                part.append(record)
                break
        else:
            parts.append([record])
    return parts


def _draw(day: date, name: str) -> str:
    return hashlib.sha256(f"{day}{name}".encode()).hexdigest()


@dataclass(frozen=True)
class _Source:
    """A Python file: its code, and what it asks for."""

    sha256: str
    names: frozenset[str]
    files: frozenset[str]


class Tree:
    """A checkout, each of whose files is read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        self._paths = [root / p for p in settings["tool"]["pytest"]["ini_options"]["pythonpath"]]
        self.source = functools.cache(_source)

    def digest(self, inputs: Sequence[str], without: Sequence[str] = ()) -> str:
        """The SHA-256 of the files that these need.

        Raises:
            FileNotFoundError: A glob of `inputs` or `without` fits no file.
        """
        digest = hashlib.sha256()
        for path in sorted(self.files(inputs, without)):
            if path.suffix == ".py":
                content = self.source(path).sha256
            else:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(self.root)} {content}\n".encode())
        return digest.hexdigest()

    def files(self, inputs: Sequence[str], without: Sequence[str] = ()) -> set[Path]:
        """The files that fit, and all that these need."""
        left = {path for glob in without for path in self._fitting(glob)}
        found: set[Path] = set()
        waiting = [path for glob in inputs for path in self._fitting(glob)]
        while waiting:
            path = waiting.pop()
            if path not in found and path not in left:
                found.add(path)
                if path.suffix == ".py":
                    waiting += self._needed(path)
        return found

    def _fitting(self, glob: str) -> list[Path]:
        found = [path for path in self.root.glob(glob) if path.is_file()]
        if not found:
            raise FileNotFoundError(f"no file fits {glob}")
        return found

    def _needed(self, path: Path) -> Iterator[Path]:
        """What a Python file needs at first hand."""
        source = self.source(path)
        for name in source.names:
            yield from self._module(name, path.parent)
        yield from (path.parent / n for n in source.files if (path.parent / n).is_file())
        parts = path.relative_to(self.root).parts
        if parts[0] in _PACKAGES.values():
            yield from _data(path.parent)
        elif parts[0] == "tests":
            folders = [self.root.joinpath(*parts[:n]) for n in range(1, len(parts))]
            yield from (f / "conftest.py" for f in folders if (f / "conftest.py").exists())

    def _module(self, name: str, folder: Path) -> list[Path]:
        """The files of `a.b.c`: its packages, and as much of it as is a module."""
        top, *rest = name.split(".")
        for base in (
            self.root / _PACKAGES.get(top, top),
            folder / top,
            *(path / top for path in self._paths),
        ):
            if not (base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()):
                continue
            found = []
            for length in range(len(rest) + 1):
                module = base.joinpath(*rest[:length])
                found += [module / "__init__.py", module.with_suffix(".py")]
            return [each for each in found if each.is_file()]
        return []


def _data(folder: Path) -> Iterator[Path]:
    """Files of a package that are not Python, and of folders that are no packages."""
    for path in folder.iterdir():
        if path.is_dir() and not (path / "__init__.py").exists():
            yield from _data(path)
        elif path.is_file() and path.suffix not in (".py", ".pyc"):
            yield path


def _source(path: Path) -> _Source:
    tree = ast.parse(path.read_bytes())
    names, files = set(), set()
    code = hashlib.sha256("".join(_dump(tree)).encode()).hexdigest()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(_MODULE_NAME.findall(node.value))
            if _FILE_NAME.fullmatch(node.value):
                files.add(node.value)
    return _Source(code, frozenset(names), frozenset(files))


def _dump(node: object) -> Iterator[str]:
    """The code alone, alike in every Python that has the same syntax; takes docstrings away."""
    if isinstance(node, list):
        for each in node:
            yield from _dump(each)
    elif isinstance(node, ast.AST):
        body = getattr(node, "body", None)
        documented = isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        )
        if documented and ast.get_docstring(node, clean=False) is not None:
            del body[0]
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if value is not None and value != []:
                yield f" {name}="
                yield from _dump(value)
        yield ")"
    else:
        yield repr(node)
