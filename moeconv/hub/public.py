"""What may be told to everybody: manifest and report without this machine's paths, no secrets.

A manifest names the checkpoint and the config it was told by as paths of the machine that
converted. On the Hub only their ends are left (`RUN/checkpoints/STEP/items`). That changes the
manifest's bytes, so the report's digest of it is renewed; every other digest stays what it was.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moeconv.convert.manifest import MANIFEST_NAME
from moeconv.errors import OutputError
from moeconv.hf.config import to_json
from moeconv.hub.local import File, Output, is_own, read_own
from moeconv.verify.markdown import to_markdown
from moeconv.verify.plots import PLOTS
from moeconv.verify.report import REPORT_NAME, Report
from moeconv.verify.written import PAGE_NAME

# A path from the root or from home, or an address; not `1/sqrt(D)`, not `models/models.py`.
_PATH = re.compile(r"(?<![\w.~/-])(?:[a-z][a-z0-9+.-]*:/|~)?(?:/[^\s/:;,\"'()`|\]]+)+/?")
_TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b|\bgh[oprsu]_[A-Za-z0-9]{36}"
    r"|\bsk-(?:[a-z]+-)?[A-Za-z0-9_-]{40,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY)$")


def public_files(output: Output, report: Report | None) -> list[File]:
    """The manifest, the report and its page as they are sent.

    Args:
        output: The output.
        report: Its report, None where none speaks of these bytes.
    """
    known = own_paths(output)
    raw = read_own(output.folder, MANIFEST_NAME)
    content = json.loads(raw)
    content["source"]["path"] = tail(content["source"]["path"])
    manifest = to_json(_walk(content, lambda text: shorten(text, known)))
    # One without a path goes as it is, byte for byte.
    files = [File.of(MANIFEST_NAME, raw if json.loads(raw) == json.loads(manifest) else manifest)]
    if report is not None:
        told = _walk(report.model_dump(mode="json"), lambda text: shorten(text, known))
        told["files"][MANIFEST_NAME] = hashlib.sha256(files[0].read()).hexdigest()
        files.append(File.of(REPORT_NAME, to_json(told)))
        plots = [output.folder / name for name in PLOTS if is_own(output.folder, name)]
        page = to_markdown(report, plots)
        files.append(File.of(PAGE_NAME, shorten(page, known).encode()))
    return files


def tail(path: str) -> str:
    """The end of a checkpoint's path: run, `checkpoints`, step, `items`."""
    parts = [p for p in re.sub(r"[?#].*", "", path).split("/") if p]
    keep = 2 if parts[-1:] == ["items"] else 1
    if parts[-keep - 1 : -keep] == ["checkpoints"]:
        keep += 2
    return "/".join(parts[-keep:])


def shorten(text: str, known: Iterable[str]) -> str:
    """A text without machine paths; of a path its last part is left."""
    for path in known:
        text = re.sub(re.escape(path) + r"(?:/|(?=[\s:;,\"'()`]|$))", "", text)
    return _PATH.sub(lambda match: re.sub(r"[?#].*", "", match[0]).rstrip("/").split("/")[-1], text)


def refuse_secrets(files: Iterable[File], environment: Mapping[str, str] = os.environ) -> None:
    """Looks for keys in every text that is to be sent.

    Raises:
        OutputError: One is there; it is not repeated.
    """
    values = [v for k, v in environment.items() if _SECRET_NAME.search(k.upper()) and len(v) >= 12]
    for file in files:
        if not file.is_text:
            continue
        text = file.read().decode("utf-8", "replace")
        if _TOKENS.search(text) or any(value in text for value in values):
            raise OutputError(
                f"{file.path or file.name} holds what looks like an access key; nothing is sent, "
                "take it out (and revoke it if it was ever shown to others)"
            )


def machine_paths(files: Iterable[File], output: Output) -> list[str]:
    """Names of files that go as they are, and name a folder of this machine."""
    known = own_paths(output)
    found = []
    for file in files:
        if file.path is not None and file.is_text and file.size < 1_000_000:
            text = file.read().decode("utf-8", "replace")
            if any(path in text for path in known):
                found.append(file.name)
    return found


def own_paths(output: Output) -> list[str]:
    """Folders of this machine that the output may name, longest first; they may hold spaces."""
    folders = {output.folder.resolve(), Path.cwd(), Path.home()}
    source = output.manifest.source.path
    if source.startswith("/"):
        folders |= {*Path(source).parents}
    folders |= {parent for folder in list(folders) for parent in folder.parents}
    # The root and its children are named in many harmless texts.
    return sorted((str(f) for f in folders if len(f.parts) > 2), key=len, reverse=True)


def _walk(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    if isinstance(content, list):
        return [_walk(item, change) for item in content]
    if isinstance(content, dict):
        return {key: _walk(value, change) for key, value in content.items()}
    return content
