"""Finding the step to convert: CKPT may be a run, its `checkpoints/`, a step, or a step's item.

    <run>/checkpoints/<step>/<item>/_METADATA
    <run>/checkpoints/<step>/_CHECKPOINT_METADATA, commit_success.txt
    <run>/checkpoints/actor/<step>/<item>/_METADATA       of RL
    <parameters only>/<item>/_METADATA, or <parameters only>/_METADATA

MaxText calls the item `items`; its emergency managers `state`; its training engine, which
fine-tunes, `model_params`, beside items of the optimizer and of gradients; Orbax itself `default`
or `pytree`.

A step is complete once its commit marker is there. On a local disk Orbax renames a finished step
into place, so its name shows it, and before its v1 it left no marker there; elsewhere the time of
the commit is recorded before the marker is (orbax-checkpoint `path/atomicity.py`). So a copy of a
finished save may lack the marker; whether it is whole, its arrays show (`Step.uncommitted`).
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.errors import NotACheckpointError
from moeconv.orbax.foreign import checkpoints_below, what_is
from moeconv.orbax.inventory import inventory
from moeconv.orbax.store import DeniedError, Folder
from moeconv.untrusted import strict_json

# MaxText names a step by its number alone (`create_orbax_checkpoint_manager` gives no
# `step_prefix`); Orbax may pad it with zeros (orbax-checkpoint `path/step.py`).
_STEP = re.compile(r"[0-9]{1,18}\Z")
_COMMIT = "commit_success.txt"
METADATA = "_CHECKPOINT_METADATA"
# Where Tunix's RL keeps the steps of the policy, beside the critic's (tunix `rl/rl_cluster.py`,
# `_init_cluster`; MaxText trainers/post_train/rl/train_rl.py gives it the run's `checkpoints/`).
_ACTOR = "actor"
# Names of the item that holds the model: common/checkpointing.py, common/emergency_checkpointing.py
# `save`, training_engine/checkpointing.py; orbax-checkpoint's own defaults; what people choose.
ITEMS = ("items", "state", "default", "model_params", "pytree", "model", "params")
# Its other items (training_engine/checkpointing.py), and what they hold.
OTHER_ITEMS = {
    "optimizer_state": "the optimizer's state",
    "accumulated_grads": "gradients",
    "accumulated_metrics": "metrics",
    "iter": "the state of the input pipeline",
}


@dataclass(frozen=True)
class Step:
    """A complete step of a checkpoint.

    Attributes:
        items: Folder that holds `_METADATA`.
        folder: Folder of the step, which may be the same.
        number: Training step, None when the path does not name it.
        custom_metadata: What MaxText recorded beside it (`scan_layers`).
        beside: Folders where the run's sidecar may be, nearest first.
        skipped: Newer steps passed over, each with the reason.
        dated: True if it has the step metadata that Orbax writes since 0.5.11 of May 2024, so that
            no older MaxText saved it.
        handler: Orbax's name of what wrote its items, as far as it is recorded.
        uncommitted: Why it counts as finished only if its arrays are whole; None if it does anyway.
    """

    items: Folder
    folder: Folder
    number: int | None
    custom_metadata: dict[str, Any]
    beside: tuple[Folder, ...]
    skipped: tuple[str, ...] = ()
    dated: bool = True
    handler: str = ""
    uncommitted: str | None = None

    @property
    def scan_layers(self) -> bool | None:
        """What MaxText recorded, None where it did not."""
        found = self.custom_metadata.get("scan_layers")
        return found if isinstance(found, bool) else None

    @property
    def lora(self) -> dict[str, Any]:
        """The settings of the adapter that was trained, as MaxText recorded them; else empty."""
        found = self.custom_metadata.get("lora")
        return found if isinstance(found, dict) else {}


def locate(spec: str) -> Step:
    """Finds the step that CKPT means: the one named, or the newest complete one.

    Raises:
        NotACheckpointError: Nothing there, or nothing complete; says what was looked for.
    """
    folder = Folder.open(spec)
    if not folder.exists():
        is_file = folder.local is not None and folder.local.is_file()
        kind = what_is([folder.name]) if is_file else ""
        what = f"is a file{f' ({kind})' if kind else ''}" if is_file else "does not exist"
        raise NotACheckpointError(f"{folder} {what}; give a MaxText run, step or items directory")
    if folder.has("_METADATA"):
        return _step(folder)
    if (item := _item(folder)) is not None:
        if folder.local is not None and "checkpoints" in folder.children():
            raise _ambiguous(item, folder / "checkpoints")
        return _step(item, folder)
    names = list(folder.children())
    if "checkpoints" in names:
        for name in _steps(names):
            if _item(folder / name) is not None:
                raise _ambiguous(folder / name, folder / "checkpoints")
        folder = folder / "checkpoints"
        names = list(folder.children())
    if _ACTOR in names:
        policy = folder / _ACTOR
        inside = list(policy.children()) if policy.exists() else []
        if steps := _steps(inside):
            if own := _steps(names):
                raise _ambiguous(folder / own[0], policy / steps[0])
            folder, names = policy, inside
    return _newest(folder, names)


def _newest(folder: Folder, names: list[str]) -> Step:
    """The newest complete step of a folder of steps."""
    for one, other in itertools.pairwise(_steps(names)):
        if int(one) == int(other):
            raise _ambiguous(folder / one, folder / other)
    passed: dict[str, str] = {}
    doubtful: tuple[Folder, Folder, tuple[str, ...]] | None = None
    unfinished = 0
    for name in _steps(names):
        step = folder / name
        if (item := _item(step)) is None:
            passed[name] = _without_item(step)
            continue
        state = _commit(item, step)
        if state.unfinished is None and (state.uncommitted is None or state.dated):
            return _step(item, step, _reasons(passed))
        if state.unfinished is None and doubtful is None:
            doubtful = item, step, _reasons(passed)
        unfinished += 1
        passed[name] = "no commit marker"
    if doubtful is not None:
        return _step(*doubtful)
    if passed:
        listed = "; ".join(_reasons(passed))
        if unfinished == len(passed):
            raise NotACheckpointError(
                f"{folder} holds only unfinished saves ({listed}); let the run save once more"
            )
        raise NotACheckpointError(
            f"{folder} holds no step that can be read ({listed}); a step holds an item, such as "
            "items/, with the _METADATA that Orbax writes"
        )
    tmp = [n for n in names if "orbax-checkpoint-tmp" in n]
    if tmp:
        raise NotACheckpointError(f"{folder} holds only unfinished saves ({', '.join(tmp)})")
    if _STEP.match(folder.name) or METADATA in names:
        raise NotACheckpointError(
            f"{folder} is a step that cannot be read: {_without_item(folder)}; a step holds an "
            "item, such as items/, with the _METADATA that Orbax writes"
        )
    raise NotACheckpointError(
        f"{folder} is no MaxText checkpoint: it has no _METADATA, no items/, and no numbered steps "
        f"below it or below checkpoints/{_instead(folder, names)}"
    )


def _instead(folder: Folder, names: list[str]) -> str:
    """What a folder holds that has no step."""
    if kind := what_is(names):
        return f"; it holds {kind}"
    said = ""
    if rest := [n for n in names if re.search(r"\d", n)]:
        said = (
            f" (no step's name, and passed over: {', '.join(rest[:5])}"
            f"{', …' if rest[5:] else ''}; a step is called by its number alone, and any folder "
            "that holds one can be given itself)"
        )
    if found := checkpoints_below(folder, names):
        said += f"; {' or '.join(str(folder / name) for name in found)} may be what is meant"
    return said


def _item(step: Folder) -> Folder | None:
    """The item of a step that holds the model; None if there is none.

    Raises:
        NotACheckpointError: There are several.
    """
    if step.has("_METADATA"):
        return step
    found = [step / name for name in ITEMS if (step / name).has("_METADATA")]
    if not found and step.local is not None and (_STEP.match(step.name) or step.has(METADATA)):
        names = list(step.children()) if step.exists() else []
        others = [name for name in names if name not in OTHER_ITEMS and not _STEP.match(name)]
        found = [step / name for name in others if (step / name).has("_METADATA")]
    if len(found) > 1:
        raise _ambiguous(found[0], found[1])
    return found[0] if found else None


def _without_item(step: Folder) -> str:
    """What a step holds instead."""
    names = list(step.children()) if step.local is not None else []
    for name in ITEMS:
        if name in names and (kind := what_is((step / name).children())):
            return f"{name}/ has no _METADATA, and holds {kind}"
    listed = f"; it holds {', '.join(names[:6])}{', …' if names[6:] else ''}" if names else ""
    return f"no _METADATA{listed}"


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


def _reasons(passed: Mapping[str, str]) -> tuple[str, ...]:
    """Steps with why each was passed over, the first of them."""
    shown = [f"{name}: {why}" for name, why in list(passed.items())[:5]]
    return (*shown, "…") if len(passed) > 5 else tuple(shown)


@dataclass(frozen=True)
class _Commit:
    """How complete a save is: why not, or why that is in doubt; and whether it is dated."""

    unfinished: str | None = None
    uncommitted: str | None = None
    dated: bool = False


def _commit(items: Folder, step: Folder) -> _Commit:
    for folder in (items, step):
        if "orbax-checkpoint-tmp" in folder.name:
            return _Commit(f"{folder} is a save in progress (its name says so)")
    raw = step.read(METADATA)
    metadata = _json(step, raw) if raw is not None else {}
    if raw is not None and not metadata.get("commit_timestamp_nsecs", True):
        return _Commit(f"{step}/{METADATA} has no commit time, so its save did not finish")
    handler = json.dumps(metadata.get("item_handlers"))
    marks = "experimental.v1" in handler or items.local is None or items.has(_COMMIT)
    if not marks or step.has(_COMMIT) or (raw is None and items.has(_COMMIT)):
        return _Commit()
    dated = metadata.get("commit_timestamp_nsecs") is not None
    return _Commit(uncommitted=f"{step} has no {_COMMIT}", dated=dated)


def _json(folder: Folder, raw: bytes) -> dict[str, Any]:
    try:
        content = strict_json.loads(raw)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise NotACheckpointError(f"{folder}/_CHECKPOINT_METADATA is not JSON; the save is damaged")
    return content


def _step(item: Folder, step: Folder | None = None, skipped: tuple[str, ...] = ()) -> Step:
    items = item.real()
    if items.local is not None:
        inventory(items.local)  # tensorstore and Orbax follow every link, and wait at a FIFO
    if step is None or items != item:
        step = _folder_of(items)
    if items != step and items.name in OTHER_ITEMS:
        raise NotACheckpointError(
            f"{items} holds {OTHER_ITEMS[items.name]}, not the model; give the step, {step}"
        )
    state = _commit(items, step)
    if state.unfinished is not None:
        raise NotACheckpointError(
            f"{state.unfinished}; name an older step, or let the run save once more"
        )
    raw = step.read(METADATA)
    content = _json(step, raw) if raw is not None else {}
    custom = content.get("custom_metadata")
    beside, number = [step], None
    # Above any other folder there may be a sidecar of something else.
    if _STEP.match(step.name):
        number = int(step.name)
        beside.append(above := step.parent)
        if above.name == _ACTOR and above.parent.name == "checkpoints":
            beside.append(above := above.parent)
        if above.name == "checkpoints":
            beside.append(above.parent)
    return Step(
        items,
        step,
        number,
        custom if isinstance(custom, dict) else {},
        tuple(beside),
        skipped,
        dated=raw is not None,
        handler=json.dumps(content.get("item_handlers")),
        uncommitted=state.uncommitted,
    )


def _folder_of(items: Folder) -> Folder:
    """The step of a folder with `_METADATA`: itself, or the one above that it is an item of."""
    if items.has(METADATA) or _STEP.match(items.name):
        return items
    above = items.parent
    is_item = items.name in ITEMS or items.name in OTHER_ITEMS or _STEP.match(above.name)
    return above if is_item or above.has(METADATA) else items
