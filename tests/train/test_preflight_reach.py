"""What the Hub may answer, from a small local server, becomes one sentence."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cli_runner import moeconv
from moeconv_train.preflight.check import check_reach
from plan_lab import planned

from moeconv.errors import ConfigError, HubError

TOKEN = "hf_secret_of_the_test"
KEY = "wandb_secret_of_the_test"


class _Hub(BaseHTTPRequestHandler):
    """auth-check of the Hub."""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        stranger = "Authorization" in self.headers and not known
        name = self.path.removeprefix("/api/datasets/").removeprefix("/api/models/")
        name = name.removesuffix("/auth-check")
        if stranger:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self._answer(401, message)
        if name.startswith("open/"):
            return self._answer(200)
        if name.startswith("gated/"):
            return self._answer(403 if known else 401, {"X-Error-Code": "GatedRepo"})
        if name.startswith("private/") and not known:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        if name.startswith("broken/"):
            return self._answer(500)
        return self._answer(404, {"X-Error-Code": "RepoNotFound"})

    def _answer(self, code: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[str]:
    import huggingface_hub.constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield url
    server.shutdown()
    server.server_close()


KEYS = {"dataset": "data.source", "tokenizer": "data.tokenizer", "hub_repo": "hub_repo"}


def findings(*words: str, online: bool = True, **settings: object) -> dict:
    """Of a run on local stories, but for these."""
    given = {"dataset": __file__, "hub_repo": "none", **settings}
    ours = [f"run.{KEYS[key]}={value}" for key, value in given.items()]
    if not any("run.wandb" in word for word in words):
        ours.append("run.wandb.enabled=false")
    plan = planned(*ours, *words)
    return {finding.check: finding for finding in check_reach(plan, online=online)}


@pytest.mark.parametrize(
    ("name", "token", "status", "says"),
    [
        ("open/stories", None, "ok", "can be read"),
        ("open/stories", TOKEN, "ok", "can be read"),
        ("gated/llama", None, "refused", "on the Hub is gated; accept its terms on http"),
        ("gated/llama", TOKEN, "refused", "on the Hub is gated; accept its terms on http"),
        ("private/mine", None, "refused", "on the Hub that you may read; check the id"),
        ("no/such", TOKEN, "refused", "on the Hub that you may read; check the id"),
        ("open/stories", "hf_wrong", "refused", "the Hub refuses your token (401); set HF_TOKEN"),
        ("broken/hub", None, "refused", "answers with 500; try again later"),
    ],
)
@pytest.mark.parametrize("check", ["dataset", "tokenizer"])
def test_what_the_hub_answers(hub, monkeypatch, check, name, token, status, says):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    finding = findings(**{check: name})[check]
    assert (finding.status, says in finding.message) == (status, True), finding.message
    assert finding.message.endswith(".") and "\n" not in finding.message
    assert "secret" not in finding.message and "hf_wrong" not in finding.message
    assert finding.error == (HubError if status == "refused" else ConfigError)
    if "terms" in finding.message:
        page = f"{hub}/{'datasets/' if check == 'dataset' else ''}{name}"
        assert page in finding.message


def test_no_network_ends_a_run_with_the_hubs_code(hub, monkeypatch, tmp_path):
    import huggingface_hub.constants

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    words = ["run.data.source=open/stories", "run.wandb.enabled=false", "run.hub_repo=none"]
    ran = moeconv("train", *words, f"base_output_directory={tmp_path}")
    assert ran.code == HubError.exit_code
    assert "dataset: open/stories: " in ran.error and "cannot be reached" in ran.error
    assert "Settings, Internet" in ran.error


def test_an_address_that_would_get_the_token_unencrypted_is_not_asked(hub, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://hub.example")
    finding = findings(dataset="open/stories")["dataset"]
    assert finding.status == "refused" and "give an https address" in finding.message


def test_offline_mode_of_the_hub(hub, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    finding = findings(dataset="open/stories")["dataset"]
    assert finding.status == "refused" and "HF_HUB_OFFLINE" in finding.message


def test_offline_asks_nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    on = ("run.wandb.enabled=true",)
    found = findings(*on, online=False, dataset="a/b", tokenizer=str(tmp_path), hub_repo="me/model")
    statuses = {check: finding.status for check, finding in found.items()}
    assert statuses == {"dataset": "skipped", "tokenizer": "ok"}


def test_a_path_that_is_not_there(hub, tmp_path):
    finding = findings(tokenizer=str(tmp_path / "nowhere"))["tokenizer"]
    assert finding.status == "refused" and "there is no such file" in finding.message


def test_the_hfs_own_dataset_type_is_asked_for(hub):
    words = ["dataset_type=hf", "hf_path=gated/stories"]
    (finding,) = findings(*words, dataset="none").values()
    assert (finding.check, finding.status) == ("dataset", "refused")


def test_a_key_that_is_not_set_is_told_and_stops_nothing(hub, monkeypatch):
    on = "run.wandb.enabled=true"
    told = findings(on, hub_repo="me/model")
    assert (told["hub"].status, told["wandb"].status) == ("warn", "note")
    assert told["hub"].message == "HF_TOKEN is not set: moeconv push to me/model will need it."
    assert told["wandb"].message.startswith("WANDB_API_KEY is not set: without `wandb login`")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert not {"hub", "wandb"} & findings(on, hub_repo="me/model").keys()


def test_a_data_file_that_is_not_there_is_no_question_to_the_hub(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for online in (True, False):
        finding = findings(online=online, dataset="stories.jsonl")["dataset"]
        assert finding.status == "refused"
        assert finding.message.startswith("stories.jsonl: there is no such file")
    (tmp_path / "stories.jsonl").write_text("{}")
    assert findings(dataset="stories.jsonl")["dataset"].status == "ok"
