"""A small Hub on loopback, over real HTTP, with named faults: what push is tested against.

`python tests/hub/hub_server.py FOLDER` serves one for trying things out by hand.
"""

import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import PullRequest, RefusedError, Repo, Store

TIME = "2026-01-01T00:00:00.000Z"
ALICE = {"name": "alice", "orgs": [{"name": "lab", "roleInOrg": "write"}], "role": "write"}
# Made up for these tests; no such tokens exist.
WRITE, READ, FINE, OTHER = (
    "tok-write-000000",
    "tok-read-0000000",
    "tok-fine-0000000",
    "tok-bob-00000000",
)
TOKENS: dict[str, dict[str, Any]] = {
    WRITE: ALICE,
    READ: {**ALICE, "role": "read"},
    FINE: {**ALICE, "role": "fineGrained", "scoped": {"alice/allowed": ["repo.write"]}},
    OTHER: {"name": "bob", "orgs": [], "role": "write"},
}


@dataclass
class Fault:
    """Something that goes wrong at a route.

    Attributes:
        route: Name of the route, see `ROUTES`.
        times: How often.
        skip: Requests that go well before.
        status: Answer with it.
        headers: Of that answer.
        drop: Break the connection: `mid` the body, or `after` the work is done.
        before: Called before the request is handled as ever.
        part: Only this part of an upload.
        where: Only addresses that hold this.
    """

    route: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = None
    before: Callable[[], None] | None = None
    part: int | None = None
    where: str = ""
    message: str = "injected"


@dataclass
class Seen:
    """A request that was answered, or broken off."""

    method: str
    route: str
    path: str
    body: int
    ended: str
    token: str | None


