"""What the loopback Hub answers at each of its routes."""

import hashlib
import json
import re
from typing import Any
from urllib.parse import urlsplit

import yaml
from hub_store import PullRequest, RefusedError, Repo

TIME = "2026-01-01T00:00:00.000Z"


class Routes:
    """A method for each route of `hub_server.ROUTES`: the body of a request in, the answer out.

    The handler that inherits it has the server (`hub`), the request (`path`, `groups`, `query`),
    its `user`, and tells who may do what (`_repo`, `_may_write`).
    """

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
        etag = f'"{entry.sha256 if entry.lfs else entry.git_oid}"'
        if entry.lfs and self.hub.elsewhere is not None:
            # As the Hub does for what it has in LFS and Xet: a signed address of another host.
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(entry.size)}
            headers["Location"] = f"{self.hub.elsewhere}/stored/{entry.sha256}?Signature=x"
            return 302, b"", headers
        return self._ranged(self.hub.store.read(entry), {**headers, "ETag": etag})

    def _stored(self, body: bytes) -> Any:
        content = (self.hub.store.blobs / self.groups["oid"]).read_bytes()
        return self._ranged(content, {"ETag": '"of-the-store"'})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> Any:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked is None:
            return 200, content, headers
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, content[start:stop], headers


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
