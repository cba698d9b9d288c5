"""Finding the step to convert: CKPT may be a run, its `checkpoints/`, a step, or a step's `items/`.

    <run>/checkpoints/<step>/items/_METADATA
    <run>/checkpoints/<step>/_CHECKPOINT_METADATA, commit_success.txt
    <params-only checkpoint>/items/_METADATA, or <params-only checkpoint>/_METADATA

A step is complete once its commit marker is there; on a local disk Orbax renames a finished step
into place, so its name alone tells (orbax-checkpoint `path/atomicity.py`).
"""

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from moeconv.errors import NotACheckpointError
from moeconv.orbax.inventory import inventory
from moeconv.orbax.store import DeniedError, Folder
from moeconv.untrusted import strict_json

# MaxText names a step by its number alone (`create_orbax_checkpoint_manager` gives no
# `step_prefix`); Orbax may pad it with zeros (orbax-checkpoint `path/step.py`).
_STEP = re.compile(r"[0-9]{1,18}\Z")
_COMMIT = "commit_success.txt"


@dataclass(frozen=True)
class Step:
    """A complete step of a checkpoint.

    Attributes:
        items: Folder that holds `_METADATA`.
        number: Training step, None when the path does not tell.
        custom_metadata: What MaxText recorded beside it (`scan_layers`).
        beside: Folders where the run's sidecar may lie, nearest first.
        skipped: Newer steps passed over because their save is unfinished.
        dated: Whether it has the step metadata that Orbax writes since 0.5.11 of May 2024, so that
            no older MaxText saved it.
    """

    items: Folder
    number: int | None
    custom_metadata: dict[str, Any]
    beside: tuple[Folder, ...]
    skipped: tuple[str, ...] = ()
    dated: bool = True

    @property
    def scan_layers(self) -> bool | None:
        """What MaxText recorded, None where it did not."""
        found = self.custom_metadata.get("scan_layers")
        return found if isinstance(found, bool) else None


def locate(spec: str) -> Step:
    """Finds the step that CKPT means: the one named, or the newest complete one.

    Raises:
        NotACheckpointError: Nothing there, or nothing complete; says what was looked for.
    """
    folder = Folder.open(spec)
    if not folder.exists():
        what = "is a file" if folder.local and folder.local.is_file() else "does not exist"
        raise NotACheckpointError(f"{folder} {what}; give a MaxText run, step or items directory")
    if folder.has("_METADATA"):
        return _step(folder)
    if (folder / "items").has("_METADATA"):
        if folder.local is not None and "checkpoints" in folder.children():
            raise _ambiguous(folder / "items", folder / "checkpoints")
        return _step(folder / "items")
    names = list(folder.children())
    if "checkpoints" in names:
        for name in _steps(names):
            if (folder / name / "items").has("_METADATA"):
                raise _ambiguous(folder / name, folder / "checkpoints")
        folder = folder / "checkpoints"
        names = list(folder.children())
    for one, other in itertools.pairwise(_steps(names)):
        if int(one) == int(other):
            raise _ambiguous(folder / one, folder / other)
    skipped = []
    for name in _steps(names):
        items = folder / name / "items"
        if not items.has("_METADATA") or _unfinished(items) is not None:
            skipped.append(name)
            continue
        return _step(items, tuple(skipped))
    if skipped:
        raise NotACheckpointError(
            f"{folder} holds only unfinished saves ({', '.join(skipped)}: no commit marker or no "
            "_METADATA); let the run save once more"
        )
    tmp = [n for n in names if "orbax-checkpoint-tmp" in n]
    if tmp:
        raise NotACheckpointError(f"{folder} holds only unfinished saves ({', '.join(tmp)})")
    passed = [n for n in names if re.search(r"\d", n)]
    more = (
        f" (no step's name, and passed over: {', '.join(passed[:5])}{', …' if passed[5:] else ''}; "
        "a step is called by its number alone, and any folder that holds one can be given itself)"
    )
    raise NotACheckpointError(
        f"{folder} is no MaxText checkpoint: it has no _METADATA, no items/, and no numbered steps "
        f"below it or below checkpoints/{more if passed else ''}"
    )


def _ambiguous(one: Folder, other: Folder) -> NotACheckpointError:
    return NotACheckpointError(
        f"both {one} and {other} may be what is meant; give the one to convert itself"
    )


def read_beside(folder: Folder, name: str, *, limit: int) -> bytes | None:
    """A file beside a step; None where there is none, or a remote store does not let it be read.

    Raises:
        NotACheckpointError: It is on this machine, and cannot be read; or it has more than
            `limit` bytes.
        StorageError: The store does not answer.
    """
    try:
        raw = folder.read(name, limit=limit)
    except DeniedError:  # above a public step, say; S3 answers so where nothing may be listed
        return None
    if raw is None and folder.local is not None and (folder.local / name).is_dir():
        raise NotACheckpointError(f"cannot read {folder / name}: it is a directory")
    return raw


def _steps(names: list[str]) -> list[str]:
    """Names that are steps, newest first."""
    numbered = sorted(((int(n), n) for n in names if _STEP.match(n)), reverse=True)
    return [name for _, name in numbered]


def _unfinished(items: Folder) -> str | None:
    """Why a step's save is not complete; None when it is."""
    step = items.parent
    for folder in (items, step):
        if "orbax-checkpoint-tmp" in folder.name:
            return f"{folder} is a save in progress (its name says so)"
    raw = step.read("_CHECKPOINT_METADATA")
    metadata = _json(step, raw) if raw is not None else {}
    # Orbax v1 always leaves a marker; before it, local saves were committed by a rename alone and
    # saves to object stores by the marker (orbax-checkpoint `path/atomicity.py`).
    handler = json.dumps(metadata.get("item_handlers"))
    marks = "experimental.v1" in handler or items.local is None or items.has(_COMMIT)
    if marks and not step.has(_COMMIT) and (raw is not None or not items.has(_COMMIT)):
        return f"{step} has no {_COMMIT}, so its save did not finish"
    if raw is not None and not metadata.get("commit_timestamp_nsecs", True):
        return f"{step}/_CHECKPOINT_METADATA has no commit time, so its save did not finish"
    return None


def _json(folder: Folder, raw: bytes) -> dict[str, Any]:
    try:
        content = strict_json.loads(raw)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise NotACheckpointError(f"{folder}/_CHECKPOINT_METADATA is not JSON; the save is damaged")
    return content


def _step(items: Folder, skipped: tuple[str, ...] = ()) -> Step:
    items = items.real()
    if items.local is not None:
        inventory(items.local)  # tensorstore and Orbax follow every link, and wait at a FIFO
    if (why := _unfinished(items)) is not None:
        raise NotACheckpointError(f"{why}; name an older step, or let the run save once more")
    step = items.parent if items.name == "items" else items
    raw = step.read("_CHECKPOINT_METADATA")
    custom = _json(step, raw).get("custom_metadata") if raw is not None else None
    custom = custom if isinstance(custom, dict) else {}
    beside, number = [step], None
    # Above any other folder there may lie a sidecar of something else.
    if _STEP.match(step.name):
        number = int(step.name)
        beside.append(step.parent)
        if step.parent.name == "checkpoints":
            beside.append(step.parent.parent)
    return Step(items, number, custom, tuple(beside), skipped, dated=raw is not None)
