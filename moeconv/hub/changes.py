"""What a push does to each file, as a value: made first, printed by a dry run, then carried out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moeconv.artifact.manifest import MANIFEST_NAME
from moeconv.artifact.names import LOSS_PLOT
from moeconv.hub.local import File
from moeconv.hub.remote import RemoteFile
from moeconv.untrusted import strict_json
from moeconv.verification.report.files import PAGE_NAME
from moeconv.verification.report.plots import PLOTS
from moeconv.verification.report.report import REPORT_NAME

Action = Literal["add", "replace", "same", "delete", "keep"]

# Old weights beside new ones would be loaded in their place; the rest is what push itself wrote.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors\Z|model\.safetensors\.index\.json\Z")
_WRITTEN = (MANIFEST_NAME, REPORT_NAME, PAGE_NAME, LOSS_PLOT, *PLOTS)


@dataclass(frozen=True)
class Change:
    """What happens to a name on the Hub.

    Attributes:
        name: The file.
        action: `keep` leaves alone what push knows nothing about.
        size: In bytes; of what is there, where nothing new is sent.
        file: What is to be there afterwards.
    """

    name: str
    action: Action
    size: int
    file: File | None = None


def plan_changes(
    files: Iterable[File], remote: Mapping[str, RemoteFile], *, old_manifests: Mapping[str, bytes]
) -> list[Change]:
    """Compares both sides.

    Args:
        files: What is to be there.
        remote: What is there.
        old_manifests: The Hub's own, by their names: those of moeconv, and the files that they
            name, are deleted where they are no longer made.
    """
    wanted = {file.name: file for file in files}
    changes = []
    for name, file in wanted.items():
        there = remote.get(name)
        action: Action = "add" if there is None else "same" if there.is_same(file) else "replace"
        changes.append(Change(name, action, file.size, file))
    ours = {name for each in old_manifests.items() for name in _named_by(*each)}
    for name, there in remote.items():
        if name in wanted:
            continue
        stale = name in ours or name in _WRITTEN or _WEIGHTS.match(name) is not None
        changes.append(Change(name, "delete" if stale else "keep", there.size))
    return changes


def _named_by(name: str, manifest: bytes) -> set[str]:
    """A manifest and its files; nothing of what is none, as a run's sidecar of an old name."""
    try:
        content = strict_json.loads(manifest)
        return {name, *content["files"]} if content.get("format") == "moeconv" else set()
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()


def differences(changes: Sequence[Change], remote: Mapping[str, RemoteFile]) -> list[str]:
    """How the Hub's listing is not what the changes should have led to; nothing when it is."""
    wrong = []
    for change in changes:
        there = remote.get(change.name)
        if change.action == "delete":
            if there is not None:
                wrong.append(f"{change.name} is still there")
        elif there is None:
            wrong.append(f"{change.name} is missing")
        elif change.file is not None and not there.is_same(change.file):
            wrong.append(f"{change.name} has other bytes")
    return wrong
