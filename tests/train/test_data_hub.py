"""A dataset on the Hub, by a small local server that speaks the few endpoints needed."""

import hashlib
import http.server
import json
import shutil
import threading
import urllib.parse
from dataclasses import dataclass, field

import cli_runner
import huggingface_hub
import pytest
from huggingface_hub.utils import close_session
from moeconv_train.tokenizer import TOKENIZER, read_stories

pytest.importorskip("array_record")

STORIES = read_stories()[:120]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_notarealtokenbutasecret"


@dataclass
class Hub:
    """What the server has, whom it lets in, and what it was asked."""

    files: dict[str, bytes]
    # Status and X-Error-Code instead of an answer, for the listing and for the files.
    refuse_listing: tuple[int, str] | None = None
    refuse_files: tuple[int, str] | None = None
    wants: str | None = None
    # The connection breaks after so many bytes of a body, once.
    break_after: int | None = None
    head: str = COMMIT
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    endpoint: str = ""


def handler(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            path = urllib.parse.unquote(self.path.split("?")[0])
            hub.asked.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization"))
            listing = path.startswith("/api/")
            refused = hub.refuse_listing if listing else hub.refuse_files
            if hub.wants and self.headers.get("Authorization") != f"Bearer {hub.wants}":
                refused = refused or (401, "RepoNotFound")
            if refused:
                self.answer(refused[0], b"{}", {"X-Error-Code": refused[1]}, body)
            elif listing:
                told = self.info()["siblings"] if "/tree/" in path else self.info()
                self.answer(200, json.dumps(told).encode(), {}, body)
            else:
                name = path.split(f"/resolve/{COMMIT}/", 1)[1]
                self.send_file(hub.files[name], body)

        def info(self):
            siblings = [
                {
                    "type": "file",
                    "path": name,
                    "oid": hashlib.sha1(content).hexdigest(),
                    "rfilename": name,
                    "size": len(content),
                    "lfs": {
                        "size": len(content),
                        "oid": hashlib.sha256(content).hexdigest(),
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "pointerSize": 130,
                    },
                }
                for name, content in hub.files.items()
            ]
            return {"id": "some/stories", "sha": hub.head, "siblings": siblings}

        def send_file(self, content, body):
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            begin = 0
            if wanted := self.headers.get("Range"):
                begin = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self.answer(206 if wanted else 200, content[begin:], headers, body)

        def answer(self, status, content, headers, body):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not body:
                return
            if "ETag" in headers and hub.break_after is not None and len(content) > hub.break_after:
                content, hub.break_after = content[: hub.break_after], None
                self.close_connection = True
            self.wfile.write(content)

    return Handler


def parquet(stories):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": stories}), sink, row_group_size=10)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub():
    """Laid out as roneneldan/TinyStories is: parquet in data/, the same as text beside it."""
    files = {
        ".gitattributes": b"",
        "README.md": b"# Stories",
        "Stories-train.txt": b"not to be read",
        "data/train-00000-of-00002-2d5a1467fff1081b.parquet": parquet(STORIES[:50]),
        "data/train-00001-of-00002-5852b56a2bd28fd9.parquet": parquet(STORIES[50:100]),
        "data/validation-00000-of-00001-869c898b519ad725.parquet": parquet(STORIES[100:]),
    }
    served = Hub(files)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return shutil.copytree(TOKENIZER, tmp_path_factory.mktemp("tokenizer"), dirs_exist_ok=True)


def words(out, tokenizer, *more, source="some/stories"):
    return (
        *("data", "prepare", source, "--out", out, "--tokenizer", tokenizer),
        *("--seq-length", 128, *more),
    )


@pytest.fixture
def prepare(hub, tmp_path, tokenizer, monkeypatch):
    """The command in this process, which takes the server for the Hub."""
    constants = huggingface_hub.constants

    def run(out, *more, source="some/stories", endpoint=hub.endpoint, offline=False, token=""):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        addresses = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", addresses)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", token)
        return cli_runner.moeconv(*words(out, tokenizer, *more, source=source))

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / name))
    close_session()
    yield run
    close_session()


