"""A small Hub on loopback, over real HTTP, with named faults, for push and for reading from it.

`python tests/hub/hub_server.py FOLDER` serves one for trying things out by hand.
"""

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

from hub_routes import Routes
from hub_store import RefusedError, Repo, Store

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
        drop: Break the connection: `mid` the body, `after` the work is done, or `half` way through
            the answer.
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
    sent: int = 0


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
    ("GET", "stored", r"/stored/(?P<oid>\w+)"),
    ("GET", "resolve", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
]


class Hub:
    """The server, its store, its faults, and what it saw.

    Attributes:
        part_size: Files above it are uploaded in parts.
        page: Files on one page of a listing.
        elsewhere: The address that large files are read from, if not this one.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.store = Store(folder)
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.part_size = 1 << 30
        self.page = 1000
        self.elsewhere: str | None = None
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


class _Handler(Routes, BaseHTTPRequestHandler):
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
        half = fault is not None and fault.drop == "half"
        self._answer(status, content, headers, half=half)

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

    def _answer(
        self,
        status: int,
        content: Any,
        headers: dict[str, str] | None = None,
        *,
        half: bool = False,
    ) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        if hasattr(self, "record"):
            self.record.ended, self.record.sent = str(status), len(raw)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw[: len(raw) // 2] if half else raw)
        if half:
            self.wfile.flush()
            self._break(half=False)

    # Who may do what -------------------------------------------------------------------------

    def _user(self, token: str | None) -> dict[str, Any] | None:
        if token is None or self.record.route in ("put", "complete", "stored"):
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


def main() -> None:
    """Serves until it is interrupted."""
    with Hub(Path(sys.argv[1]), port=int(sys.argv[2]) if len(sys.argv) > 2 else 0) as hub:
        print(f"{hub.url}  tokens: {WRITE} (alice, write), {READ} (alice, read)", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
