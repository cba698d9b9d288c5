"""Tokenizers of the Hub: what is fetched, and each failure in one sentence."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tokenizer_lab import REPOSITORY

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as fetching a few small files takes; each repository answers one way."""

    repository: Path
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0].removeprefix("/api/models")
        owner, name, *rest = path.strip("/").split("/")
        said = {"X-Error-Message": name}
        if owner == "missing":
            self.answer(404, {"X-Error-Code": "RepoNotFound", **said})
        elif owner == "private":
            self.answer(401, {"X-Error-Code": "RepoNotFound", **said})
        elif owner == "badtoken":
            self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif owner == "forbidden":
            self.answer(403, said)
        elif owner == "broken":
            self.answer(400, said)
        elif owner == "gated" and rest[0] == "resolve":
            self.answer(403, {"X-Error-Code": "GatedRepo", **said})
        elif rest[0] == "revision":
            self.json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []})
        elif rest[0] == "tree":
            files = [] if owner == "bare" else sorted(self.repository.iterdir())
            self.json(
                [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in files
                ]
            )
        else:
            content = (self.repository / rest[-1]).read_bytes()
            self.answer(
                200,
                {"X-Repo-Commit": COMMIT, "ETag": f'"{rest[-1]}"'},
                content,
            )

    do_HEAD = do_GET  # noqa: N815

    def json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(saved: Path) -> Any:
    (saved / "model.safetensors").write_bytes(b"never fetched")
    handler = type("OneHub", (Hub,), {"repository": saved, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask_hub(server: Any, cache: Path, specs: list[str], **env: str) -> list[Any]:
    """What reading each spec gives, in a process of its own: the Hub's client reads its
    environment when it is imported."""
    code = (
        "import json, sys\n"
        "from moeconv.errors import TokenizerError\n"
        "from moeconv.hf.tokenizer import read_tokenizer\n"
        "for spec in sys.argv[1:]:\n"
        "    try:\n"
        "        got = read_tokenizer(spec, model_max_length=None)\n"
        "        said = [got.kind, got.source, got.size, got.eos_token_id, sorted(got.files)]\n"
        "    except TokenizerError as error:\n"
        "        said = str(error)\n"
        "    print(json.dumps(said))\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    clean |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(REPOSITORY),
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *specs], env=clean, cwd=cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub_gives_the_tokenizer_and_nothing_else(hub: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    expected = ["hub", "someone/small", 268, 1, names]
    asked = hub.RequestHandlerClass.asked
    assert ask_hub(hub, cache, ["someone/small"], HF_TOKEN="hf_mine") == [expected]
    assert {token for _, token in asked} == {"Bearer hf_mine"}
    assert not any("safetensors" in path for path, _ in asked)
    # Then from the cache, with the Hub never asked.
    asked.clear()
    assert ask_hub(hub, cache, ["someone/small"], HF_HUB_OFFLINE="1") == [expected]
    assert asked == []


def test_each_failure_of_the_hub_is_one_sentence(hub: Any, tmp_path: Path) -> None:
    sentences = {
        "missing/repo": "no repository on the Hub that you may read; check the id",
        "private/repo": "if it is private set HF_TOKEN or run `hf auth login`",
        "badtoken/repo": "the Hub refuses your token (401); set HF_TOKEN to one that may read",
        "forbidden/repo": "the Hub refuses your token (403)",
        "gated/repo": "is gated; accept its terms on http://127.0.0.1:",
        "broken/repo": "the Hub answers with 400; try again later, or give a directory",
        "bare/repo": "has no tokenizer.json; give a directory",
        "a--b/repo": "no such directory, and no repository's id on the Hub",
    }
    (tmp_path / "cache").mkdir()
    answers = ask_hub(hub, tmp_path / "cache", list(sentences), HF_TOKEN="hf_mine")
    for (spec, sentence), answer in zip(sentences.items(), answers, strict=True):
        assert answer.startswith(f"{spec}: ")
        assert sentence in answer
        assert "\n" not in answer
        assert "hf_mine" not in answer


def test_no_hub_at_all(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (offline,) = ask_hub(hub, tmp_path / "cache", ["some/one"], HF_HUB_OFFLINE="1")
    assert "with HF_HUB_OFFLINE set the Hub is not asked; unset it" in offline
    (away,) = ask_hub(hub, tmp_path / "cache", ["some/one"], HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub cannot be reached; check the network, or give a directory" in away