def test_a_dataset_is_fetched_and_pinned(hub, tmp_path, tokenizer, prepare):
    hub.wants = TOKEN
    out = tmp_path / "out"
    # A process of its own: the Hub's client reads its environment when it is imported.
    told = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    told |= {"HF_HOME": str(tmp_path / "hf-home"), "HF_TOKEN": TOKEN}
    ran = cli_runner.run(*words(out, tokenizer, "--json"), **told)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["request"]["source"]["revision"] == COMMIT
    assert {f["path"]: f["digest"] for f in report["request"]["source"]["files"]} == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in hub.files.items()
        if name.endswith("parquet")
    }
    assert report["splits"]["train"]["stories"] == 100
    assert report["splits"]["validation"]["stories"] == 20
    assert "not read: README.md, Stories-train.txt" in ran.err
    assert TOKEN not in ran.err + ran.out + (out / "data.json").read_text()
    assert not [name for name in hub.asked if "txt" in name or "README" in name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-home", "out"]
    # A second time nothing is asked, and a moved branch changes nothing.
    hub.asked.clear()
    hub.head = "f" * 40
    again = prepare(out, "--json", offline=True)
    assert again.code == 0, again.err
    assert json.loads(again.out) == report and not hub.asked


def test_what_was_fetched_is_not_fetched_again(hub, tmp_path, prepare):
    hub.files["data/train-00001-of-00002-5852b56a2bd28fd9.parquet"] += b"and no more"
    ran = prepare(tmp_path / "out")
    assert ran.code == 2 and "some/stories: data/train-00001" in ran.error
    assert "cannot be read as parquet" in ran.error
    hub.asked.clear()
    assert prepare(tmp_path / "out").error == ran.error
    assert not [asked for asked in hub.asked if asked.startswith("GET /datasets/")]


def test_a_connection_that_breaks_is_taken_up_again(hub, tmp_path, prepare):
    hub.break_after = 1000
    ran = prepare(tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert hub.break_after is None
    assert len([asked for asked in hub.asked if asked.startswith("GET /datasets/")]) == 4
    assert json.loads(ran.out)["splits"]["train"]["stories"] == 100


@pytest.mark.parametrize(
    ("refuse", "token", "message"),
    [
        (
            (401, "GatedRepo"),
            "",
            "this dataset on the Hub is gated; accept its terms on {hub}/datasets/some/",
        ),
        ((403, "GatedRepo"), TOKEN, "dataset on the Hub is gated; accept its terms on"),
        ((401, "RepoNotFound"), "", "no dataset on the Hub that you may read; check the id, and"),
        ((404, "RepoNotFound"), "", "no such file or folder, and no dataset on the Hub"),
        ((404, "RevisionNotFound"), "", "has no such revision; see {hub}/datasets/some/stories"),
        ((403, ""), TOKEN, "the Hub refuses your token (403); set HF_TOKEN to one that may"),
        ((400, ""), "", "the Hub answers with 400; try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub, tmp_path, prepare, refuse, token, message):
    hub.refuse_listing = refuse
    ran = prepare(tmp_path / "out", token=token)
    assert ran.code == 10, ran.err
    assert message.replace("{hub}", hub.endpoint) in ran.error
    assert ran.error.count("\n") == 0 and ran.error.startswith("some/stories: ")
    assert TOKEN not in ran.err
    assert not (tmp_path / "out").exists()
    assert hub.tokens == {f"Bearer {token}" if token else None}


def test_a_gated_dataset_that_lists_but_does_not_give(hub, tmp_path, prepare):
    hub.refuse_files = (403, "GatedRepo")
    ran = prepare(tmp_path / "out", token=TOKEN)
    assert ran.code == 10 and "this dataset on the Hub is gated" in ran.error
    assert not (tmp_path / "out").exists()
    hub.refuse_files = None
    assert prepare(tmp_path / "out", token=TOKEN).code == 0


def test_no_hub_and_no_such_dataset(hub, tmp_path, prepare):
    ran = prepare(tmp_path / "a", endpoint="http://127.0.0.1:9")
    assert ran.code == 10 and "and the Hub cannot be reached; check the network" in ran.error
    ran = prepare(tmp_path / "b", source="no/such/folder")
    assert ran.code == 10 and "and no dataset's id on the Hub" in ran.error
    hub.files = {"README.md": b"", "pictures.zip": b""}
    ran = prepare(tmp_path / "c")
    assert ran.code == 2 and "has no parquet, jsonl or text file to train on" in ran.error
