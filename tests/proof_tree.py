"""The SHA-256 of what a test depends on: found in the code, and without comments and docstrings."""

import ast
import functools
import hashlib
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_PACKAGES = {"moeconv": "moeconv", "moeconv_train": "train"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_FILE_NAME = re.compile(r"[\w-]+\.\w+")
_OWN_MODULES = ("f'{__name__}.{", 'f"{__name__}.{')
_MODULE_NAME = re.compile(rf"\b(?:{'|'.join(_PACKAGES)})(?:\.\w+)+")


@dataclass(frozen=True)
class _Source:
    """A Python file: its code, and what it asks for."""

    sha256: str
    names: frozenset[str]
    files: frozenset[str]


class Tree:
    """A checkout, each of whose files is read once, and followed once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        self._paths = [root / p for p in settings["tool"]["pytest"]["ini_options"]["pythonpath"]]
        self.source = functools.cache(_source)
        self.needed = functools.cache(lambda path: frozenset(self._needed(path)))

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
        folders = {folder for path in waiting for folder in path.relative_to(self.root).parents}
        waiting += [each for folder in folders for each in self.root.glob(f"{folder}/conftest.py")]
        while waiting:
            path = waiting.pop()
            if path not in found and path not in left:
                found.add(path)
                if path.suffix == ".py":
                    waiting += self.needed(path)
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
        found = (each for name in source.files for each in path.parent.glob(name))
        yield from (each for each in found if each.is_file())
        if path.relative_to(self.root).parts[0] in _PACKAGES.values():
            yield from _data(path.parent)

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
    for node in list(ast.walk(tree)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]  # nothing of it is run
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.JoinedStr) and ast.unparse(node).startswith(_OWN_MODULES):
            files.add("*.py")  # modules of the package that are found by their names
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(_MODULE_NAME.findall(node.value))
            if _FILE_NAME.fullmatch(node.value):
                files.add(node.value)
    code = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()
    return _Source(code, frozenset(names), frozenset(files))
