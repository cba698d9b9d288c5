"""What OUT may be, and what stands there already."""

import contextlib
import json
from pathlib import Path
from typing import Any

from moeconv.artifact.manifest import MANIFEST_NAMES, manifest_name
from moeconv.artifact.names import KNOWN, LOSS_PLOT, VERDICT, is_leftover
from moeconv.errors import OutputError
from moeconv.maxtext.sidecar import SIDECAR_NAME
from moeconv.untrusted.files import is_address, read_inside, without_access

# Files next to a model that are not the user's own.
_OURS = {*MANIFEST_NAMES, LOSS_PLOT, *VERDICT, ".gitattributes", ".cache"}
# What every config.json of transformers has.
_NAMED_BY = ("architectures", "model_type")


def resolve_out(out: Path) -> Path:
    """OUT as an absolute path without symbolic links; never a folder that people live in.

    Raises:
        OutputError: It is no path, or the current directory, the home directory or one above them.
    """
    if is_address(out):
        raise OutputError(
            f"OUT {without_access(out)} is an address, and moeconv writes to folders of "
            "this machine only; name a local folder, and copy it when it is verified"
        )
    try:
        place = Path(out).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, or ~name of no user
        raise OutputError(f"OUT {out} is no path that can be written: {error}") from None
    for name, find in (("current", Path.cwd), ("home", Path.home)):
        with contextlib.suppress(OSError, RuntimeError):  # there may be none
            here = find().resolve()
            if place == here or place in here.parents:
                is_it = "is" if place == here else f"contains {here},"
                raise OutputError(
                    f"OUT {out} {is_it} the {name} directory, which is never replaced; name a new "
                    "directory"
                )
    return place


def holds_something(out: Path) -> bool:
    """Returns True if OUT is a folder that is not empty.

    Raises:
        OutputError: It is a link; those that the user named were followed before.
    """
    if out.is_symlink():
        raise OutputError(f"OUT {out} was just replaced by a link; look who did so")
    return out.is_dir() and any(out.iterdir())


def is_replaceable(out: Path) -> bool:
    """Returns True if a folder looks like a model, or holds only a card or a license.

    A training run is no model, whichever name its sidecar has; nor is a project with a config.json.
    A model has no folders.
    """
    found = [path for path in out.iterdir() if not is_leftover(path)]
    if any(_is_folder(path) for path in found if path.name != ".cache"):
        return False
    if all(path.name in KNOWN for path in found):
        return True
    try:
        records = [_object(out, name) for name in (*MANIFEST_NAMES, SIDECAR_NAME)]
        config = _object(out, "config.json")
    except OSError:
        return False  # what a link hides may be a run's
    formats = [each["format"] for each in records if isinstance(each, dict) and "format" in each]
    if formats:
        return all(each == "moeconv" for each in formats)
    named = isinstance(config, dict) and not config.keys().isdisjoint(_NAMED_BY)
    return named and any(path.suffix == ".safetensors" for path in found)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def foreign_entries(out: Path) -> list[str]:
    """Files in OUT that are not part of the old model and would be removed with it."""
    try:
        content = _object(out, manifest_name(out))
    except OSError:
        content = None
    files = content.get("files") if isinstance(content, dict) else None
    known = {*_OURS, *(files if isinstance(files, dict) else ())}
    return sorted(path.name for path in out.iterdir() if path.name not in known)


def _object(out: Path, name: str) -> Any:
    """What a file holds; None where there is none, or it is no JSON."""
    try:
        return json.loads(read_inside(out, name))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
