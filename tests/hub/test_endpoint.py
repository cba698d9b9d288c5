"""Where the token goes: to the Hub, to this machine, or to an https host that the user named."""

import http.server
import threading

import cli_runner
import hub_server
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from moeconv.errors import HubError, TokenizerError, UsageError
from moeconv.hf.hub_address import other_host_warning, read_address
from moeconv.hf.hub_client import hub_client
from moeconv.hf.tokenizer import read_tokenizer

REFUSED = [
    "http://127.evil.example",
    "http://127.0.0.1.evil.example",
    "http://localhost.evil.example",
    "http://[::1].x",
    "http://[::1",
    "http://10.0.0.1",
    "http://0.0.0.0:8080",
    "http://huggingface.co",
    "http://2130706433",
    "http://0x7f.1",
    "http://127.1",
    "http://[::ffff:10.0.0.1]",
    "https://huggingface.co@evil.example",
    "https://user:secret@huggingface.co",
    "http://127.0.0.1@evil.example",
    "https://huggingface.co\\@evil.example",
    "https://huggingface.co:99999",
    "https://huggingface.co:x",
    "https://huggingface.co?to=evil.example",
    "https://huggingface.co#x",
    "https://huggingface.с\u043e",
    "https://hugging\tface.co",
    "https://hugging face.co",
    "https://",
    "https://%31%32%37.0.0.1",
    "ftp://huggingface.co",
    "huggingface.co",
    "file:///etc/passwd",
    "",
]


@pytest.mark.parametrize("endpoint", REFUSED)
def test_an_address_that_may_not_have_the_token(endpoint):
    with pytest.raises(UsageError, match=r"is not an address|unencrypted"):
        read_address(endpoint)


TAKEN = {
    "https://huggingface.co": "hub",
    "https://HuggingFace.co/": "hub",
    "https://huggingface.co:443": "hub",
    "https://hf.co": "hub",
    "http://localhost:8080": "loopback",
    "http://LOCALHOST": "loopback",
    "http://127.0.0.1:80": "loopback",
    "http://127.1.2.3": "loopback",
    "http://[::1]:8080": "loopback",
    "http://[::ffff:127.0.0.1]": "loopback",
    "https://hub.example.org/mirror": "stranger",
    "https://huggingface.co:8443": "stranger",
    "https://huggingface.co.example.org": "stranger",
    "https://xn--80ak6aa92e.example": "stranger",
}


@pytest.mark.parametrize("endpoint", TAKEN)
def test_an_address_that_may(endpoint):
    address = read_address(endpoint)
    kind = "hub" if address.hub else "loopback" if address.loopback else "stranger"
    assert kind == TAKEN[endpoint]
    warning = other_host_warning(address)
    assert (warning is not None) == (kind == "stranger")
    assert warning is None or address.host in warning


def test_the_address_of_the_environment_counts_too(hub, push, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.evil.example")
    ran = push("--dry-run")
    assert ran.code == UsageError.exit_code and "HF_ENDPOINT" in ran.error
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        read_tokenizer("ann/words", model_max_length=None)


class Stranger:
    """Another host (another port): what it was asked, and with which token."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []
        stranger = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stranger.seen.append((self.path, self.headers.get("Authorization")))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_POST = do_PUT = do_GET  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stranger():
    made = Stranger()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_redirect_to_another_host_does_not_carry_the_token(hub, push, stranger, naps):
    hub.fault("whoami", status=307, headers={"Location": f"{stranger.url}/api/whoami-v2"})
    push()
    assert stranger.seen == [("/api/whoami-v2", None)]


def test_a_link_to_the_next_page_elsewhere_is_not_followed_with_the_token(
    hub, push, stranger, monkeypatch
):
    repo = hub.store.create("alice/model", private=False)
    hub.store.write(repo, {f"{n}.txt": b"x" for n in range(5)})
    hub.page = 2
    monkeypatch.setattr(hub, "url", stranger.url)  # as its answers name it
    ran = push("--endpoint", f"http://127.0.0.1:{hub.server.server_address[1]}")
    assert ran.code == HubError.exit_code and "would get the token" in ran.error
    assert stranger.seen == []


def test_lfs_is_not_verified_at_another_host(hub, push, stranger, monkeypatch, naps):
    """huggingface_hub sends the token to the `verify` address of a batch's answer."""
    batch = hub_server._Handler._lfs_batch

    def elsewhere(self, body):
        answer = batch(self, body)
        for one in answer["objects"]:
            one["actions"]["verify"] = {"href": f"{stranger.url}/verify"}
        return answer

    monkeypatch.setattr(hub_server._Handler, "_lfs_batch", elsewhere)
    ran = push()
    assert ran.code == HubError.exit_code and "would get the token" in ran.error
    assert stranger.seen == []
    assert "config.json" not in hub.repo().files()


def test_an_https_hub_leads_to_nothing_unencrypted(hub):
    with hub_client(read_address("https://hub.example.org")):
        for url in ("http://127.0.0.1:9/x", "http://hub.example.org/x"):
            with pytest.raises(HubError, match="unencrypted"):
                get_session().get(url)


def test_no_proxy_gets_what_is_for_this_machine(hub, push, stranger, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, stranger.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    ran = push("--dry-run")
    assert ran.code == 0, ran.err
    assert "account: alice" in ran.out and stranger.seen == []


def test_the_tokenizer_of_the_hub_is_asked_within_the_same_limits(hub, monkeypatch):
    hub.fault("info", status=429, headers={"Retry-After": "99999"})
    with pytest.raises(TokenizerError, match="takes no more requests"):
        read_tokenizer("alice/words", model_max_length=None)


def test_a_stranger_is_warned_of_before_anything_is_sent(out, push, monkeypatch):
    told = []
    monkeypatch.setattr("moeconv.hub.push.read_account", lambda *_: told.append("asked") or 1 / 0)
    ran = cli_runner.moeconv("push", out, "--dry-run", "--endpoint", "https://hub.example.org")
    assert told == ["asked"]
    assert "warning: the token goes to hub.example.org" in ran.err
