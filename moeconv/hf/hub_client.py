"""huggingface_hub's HTTP client with limits: of waiting, of sizes, and of where the token goes.

huggingface_hub 2.4 waits without a limit (`default_client_factory`: `timeout=None`), sleeps as long
as `Retry-After` says, and sends the token to whatever address an answer of the Hub names. All its
requests go through one client, which `hub_client` makes.
"""

import contextvars
import importlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http

from moeconv.errors import HubError
from moeconv.hf.hub_address import Address

# Of the HTTP library that huggingface_hub uses: httpx, or httpx2 in newer releases.
HttpError: type[Exception] = HfHubHTTPError.__bases__[0]
_http_library: Any = importlib.import_module(HttpError.__module__.split(".")[0])

_BLOCK = 1 << 16
_RATE_LIMIT = re.compile(r"\bt\s*=\s*(\d+)")


@dataclass
class Limits:
    """How long and how much.

    Attributes:
        still: Seconds without progress: of a request's body, then of the whole answer.
        asked: The longest wait that a server may ask for.
        waits: Seconds that it may ask for in all.
        stalls: Requests in a row that may end without an answer before nothing is tried again.
        answer: Bytes of an answer, other than a file.
        file: Bytes of a file.
        rate: Bytes a second, below which a file counts as stalled.
        requests: Requests in all; a listing may name a next page for ever.
        kept: What is said of what was done until a limit was passed.
    """

    still: float = 60.0
    asked: float = 300.0
    waits: float = 900.0
    stalls: int = 3
    answer: int = 64 * 2**20
    file: int = 2**30
    rate: float = 1024.0
    requests: int = 20_000
    kept: str = "run the same command again {when}, what the Hub has is not sent twice"


LIMITS = Limits()
# Seconds for all files of a tokenizer.
DOWNLOAD = 1800.0


@contextmanager
def hub_client(address: Address, limits: Limits | None = None) -> Iterator[None]:
    """While it is open, huggingface_hub's requests keep to limits, by default `LIMITS`.

    Raises:
        HubError: From within huggingface_hub's functions: a limit was passed for good, or the token
            would have gone to another host.
    """
    session, outer = _Session(address, limits or LIMITS), _http._GLOBAL_CLIENT_FACTORY
    set_client_factory(session.client)
    try:
        yield
    finally:
        set_client_factory(outer)