ROUTES = [
    ("GET", "whoami", r"/api/whoami-v2"),
    ("POST", "create", r"/api/repos/create"),
    ("POST", "validate", r"/api/validate-yaml"),
    ("POST", "preupload", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)"),
    ("POST", "commit", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)"),
    ("POST", "branch", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)"),
    ("GET", "tree", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?"),
    ("GET", "refs", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs"),
    ("GET", "discussion", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions/(?P<num>\d+)"),
    ("GET", "discussions", r"/api/models/(?P<repo>[^/]+/[^/]+)/discussions"),
    ("GET", "info", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<rev>[^/]+))?"),
    ("POST", "lfs_batch", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("PUT", "put", r"/storage/(?P<upload>\w+)/(?P<oid>\w+)/(?P<part>\d+)"),
    ("POST", "complete", r"/storage/(?P<upload>\w+)/(?P<oid>\w+)/complete"),
    ("GET", "resolve", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
]


class Hub:
    """The server, its store, its faults, and what it saw.

    Attributes:
        part_size: Files above it are uploaded in parts.
        page: Files on one page of a listing.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.store = Store(folder)
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.part_size = 1 << 30
        self.page = 1000
        self.lock = threading.RLock()
        self.uploads = 0
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = _Server(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def repo(self, name: str = "alice/model") -> Repo:
        return self.store.repos[name]

    def text(self, name: str, repo: str = "alice/model", revision: str = "main") -> str:
        entry = self.repo(repo).files(revision)[name]
        return self.store.read(entry).decode()

    def fault(self, route: str, **how: Any) -> Fault:
        assert route in {name for _, name, _ in ROUTES}
        made = Fault(route, **how)
        self.faults.append(made)
        return made

    def uploaded(self) -> list[str]:
        """Digests of the contents that arrived whole, an entry for each part."""
        return [s.path.split("/")[3] for s in self.seen if s.route == "put" and s.ended == "200"]

    def count(self, route: str) -> int:
        return sum(s.route == route for s in self.seen)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that goes away is no fault
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    # From request to answer ------------------------------------------------------------------

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        method = "GET" if self.command == "HEAD" else self.command
        for verb, name, pattern in ROUTES:
            if verb == method and (match := re.fullmatch(pattern, url.path)):
                route = name
                break
        else:
            self._read()
            return self._answer(404, {"error": f"no route {method} {url.path}"})
        self.groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.record = Seen(self.command, route, url.path, 0, "?", token)
        with self.hub.lock:
            self.hub.seen.append(self.record)
            fault = self._fault(route)
        if fault is not None and fault.drop == "mid":
            return self._break(half=True)
        body = self._read()
        self.record.body = len(body)
        if fault is not None and fault.status is not None:
            return self._answer(fault.status, {"error": fault.message}, fault.headers)
        if fault is not None and fault.before is not None:
            fault.before()
        try:
            with self.hub.lock:
                self.user = self._user(token)
                answer = getattr(self, f"_{route}")(body)
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            return self._answer(refused.status, {"error": refused.message}, headers)
        if fault is not None and fault.drop == "after":
            return self._break(half=False)
        status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
        self._answer(status, content, headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815

    def _fault(self, route: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.route != route or fault.times == 0 or fault.where not in self.path:
                continue
            if fault.part is not None and self.groups.get("part") != str(fault.part):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            return fault
        return None

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _break(self, *, half: bool) -> None:
        if half:
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length // 2)
        self.record.ended = "broken"
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        if hasattr(self, "record"):
            self.record.ended = str(status)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    # Who may do what -------------------------------------------------------------------------

    def _user(self, token: str | None) -> dict[str, Any] | None:
        if token is None or self.record.route in ("put", "complete"):
            return None  # storage is reached by signed addresses, never with a token
        if token not in TOKENS:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def _may_write(self, name: str) -> bool:
        if self.user is None or self.user["role"] == "read":
            return False
        if self.user["role"] == "fineGrained":
            return "repo.write" in self.user["scoped"].get(name, [])
        namespace = name.split("/")[0]
        orgs = {org["name"] for org in self.user["orgs"] if org["roleInOrg"] == "write"}
        return namespace == self.user["name"] or namespace in orgs

    def _repo(self, *, write: bool = False, ref: str = "") -> Repo:
        name = self.groups["repo"]
        repo = self.hub.store.repos.get(name)
        mine = self.user is not None and name.split("/")[0] in (
            self.user["name"],
            *(org["name"] for org in self.user["orgs"]),
        )
        if repo is None or (repo.private and not mine):
            # As the Hub does, so that nobody learns which private repositories there are.
            status = 404 if self.user else 401
            raise RefusedError(status, "Repository not found", "RepoNotFound")
        if repo.gated and not mine:
            raise RefusedError(403, "Access to this repo is restricted", "GatedRepo")
        # Whoever opened a pull request may push to it.
        pulls = [p for p in repo.pulls if ref == f"refs/pr/{p.num}"]
        if pulls and self.user is not None and pulls[0].author == self.user["name"]:
            return repo
        if write and not self._may_write(name):
            raise RefusedError(403, "You don't have the rights to write in this repository")
        return repo

    # Routes ----------------------------------------------------------------------------------

    def _whoami(self, body: bytes) -> Any:
        if self.user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        token: dict[str, Any] = {"displayName": "test", "role": self.user["role"]}
        if self.user["role"] == "fineGrained":
            token["fineGrained"] = {
                "global": [],
                "scoped": [
                    {"entity": {"type": "model", "name": name}, "permissions": rights}
                    for name, rights in self.user["scoped"].items()
                ],
            }
        return {
            "type": "user",
            "name": self.user["name"],
            "orgs": self.user["orgs"],
            "auth": {"type": "access_token", "accessToken": token},
        }

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        if self.user is None:
            raise RefusedError(401, "Invalid username or password.")
        name = f"{asked['organization'] or self.user['name']}/{asked['name']}"
        if not self._may_write(name):
            raise RefusedError(
                403, "You don't have the rights to create a model under this namespace"
            )
        answer = {"url": f"{self.hub.url}/{name}"}
        try:
            self.hub.store.create(name, private=asked.get("visibility") == "private")
        except RefusedError as refused:
            return refused.status, {**answer, "error": refused.message}, {}
        return answer

    def _validate(self, body: bytes) -> Any:
        errors = card_errors(json.loads(body)["content"])
        answer = {"errors": [{"message": text} for text in errors], "warnings": []}
        return (400 if errors else 200), answer, {}

    def _info(self, body: bytes) -> Any:
        repo = self._repo()
        revision = repo.resolve(self.groups.get("rev", "main"))
        return {
            "id": repo.name,
            "sha": revision.oid,
            "private": repo.private,
            "gated": repo.gated,
            "tags": [],
            "siblings": [{"rfilename": name} for name in revision.files],
            "lastModified": TIME,
            "createdAt": TIME,
        }

    def _tree(self, body: bytes) -> Any:
        repo = self._repo()
        files = repo.files(self.groups["rev"])
        folder = self.groups.get("path", "")
        names = [n for n in sorted(files) if n.startswith(f"{folder}/" if folder else "")]
        if folder and not names:
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        start = int(self.query.get("cursor", 0))
        listed = []
        for name in names[start : start + self.hub.page]:
            entry = files[name]
            one: dict[str, Any] = {
                "type": "file", "path": name, "size": entry.size, "oid": entry.git_oid
            }  # fmt: skip
            if entry.lfs:
                one["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
            listed.append(one)
        headers = {}
        if start + self.hub.page < len(names):
            query = f"recursive=True&cursor={start + self.hub.page}"
            path = urlsplit(self.path).path
            headers["Link"] = f'<{self.hub.url}{path}?{query}>; rel="next"'
        return 200, listed, headers

    def _refs(self, body: bytes) -> Any:
        repo = self._repo()
        branches = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": o}
            for n, o in repo.branches.items()
        ]
        return {"branches": branches, "tags": [], "converts": [], "pullRequests": []}

    def _branch(self, body: bytes) -> Any:
        repo = self._repo(write=True)
        name = self.groups["rev"]
        if name in repo.branches:
            raise RefusedError(409, "Reference already exists")
        repo.branches[name] = repo.resolve(
            json.loads(body or b"{}").get("startingPoint", "main")
        ).oid
        return {}

    def _preupload(self, body: bytes) -> Any:
        pull = "create_pr" in self.query
        repo = self._repo(write=not pull, ref=self.groups["rev"])
        files = repo.files(self.groups["rev"])
        answer = []
        for one in json.loads(body)["files"]:
            large = one["path"].endswith(".safetensors") or one["size"] > 1_000_000
            there = files.get(one["path"])
            found: dict[str, Any] = {
                "path": one["path"],
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": False,
            }
            if there is not None:
                found["oid"] = there.sha256 if there.lfs else there.git_oid
            answer.append(found)
        return {"files": answer}

    def _lfs_batch(self, body: bytes) -> Any:
        asked = json.loads(body)
        self._repo(write="ref" in asked, ref=asked.get("ref", {}).get("name", ""))
        objects = []
        for one in asked["objects"]:
            oid, size = one["oid"], one["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if not self.hub.store.has(oid):
                self.hub.uploads += 1
                base = f"{self.hub.url}/storage/u{self.hub.uploads}/{oid}"
                signed = "X-Amz-Signature=not-to-be-shown"
                if size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    urls = {str(n): f"{base}/{n}?{signed}" for n in range(1, count + 1)}
                    header = {"chunk_size": str(self.hub.part_size), **urls}
                    upload = {"href": f"{base}/complete", "header": header}
                else:
                    upload = {"href": f"{base}/0?{signed}"}
                found["actions"] = {"upload": upload}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes) -> Any:
        oid, part = self.groups["oid"], int(self.groups["part"])
        if part == 0:
            if hashlib.sha256(body).hexdigest() != oid:
                raise RefusedError(400, "the content is not that of the oid")
            self.hub.store.put(body)
        else:
            (self.hub.store.parts / f"{self.groups['upload']}-{part}").write_bytes(body)
        return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def _complete(self, body: bytes) -> Any:
        content = b""
        for part in json.loads(body)["parts"]:
            path = self.hub.store.parts / f"{self.groups['upload']}-{part['partNumber']}"
            raw = path.read_bytes()
            if part["etag"].strip('"') != hashlib.md5(raw).hexdigest():
                raise RefusedError(400, f"part {part['partNumber']} is another one")
            content += raw
        if hashlib.sha256(content).hexdigest() != self.groups["oid"]:
            raise RefusedError(400, "the parts do not make the content of the oid")
        self.hub.store.put(content)
        return {}

    def _commit(self, body: bytes) -> Any:
        create_pr = "create_pr" in self.query
        repo = self._repo(write=not create_pr, ref=self.groups["rev"])
        if self.user is None:
            raise RefusedError(401, "Invalid username or password.")
        lines = [json.loads(line) for line in body.splitlines()]
        revision, pull = self.hub.store.commit(
            repo, self.groups["rev"], lines, create_pr=create_pr, author=self.user["name"]
        )
        url = f"{self.hub.url}/{repo.name}"
        return {
            "success": True,
            "commitOid": revision.oid,
            "commitUrl": f"{url}/commit/{revision.oid}",
            "pullRequestUrl": f"{url}/discussions/{pull.num}" if pull else None,
        }

    def _discussions(self, body: bytes) -> Any:
        repo = self._repo()
        found = [
            _pull(repo, pull)
            for pull in repo.pulls
            if self.query.get("author") in (None, pull.author)
            and self.query.get("status") in (None, pull.status)
        ]
        return {"discussions": found, "count": len(found), "start": 0}

    def _discussion(self, body: bytes) -> Any:
        repo = self._repo()
        pull = repo.pulls[int(self.groups["num"]) - 1]
        comment = {
            "id": "c1",
            "type": "comment",
            "createdAt": TIME,
            "author": {"name": pull.author},
            "data": {"edited": False, "hidden": False, "latest": {"raw": pull.description}},
        }
        return {
            **_pull(repo, pull),
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
            "events": [comment],
        }

    def _resolve(self, body: bytes) -> Any:
        repo = self._repo()
        revision = repo.resolve(self.groups["rev"])
        headers = {"X-Repo-Commit": revision.oid}
        entry = revision.files.get(self.groups["path"])
        if entry is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers["ETag"] = f'"{entry.sha256 if entry.lfs else entry.git_oid}"'
        return 200, self.hub.store.read(entry), headers


def _pull(repo: Repo, pull: PullRequest) -> dict[str, Any]:
    return {
        "num": pull.num,
        "title": pull.title,
        "status": pull.status,
        "author": {"name": pull.author},
        "repo": {"name": repo.name, "type": "model"},
        "isPullRequest": True,
        "createdAt": TIME,
    }


def card_errors(content: str) -> list[str]:
    """The part of the Hub's rules for a card's metadata that push could break."""
    match = re.match(r"\s*---\r?\n([\s\S]*?)\r?\n---[ \t]*(\r?\n|$)", content)
    if match is None:
        return ["the card has no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = []
    for key in ("license", "library_name", "pipeline_tag"):
        if key in data and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", str(data[key])):
            errors.append(f'"{key}" must be one of the known ones')
    for key in ("tags", "datasets"):
        if not all(isinstance(one, str) and one for one in data.get(key, [])):
            errors.append(f'"{key}" must be an array of strings')
    language = data.get("language")
    for one in language if isinstance(language, list) else [language] if language else []:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", str(one)):
            errors.append('"language" must be an ISO 639 code')
    for model in data.get("model-index", []):
        if not model.get("name") or not isinstance(model.get("results"), list):
            errors.append('"model-index[0].name" and its results are required')
            continue
        for result in model["results"]:
            told = (
                result.get("task", {}).get("type"),
                result.get("dataset", {}).get("type"),
                result.get("dataset", {}).get("name"),
            )
            metrics = result.get("metrics") or []
            if not all(told) or not metrics or not all(m.get("type") for m in metrics):
                errors.append('"model-index[0].results[0]" is incomplete')
    return errors


def main() -> None:
    """Serves until it is interrupted."""
    with Hub(Path(sys.argv[1]), port=int(sys.argv[2]) if len(sys.argv) > 2 else 0) as hub:
        print(f"{hub.url}  tokens: {WRITE} (alice, write), {READ} (alice, read)", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
