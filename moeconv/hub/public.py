"""What may be published: manifest and report without this machine's paths, no secrets.

A manifest names the checkpoint and the config it was made with as paths of the machine that
converted. On the Hub only their ends are left (`RUN/checkpoints/STEP/items`). That changes the
manifest's bytes, so the report's digest of it is renewed; every other digest stays what it was.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import OutputError
from moeconv.hub.kinds import png_texts, unlike
from moeconv.hub.local import File, Output
from moeconv.hub.secrets import find_secret, own_values
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import without_access
from moeconv.verification.report.files import PAGE_NAME
from moeconv.verification.report.markdown import to_markdown
from moeconv.verification.report.report import REPORT_NAME, Report

# A path from the root or from home, or an address; not `1/sqrt(D)`, not `models/models.py`.
_PATH = re.compile(r"(?<![\w.~/-])(?:[a-z][a-z0-9+.-]{0,30}:/|~)?(?:/[^\s/:;,\"'()`|\]]+)+/?")

# Who reads at an address: `://user:password@`.
_USER = re.compile(r"(?<=://)[^\s/?#\"'`<>]{1,512}@")
_SIGNED = re.compile(r"(://[^\s?#\"'`<>)\]]{1,512}+)[?#][^\s\"'`<>)\]]*")


def public_files(output: Output, report: Report | None, beside: Collection[str]) -> list[File]:
    """The manifest, the report and its page as they are sent.

    Args:
        output: The output.
        report: Its report, None where none speaks of these bytes.
        beside: The report's plots that are sent too.
    """
    known, raw = own_paths(output), output.raw
    content = strict_json.loads(raw)
    content["source"]["path"] = tail(content["source"]["path"])
    public = _walk(content, lambda text: shorten(text, known))
    # One without a path goes as it is, byte for byte.
    same = public == strict_json.loads(raw)
    files = [File.of(output.manifest_name, raw if same else strict_json.dumps(public))]
    if report is not None:
        published = _walk(report.model_dump(mode="json"), lambda text: shorten(text, known))
        published["files"][output.manifest_name] = files[0].sha256
        files.append(File.of(REPORT_NAME, strict_json.dumps(published)))
        page = to_markdown(report, [output.folder / name for name in beside])
        files.append(File.of(PAGE_NAME, shorten(page, known).encode()))
    return files


def tail(path: str) -> str:
    """The end of a checkpoint's path: run, `checkpoints`, step, `items`."""
    parts = [p for p in without_access(path).split("/") if p]
    keep = 2 if parts[-1:] == ["items"] else 1
    if parts[-keep - 1 : -keep] == ["checkpoints"]:
        keep += 2
    return "/".join(parts[-keep:])


def shorten(text: str, known: Iterable[str]) -> str:
    """A text without machine paths; of a path its last part is left."""
    for path in known:
        text = re.sub(re.escape(path) + r"(?:/|(?=[\s:;,\"'()`]|$))", "", text)
    text = _SIGNED.sub(r"\1", _USER.sub("", text))
    return _PATH.sub(lambda match: re.sub(r"[?#].*", "", match[0]).rstrip("/").split("/")[-1], text)


def demand_sendable(files: Iterable[File], environment: Mapping[str, str] = os.environ) -> None:
    """Looks at everything that is to be sent, whatever its ending; of weights at the header.

    Raises:
        OutputError: One holds a secret, which is not repeated, or is not what its name says.
    """
    own = own_values(environment)
    for file in files:
        where = file.path or file.name
        if file.content is not None and (wrong := unlike(file.name, file.content)) is not None:
            raise OutputError(f"{where} {wrong}; nothing is sent, take it out or mend it")
        picture = file.name.endswith(".png")
        for text in png_texts(file.looked_at) if picture else (file.looked_at,):
            if (kind := find_secret(text, own)) is not None:
                raise OutputError(
                    f"{where} holds what looks like an access key ({kind}); nothing is sent, take "
                    "it out (and revoke it if it was ever shown to others)"
                )


def machine_paths(files: Iterable[File], output: Output) -> list[str]:
    """Names of files that go as they are, and name a folder of this machine."""
    known = own_paths(output)
    found = []
    for file in files:
        if file.path is not None and file.content is not None and file.size < 1_000_000:
            text = file.content.decode("utf-8", "replace")
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
