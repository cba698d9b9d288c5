"""One table from what the Hub answers to a sentence with the fix, and retries where they help.

huggingface_hub itself retries reading, uploading parts and asking for them (five times, waiting
as long as `Retry-After` says); what it sends once only is retried here.
"""

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moeconv.errors import HubError, MoeconvError, OutputError
from moeconv.hf.hub_client import HttpError, asked_wait
from moeconv.hub.secrets import redact
from moeconv.untrusted.text import printable

WAITS = (1.0, 2.0, 4.0, 8.0)
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_SETTINGS = "https://huggingface.co/settings/tokens"

Note = Callable[[str], None]


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, None for one without an answer."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return response.status_code if response is not None else None


def is_transient(error: BaseException) -> bool:
    """True if trying again may help: the connection broke, the Hub is busy or in trouble."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = status_of(error)
    return status in _TRANSIENT if status is not None else isinstance(error, HttpError)


def with_retries[Answer](call: Callable[[], Answer], what: str, note: Note) -> Answer:
    """Calls, and retries up to four times; for calls that may be repeated."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            pause = max(wait, retry_after(error) or 0.0)
            note(f"{what}: {_short(error)}; trying again in {pause:.0f} s")
            time.sleep(pause)
    return call()


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait."""
    if status_of(error) is None:
        return None
    return asked_wait(error.response.headers)  # type: ignore[attr-defined]


@contextmanager
def hub_errors(what: str, place: str) -> Iterator[None]:
    """Turns whatever huggingface_hub raises into one sentence.

    Args:
        what: What was being done, e.g. `uploading`.
        place: Repository, for messages.

    Raises:
        HubError: Anything went wrong.
    """
    try:
        yield
    except MoeconvError:
        raise
    except (HttpError, ConnectionError, HFValidationError, LocalTokenNotFoundError) as error:
        raise HubError(explain(error, what, place)) from None
    except Exception as error:
        # huggingface_hub takes answers for what they should be: of others it raises just anything.
        raise HubError(
            f"{what} ({place}) failed: the answer is not that of a Hub ({type(error).__name__}); "
            "check --endpoint and HF_ENDPOINT"
        ) from None


@contextmanager
def upload_errors(place: str) -> Iterator[None]:
    """What uploading raises besides: errors of the LFS protocol, of Xet, and of reading OUT.

    Raises:
        HubError: The Hub or its storage failed.
        OutputError: A file cannot be read any more.
    """
    try:
        yield
    except (HttpError, ConnectionError, json.JSONDecodeError, MoeconvError):
        raise
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise OutputError(
                f"{error.filename} cannot be read: {error.strerror}; nothing was committed"
            ) from None
        # Files are sent by threads, whose own error is the cause.
        cause = error.__cause__ or error
        if isinstance(cause, MoeconvError):
            raise cause from None
        refused = status_of(cause) == 403  # such an address is good for some hours
        if isinstance(cause, HttpError | ConnectionError) and not refused:
            raise cause from None
        why = "the storage refuses its own address (403)" if refused else _short(cause)
        raise HubError(
            f"uploading ({place}) failed: {why}; run the same command again, what the Hub has is "
            "not sent twice"
        ) from None


def explain(error: BaseException, what: str, place: str) -> str:
    """The sentence."""
    status = status_of(error)
    begin = f"{what} ({place}) failed: "
    retry = "run the same command again, what the Hub has is not sent twice"
    if isinstance(error, OfflineModeIsEnabled):
        return begin + "HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if isinstance(error, LocalTokenNotFoundError):
        return begin + f"there is no token; set HF_TOKEN ({_SETTINGS}) or run `hf auth login`"
    if isinstance(error, HFValidationError):
        return begin + f"{error}; give --repo-id NAMESPACE/NAME"
    if status is None:
        words = _short(error)
        xet = "; HF_HUB_DISABLE_XET=1 uploads without Xet" if "xet" in words else ""
        return begin + (
            f"the connection broke ({words}) and trying again did not help; {retry}{xet}"
        )
    match error:
        case RevisionNotFoundError():
            return begin + "there is no such branch (404); see --revision"
        case GatedRepoError():
            return begin + (
                "the repository is gated (403) and this account has no access; ask for it on the "
                "repository's page, or push to another --repo-id"
            )
    said = server_message(error)
    reason = f", {said}" if said else ""
    match status:
        case 401 if not isinstance(error, RepositoryNotFoundError):
            return begin + (
                f"the Hub does not take the token (401{reason}); it is wrong, expired or revoked: "
                f"set HF_TOKEN to a valid one ({_SETTINGS}) or run `hf auth login`"
            )
        case 401 | 404:
            return begin + (
                f"there is no such repository, or the token may not see it ({status}{reason}); "
                "check --repo-id, and that the token may read and write it"
            )
        case 403:
            return begin + (
                f"the token may not do that (403{reason}); it needs write access to {place}: make "
                f"one on {_SETTINGS}, or push to a namespace of your own"
            )
        case 409 | 412:
            return begin + (
                f"another commit changed the repository meanwhile ({status}{reason}); nothing of "
                f"this push was committed: look at what changed, then {retry}"
            )
        case 413:
            return begin + (
                f"a file is larger than the Hub takes (413{reason}); convert again with a smaller "
                "--max-shard-size"
            )
        case 429:
            wait = retry_after(error)
            after = f"in {wait:.0f} s" if wait else "later"
            return begin + f"the Hub allows no more requests now (429{reason}); {retry}, {after}"
        case _ if status >= 500:
            return begin + (
                f"the Hub is in trouble ({status}{reason}) and trying again did not help; see "
                f"https://status.huggingface.co, then {retry}"
            )
        case _:
            return begin + f"the Hub answered {status}{reason or ' without a reason'}"


def server_message(error: BaseException) -> str:
    """What the Hub itself said, in one line; empty when nothing."""
    text = getattr(error, "server_message", None) or ""
    return _line(text)[:300].rstrip(".")


def _short(error: BaseException) -> str:
    status = status_of(error)
    if status is not None:
        return f"the Hub answered {status}"
    return _line(error).rstrip(".") or type(error).__name__


def _line(words: object) -> str:
    """Words of others as one line that a terminal can take, without tokens."""
    return redact(printable(" ".join(str(words).split())))


@contextmanager
def hub_words(note: Note) -> Iterator[None]:
    """Passes on what huggingface_hub logs (its retries), without tokens and signed addresses."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(_line(record.getMessage()))

    logger = logging.getLogger("huggingface_hub")
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [Handler(logging.WARNING)], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        for one in caught:
            if issubclass(one.category, UserWarning):
                note(_line(one.message))
