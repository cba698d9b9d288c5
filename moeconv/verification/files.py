"""Reading the files of OUT, which anybody can have written."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeconv.errors import ConfigError
from moeconv.untrusted.files import UnsafeFileError, demand_inside, open_inside, read_inside
from moeconv.untrusted.strict_json import loads
from moeconv.untrusted.text import printable
from moeconv.verification.boundary import blaming
from moeconv.verification.checks import CandidateError

INDEX_NAME = "model.safetensors.index.json"
# The folder that transformers looks into for more chat templates (its `utils/hub.py`).
_TEMPLATES = "additional_chat_templates"
_HASH_BLOCK = 1 << 20


def sha256(path: Path, *, links: bool = True) -> str:
    """SHA-256 of a file directly in OUT; `links` as in `open_inside`.

    Raises:
        CandidateError: It is not there, or no file that may be read; the check is `files`.
        MachineError: It cannot be read here.
    """
    digest = hashlib.sha256()
    with (
        blaming(f"{path} cannot be read", check="files"),
        open_inside(path.parent, path.name, links=links) as file,
    ):
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_object(path: Path, check: str = "config") -> dict[str, Any]:
    """A JSON object of OUT.

    Raises:
        CandidateError: The file holds none, or cannot be read.
        MachineError: It cannot be read here.
    """
    with blaming(f"{path} cannot be read as JSON", check=check):
        content = loads(read_inside(path.parent, path.name))
    if not isinstance(content, dict):
        raise CandidateError(f"{path} is no JSON object", check)
    return content


def demand_loadable_files(folder: Path) -> None:
    """A model's folder that transformers may be given, which opens what it finds there.

    Raises:
        ConfigError: A link in it leads out, or something there is no regular file.
    """
    try:
        demand_inside(folder)
        with suppress(FileNotFoundError, NotADirectoryError):
            demand_inside(folder / _TEMPLATES)
        _demand_own_shards(folder)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def _demand_own_shards(folder: Path) -> None:
    """Refuses an index with names that lead out: transformers opens the files that it names."""
    try:
        index = loads(read_inside(folder, INDEX_NAME))
        names = {str(name) for name in index["weight_map"].values()}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # no index, or one that nothing is read by; level structure says so
    if out := sorted(name for name in names if "/" in name):
        first = printable(out[0][:200])
        raise UnsafeFileError(folder / INDEX_NAME, f"it names {first}, which leads out of {folder}")
