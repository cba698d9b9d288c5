"""What a small Hub keeps: repositories, commits that land whole, and contents by their SHA-256."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
REGULAR_LIMIT = 10_000_000


class RefusedError(Exception):
    """An answer other than 2xx, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class Entry:
    """A file of a commit."""

    size: int
    sha256: str
    git_oid: str
    lfs: bool


@dataclass(frozen=True)
class Revision:
    """A commit."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, Entry]


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    head: str
    status: str = "open"


@dataclass
class Repo:
    """A repository; `branches` is the only thing that moves."""

    name: str
    private: bool
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, Revision] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)

    def resolve(self, revision: str) -> Revision:
        """Branch, `refs/pr/N` or commit."""
        if revision.startswith("refs/pr/"):
            number = int(revision.split("/")[-1])
            for pull in self.pulls:
                if pull.num == number:
                    return self.revisions[pull.head]
        oid = self.branches.get(revision, revision)
        if oid not in self.revisions:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.revisions[oid]

    def files(self, revision: str = "main") -> Mapping[str, Entry]:
        return self.resolve(revision).files


class Store:
    """All of it."""

    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.parts = folder / "parts"
        self.repos: dict[str, Repo] = {}
        for path in (self.blobs, self.parts):
            path.mkdir(parents=True, exist_ok=True)

    # Contents --------------------------------------------------------------------------------

    def put(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()
        path = self.blobs / name
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)
        return name

    def has(self, oid: str) -> bool:
        return (self.blobs / oid).exists()

    def read(self, entry: Entry) -> bytes:
        return (self.blobs / entry.sha256).read_bytes()

    # Repositories ----------------------------------------------------------------------------

    def create(self, name: str, *, private: bool) -> Repo:
        if name in self.repos:
            raise RefusedError(409, "You already created this model repo")
        repo = self.repos[name] = Repo(name, private)
        self._land(
            repo, "main", None, "initial commit", {".gitattributes": self.regular(ATTRIBUTES)}
        )
        return repo

    def regular(self, content: bytes) -> Entry:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Entry(len(content), self.put(content), oid, lfs=False)

    def large(self, oid: str, size: int) -> Entry:
        if not self.has(oid) or (self.blobs / oid).stat().st_size != size:
            raise RefusedError(400, f"LFS object {oid} is not here")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
        raw = pointer.encode()
        return Entry(size, oid, hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest(), lfs=True)

    def write(self, repo: Repo, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A commit of somebody else, past the HTTP interface."""
        base = repo.resolve(branch)
        new = {**base.files, **{name: self.regular(raw) for name, raw in files.items()}}
        return self._land(repo, branch, base.oid, "somebody else's commit", new)

    def commit(
        self,
        repo: Repo,
        revision: str,
        lines: list[dict[str, Any]],
        *,
        create_pr: bool,
        author: str,
    ) -> tuple[Revision, PullRequest | None]:
        """Checks every line first; then one assignment makes all of it visible."""
        header = lines[0]["value"]
        base = repo.resolve(revision)
        parent = header.get("parentCommit")
        if parent is not None and parent != base.oid and not create_pr:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    content = base64.b64decode(value["content"])
                    if len(content) > REGULAR_LIMIT:
                        raise RefusedError(413, f"{value['path']} has to be an LFS file")
                    files[value["path"]] = self.regular(content)
                case "lfsFile":
                    files[value["path"]] = self.large(value["oid"], value["size"])
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise RefusedError(
                            404, "A file with this name doesn't exist", "EntryNotFound"
                        )
                case other:
                    raise RefusedError(400, f"unknown operation {other}")
        summary = header["summary"]
        if create_pr:
            oid = self._keep(repo, base.oid, summary, files)
            pull = PullRequest(len(repo.pulls) + 1, summary, header["description"], author, oid)
            repo.pulls.append(pull)
            return repo.revisions[oid], pull
        return repo.revisions[self._land(repo, revision, base.oid, summary, files)], None

    def _keep(self, repo: Repo, parent: str | None, title: str, files: Mapping[str, Entry]) -> str:
        content = {name: entry.git_oid for name, entry in sorted(files.items())}
        seed = json.dumps([parent, title, content, len(repo.revisions)])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        repo.revisions[oid] = Revision(oid, parent, title, dict(files))
        return oid

    def _land(
        self, repo: Repo, ref: str, parent: str | None, title: str, files: Mapping[str, Entry]
    ) -> str:
        oid = self._keep(repo, parent, title, files)
        if ref.startswith("refs/pr/"):
            repo.pulls[int(ref.split("/")[-1]) - 1].head = oid
        else:
            repo.branches[ref] = oid
        return oid
