"""Every wait on the Hub has a limit and a word; what it answers is never a traceback."""

import json
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import hub_server
import pytest

from moeconv.errors import HubError
from moeconv.hf import hub_client
from moeconv.hf.hub_client import Limits, asked_wait
from moeconv.hub.prepare import PushOptions, prepare
from moeconv.hub.push import plan_push
from moeconv.hub.push import push as push_plan

ALWAYS = 10**6


@pytest.fixture
def limits(monkeypatch):
    made = Limits(still=0.15, stalls=2, rate=10**6, answer=100_000, requests=60)
    monkeypatch.setattr(hub_client, "LIMITS", made)
    return made


@pytest.fixture
def there(hub, push):
    return hub.store.create("alice/model", private=False)


WAITS = {
    "120": 120.0,
    " 0 ": 0.0,
    "": None,
    "-5": None,
    "²": None,
    "٣": None,
    "1.5": None,
    "soon": None,
    "1" * 20: float("inf"),
    "9" * 5000: float("inf"),
    "Wed, 21 Oct 2015 07:28:00 GMT": 0.0,
    "Wed, 99 Oct 2015": None,
}


@pytest.mark.parametrize("text", WAITS, ids=lambda text: text[:20])
def test_what_retry_after_says(text):
    assert asked_wait({"Retry-After": text}) == WAITS[text]


def test_retry_after_may_be_a_date():
    soon = datetime.now(UTC) + timedelta(seconds=100)
    assert 95 < asked_wait({"Retry-After": format_datetime(soon, usegmt=True)}) <= 100


@pytest.mark.parametrize(
    "route", ["whoami", "info", "tree", "preupload", "lfs_batch", "put", "commit"]
)
def test_no_wait_is_longer_than_five_minutes(hub, push, there, naps, route):
    hub.fault(route, status=429, times=ALWAYS, headers={"Retry-After": "3600"})
    ran = push()
    assert ran.code == HubError.exit_code
    assert "127.0.0.1 takes no more requests for 3600 s (429)" in ran.error
    assert not naps


@pytest.mark.parametrize("text", ["9" * 5000, "\xb2", "-1"])
@pytest.mark.parametrize("route", ["whoami", "preupload"])
def test_an_absurd_retry_after_is_no_traceback(hub, push, there, naps, route, text):
    hub.fault(route, status=429, headers={"Retry-After": text})
    ran = push()
    absurd = text.isascii() and text.isdigit()
    assert ran.code == (HubError.exit_code if absurd else 0), ran.err
    assert "Traceback" not in ran.err and max(naps, default=0) < 10


def test_a_rate_limit_that_is_absurd(hub, push, there, naps):
    hub.fault("preupload", status=429, headers={"RateLimit": f'"api";r=0;t={"9" * 30}'})
    assert push().code == HubError.exit_code and not naps


def test_what_the_hub_asks_for_has_a_limit_in_all(hub, push, there, naps):
    for route in ("whoami", "info", "tree"):
        hub.fault(route, status=429, times=2, headers={"Retry-After": "250"})
    ran = push()
    assert ran.code == HubError.exit_code and "takes no more requests" in ran.error
    assert sum(naps) <= 900


# A server that says nothing, or a byte now and then ----------------------------------------------


@pytest.fixture
def go_on():
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize(
    "route", ["whoami", "info", "tree", "preupload", "lfs_batch", "put", "commit"]
)
def test_a_mute_server(hub, push, there, limits, naps, go_on, route):
    hub.fault(route, times=ALWAYS, before=lambda: go_on.wait(5))
    begun = time.monotonic()
    ran = push()
    assert ran.code == HubError.exit_code
    assert "127.0.0.1 gives no answer within 0.15 s" in ran.error
    assert time.monotonic() - begun < 4


@pytest.fixture
def dripping():
    """A server that sends a byte every hundredth of a second, for ever."""
    server = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    def drip(connection: socket.socket) -> None:
        try:
            connection.recv(65536)
            if not over.headers:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not over.wait(0.01):
                connection.sendall(b"X" if over.headers else b" ")
        except OSError:
            pass

    over.headers = False
    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", over
    over.set()
    server.close()


@pytest.mark.parametrize("headers", [True, False])
def test_a_server_that_sends_a_byte_now_and_then(hub, push, limits, naps, dripping, headers):
    url, over = dripping
    over.headers = headers
    begun = time.monotonic()
    ran = push("--endpoint", url)
    assert ran.code == HubError.exit_code
    assert "127.0.0.1 gives no answer within 0.15 s" in ran.error
    assert time.monotonic() - begun < 4


def test_a_listing_without_an_end(hub, push, there, limits, monkeypatch):
    hub.store.write(there, {f"{n}.txt": b"x" for n in range(100)})
    hub.page = 1
    ran = push()
    assert ran.code == HubError.exit_code and "page after page" in ran.error


# Answers that are none ---------------------------------------------------------------------------

ANSWERS = {
    "null": b"null",
    "list": b"[]",
    "list of null": b"[null]",
    "text": b'"x"',
    "number": b"7",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000,
    "not utf-8": b'{"name": "\xff\xfe"}',
    "nothing": b"",
    "wrong types": json.dumps(
        {"name": [], "orgs": 3, "auth": "x", "sha": 1, "files": 2, "objects": 3, "id": {}}
    ).encode(),
    "huge": b" " * 200_000,
}
ROUTES = ["whoami", "info", "tree", "preupload", "lfs_batch", "commit", "validate"]


@pytest.fixture(scope="module")
def prepared(made):
    return prepare(made, PushOptions(), dry_run=False, note=lambda text: None)


def pairs():
    for route in ROUTES:
        yield from ((route, answer) for answer in ("null", "nested", "wrong types"))
    yield from (("info", answer) for answer in ANSWERS)
    yield from (("commit", answer) for answer in ("list", "text", "not utf-8", "huge"))


@pytest.mark.parametrize(("route", "answer"), dict.fromkeys(pairs()))
def test_an_answer_that_is_none(hub, there, prepared, limits, naps, monkeypatch, route, answer):
    limits.still = 5.0
    monkeypatch.setattr(
        hub_server._Handler, f"_{route}", lambda self, body: (200, ANSWERS[answer], {})
    )
    try:
        plan = plan_push(
            prepared, PushOptions(), endpoint=None, dry_run=False, note=lambda text: None
        )
        push_plan(plan, note=lambda text: None)
    except HubError as error:
        assert "\n" not in str(error)
    else:  # a validation's answer is looked at no further than its status
        assert route in ("validate", "whoami")


@pytest.mark.parametrize(
    ("route", "status"), [("whoami", 403), ("preupload", 400), ("commit", 409), ("validate", 400)]
)
def test_words_of_the_hub_do_not_reach_the_terminal_raw(hub, push, there, naps, route, status):
    message = "\x1b]0;evil\x07\x1b[31mred\u202e\r"
    hub.fault(route, status=status, times=ALWAYS, message=message)
    ran = push("--quiet")  # bars write carriage returns of their own
    assert ran.code != 0 and "Traceback" not in ran.err
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(ran.err + ran.out)