def asked_wait(headers: Any) -> float | None:
    """Seconds that an answer asks to wait (`Retry-After`); None where it does not say."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]+", text):
        return float(text) if len(text) < 10 else float("inf")
    try:
        until = parsedate_to_datetime(text)
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max(0.0, (until - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


@dataclass
class _Session:
    """What several clients have in common; huggingface_hub makes a new one after a broken line."""

    address: Address
    limits: Limits
    waited: float = 0.0
    stalls: int = 0
    requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self) -> Any:
        """A client; to this machine past any proxy, which would get the token unencrypted."""
        made = _http_library.Client(
            event_hooks={
                "request": [_http.hf_request_event_hook, self._allow],
                "response": [self._limit],
            },
            headers={"Accept-Encoding": "identity"},
            follow_redirects=True,
            timeout=self.limits.still,
            trust_env=not self.address.loopback,
        )
        made.send = self._patient(made.send)
        return made

    def _allow(self, request: Any) -> None:
        url = request.url
        with self.lock:
            self.requests += 1
        if self.requests > self.limits.requests:
            raise HubError(f"{self.address.host} names page after page; nothing more is asked")
        if not self.address.may_be_asked(url.scheme, url.host):
            raise HubError(
                f"{self.address.host} names the address {url.scheme}://{url.host}, which is "
                "unencrypted or this machine's own; nothing was sent there"
            )
        if "Authorization" in request.headers and not self.address.takes_token(
            url.scheme, url.host, url.port
        ):
            raise HubError(
                f"{self.address.host} names an address at {url.host}, which would get the token; "
                "nothing was sent there"
            )

    def _limit(self, response: Any) -> None:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise HubError(
                f"{response.url.host} compresses its answers, which the request did not allow"
            )
        response.stream = _Received(response.stream, response, self.limits)

    def _patient(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """`Client.send` with an end: in a thread of its own, so that nothing at all can hold it."""

        def send(request: Any, *, stream: bool = False, **how: Any) -> Any:
            watch = Watch(self.limits.still)
            request.stream = _Sent(request.stream, watch)
            request.extensions = {**request.extensions, "moeconv.file": stream}
            try:
                answer = within(
                    lambda: plain(request, stream=stream, **how), watch, request.url.host
                )
            except _http_library.TimeoutException as error:
                raise self._stalled(request.url.host) from error
            self.stalls = 0
            self._heed(answer)
            return answer

        return send

    def _stalled(self, host: str) -> Exception:
        """What to raise: an error that is tried again after, or that is not."""
        with self.lock:
            self.stalls += 1
        words = f"{host} gives no answer within {self.limits.still:g} s"
        if self.stalls < self.limits.stalls:
            found: Exception = _http_library.ReadTimeout(words)
            return found
        return HubError(
            f"{words}, {self.stalls} times in a row; {self.limits.kept.format(when='later')}"
        )

    def _heed(self, answer: Any) -> None:
        """What an answer asks to wait, within limits; huggingface_hub sleeps as long as it says."""
        if answer.status_code not in (408, 429, 500, 502, 503, 504):
            return
        asked = asked_wait(answer.headers)
        limited = [float(t[:10]) for t in _RATE_LIMIT.findall(answer.headers.get("RateLimit", ""))]
        wait = max([asked or 0.0, *limited])
        with self.lock:
            self.waited += wait
        if wait > self.limits.asked or self.waited > self.limits.waits:
            until = f"{wait:.0f} s" if wait < 10**9 else "years"
            raise HubError(
                f"{answer.url.host} takes no more requests for {until} ({answer.status_code}); "
                f"{self.limits.kept.format(when='then')}"
            )
        if asked is None:
            answer.headers.pop("Retry-After", None)
        else:
            answer.headers["Retry-After"] = f"{asked:.0f}"


class Watch:
    """When something last went on."""

    def __init__(self, still: float) -> None:
        self.still, self.last, self.over = still, time.monotonic(), False

    def touch(self) -> None:
        """Something goes on."""
        self.last = time.monotonic()

    def left(self) -> float:
        """Seconds until it counts as standing still."""
        return self.last + self.still - time.monotonic()


class _Sent(_http_library.SyncByteStream):  # type: ignore[misc]
    """A request's body, whose every block is progress."""

    def __init__(self, inner: Any, watch: Watch) -> None:
        self.inner, self.watch = inner, watch

    def __iter__(self) -> Iterator[bytes]:
        chunks = iter(self.inner)
        # What was given up must not go on reading a file that is sent anew meanwhile.
        while not self.watch.over and (chunk := next(chunks, None)) is not None:
            for start in range(0, len(chunk), _BLOCK):
                self.watch.touch()
                yield chunk[start : start + _BLOCK]
        if self.watch.over:
            raise _http_library.WriteTimeout("given up")
        self.watch.touch()


class _Received(_http_library.SyncByteStream):  # type: ignore[misc]
    """An answer's body, neither too long nor too slow."""

    def __init__(self, inner: Any, response: Any, limits: Limits) -> None:
        self.inner, self.host, self.limits = inner, response.url.host, limits
        file = response.request.extensions.get("moeconv.file")
        self.most = limits.file if file else limits.answer

    def __iter__(self) -> Iterator[bytes]:
        size, begun = 0, time.monotonic()
        for chunk in self.inner:
            size += len(chunk)
            if size > self.most:
                raise HubError(f"{self.host} answers with more than {self.most >> 20} MiB")
            if time.monotonic() - begun > self.limits.still + size / self.limits.rate:
                raise _http_library.ReadTimeout(f"{self.host} sends only a few bytes a second")
            yield chunk

    def close(self) -> None:
        self.inner.close()


def within[Answer](call: Callable[[], Answer], limit: Watch | float, host: str) -> Answer:
    """What a call returns or raises, unless it stands still, or takes longer than so many seconds.

    Raises:
        Exception: The call's own, or the HTTP library's ReadTimeout.
    """
    watch = limit if isinstance(limit, Watch) else Watch(limit)
    done, ended = threading.Event(), list[tuple[Any, BaseException | None]]()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            ended.append((context.run(call), None))
        except BaseException as error:
            ended.append((None, error))
        finally:
            done.set()

    threading.Thread(target=work, daemon=True).start()
    while not done.wait(max(0.001, watch.left())):
        if watch.left() <= 0:
            watch.over = True
            raise _http_library.ReadTimeout(f"{host} gives no answer within {watch.still:g} s")
    answer, error = ended[0]
    if error is not None:
        raise error
    found: Answer = answer
    return found
