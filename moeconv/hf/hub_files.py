"""The files of a model on the Hub, read by ranges of bytes: nothing is copied whole.

A revision is resolved to its commit once. What is read later is of that commit, and of the very
content that its listing names: an answer with another ETag or another size is refused.
"""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from moeconv.errors import (
    ConfigError,
    MoeconvError,
    NotACheckpointError,
    StorageError,
    TensorError,
    UsageError,
)
from moeconv.hf import hub_client
from moeconv.hf.files import Dtype, FetchedReader
from moeconv.hf.hub_address import Address, read_address
from moeconv.hf.hub_trouble import hub_trouble
from moeconv.hf.safetensors import Header, parse_header
from moeconv.tensor.stored import Reader
from moeconv.untrusted.text import printable

SCHEME = "hf://"
# huggingface_hub/utils/_validators.py `validate_repo_id`: namespace/name; then any git revision.
_ADDRESS = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([^\s@]+))?/?", re.ASCII)
# Bytes asked for at once, and how often in a row a request may bring none of them.
_STEP, _TRIES = 64 * 2**20, 6
_AGAIN = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class _Entry:
    """A file of a commit: its bytes, and its ETag."""

    size: int
    etag: str


@dataclass(frozen=True)
class HubFiles:
    """A commit of a model on the Hub (`hf.files.Files`).

    Attributes:
        address: The Hub.
        repo_id: `namespace/name`.
        commit: Its hash.
        entries: Every file of it, by its path.
    """

    address: Address
    repo_id: str
    commit: str
    entries: Mapping[str, _Entry]

    @property
    def name(self) -> str:
        """With the commit."""
        return f"{SCHEME}{self.repo_id}@{self.commit}"

    @property
    def remote(self) -> bool:
        """See `Files`."""
        return True

    @classmethod
    def open(cls, text: str) -> "HubFiles":
        """Finds a model's commit and lists its files.

        Args:
            text: `hf://namespace/name[@revision]`; the revision is a branch, a tag, a commit or
                `refs/pr/N`, by default main.

        Raises:
            UsageError: It is no such address, or the Hub's own (HF_ENDPOINT) is none.
            NotACheckpointError: There is no such model, or no such revision.
            StorageError: The Hub may not be read, or does not answer.
        """
        if (match := _ADDRESS.fullmatch(text)) is None:
            raise UsageError(
                f"{printable(text)} is no model on the Hub; write hf://namespace/name, or "
                "hf://namespace/name@revision"
            )
        repo_id, revision = match.groups()
        address = read_address(None)

        def ask() -> tuple[str, dict[str, _Entry]]:
            from huggingface_hub import HfApi
            from huggingface_hub.hf_api import RepoFile

            api = HfApi(endpoint=address.url)
            commit = str(api.model_info(repo_id, revision=revision, files_metadata=False).sha)
            return commit, {
                each.path: _Entry(each.size, each.lfs.sha256 if each.lfs else each.blob_id)
                for each in api.list_repo_tree(repo_id, revision=commit, recursive=True)
                if isinstance(each, RepoFile)
            }

        with _client(address):
            commit, entries = _asked(text, repo_id, ask)
        return cls(address, repo_id, commit, entries)

    def connected(self) -> AbstractContextManager[None]:
        """See `Files`."""
        return _client(self.address)

    def sizes(self) -> dict[str, int]:
        """See `Files`."""
        return {name: entry.size for name, entry in self.entries.items()}

    def version(self, name: str) -> str:
        """Its size and ETag."""
        return f"{self.entries[name].size} {self.entries[name].etag}"

    def read(self, name: str, limit: int) -> bytes:
        """See `Files`."""
        size = self._entry(name).size
        if size > limit:
            raise ConfigError(f"{self.name}/{name} is larger than {limit // 2**20} MiB")
        into = bytearray(size)
        self.fill(name, 0, memoryview(into))
        return bytes(into)

    def header(self, name: str) -> Header:
        """See `Files`."""
        size, at = self._entry(name).size, 0

        def read(count: int) -> bytes:
            nonlocal at
            into = bytearray(min(count, size - at))
            self.fill(name, at, memoryview(into))
            at += len(into)
            return bytes(into)

        return parse_header(f"{self.name}/{name}", size, read)

    def reader(self, name: str, dtype: Dtype, offset: int, shape: tuple[int, ...]) -> Reader:
        """See `Files`."""

        def fill(begin: int, into: memoryview) -> None:
            self.fill(name, offset + begin, into)

        return FetchedReader(fill, dtype, shape)

    def fill(self, name: str, offset: int, into: memoryview) -> None:
        """Reads as many bytes of a file as there is room for; what breaks off is gone on with.

        Raises:
            TensorError: The file is another one by now.
            StorageError: The Hub failed several times in a row, or asks for too long a wait.
        """
        _asked(f"{self.name}/{name}", self.repo_id, lambda: self._fill(name, offset, into))

    def _fill(self, name: str, offset: int, into: memoryview) -> None:
        done = tries = 0
        while done < len(into):
            before, step = done, min(_STEP, len(into) - done)
            failure: Exception
            try:
                for block in self._range(name, offset + done, step):
                    into[done : done + len(block)] = block
                    done += len(block)
                if done == before + step:
                    continue
                failure = EOFError("the answer ended early")
            except hub_client.HttpError as error:
                if _status(error) is not None:
                    raise  # huggingface_hub has asked several times
                failure = error
            tries = 0 if done > before else tries + 1
            if tries == _TRIES:
                raise failure
            time.sleep(min(8.0, 0.5 * 2**tries))

    def _range(self, name: str, offset: int, length: int) -> Any:
        """The blocks of an answer with a range of a file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(self.repo_id, name, revision=self.commit, endpoint=self.address.url)
        headers = build_hf_headers()
        headers["Range"] = f"bytes={offset}-{offset + length - 1}"
        # It cannot go on after an exception once the answer is given out; `_fill` does.
        with http_stream_backoff(
            "GET", url, headers=headers, retry_on_exceptions=(), retry_on_status_codes=_AGAIN
        ) as answer:
            hf_raise_for_status(answer)
            self._demand_same(name, answer, offset, length)
            taken = 0
            for block in answer.iter_bytes():
                if (taken := taken + len(block)) > length:
                    raise StorageError(f"{answer.url.host} sends more than it was asked for")
                yield block

    def _demand_same(self, name: str, answer: Any, offset: int, length: int) -> None:
        """An answer must be of the file that was listed, and be the range that was asked for."""
        entry, asked = self.entries[name], f"bytes {offset}-{offset + length - 1}/"
        said = answer.headers.get("Content-Range", "")
        if answer.status_code == 200 and length == entry.size:
            said, asked = f"bytes */{answer.headers.get('Content-Length', entry.size)}", "bytes */"
        elif answer.status_code != 206 or not said.startswith(asked):
            raise StorageError(
                f"{answer.url.host} does not answer with the range that was asked for "
                f"({answer.status_code} {printable(said)}); download the model and convert the "
                "folder"
            )
        # The Hub's own answer names the content (file_download.py, `get_hf_file_metadata`); a
        # store that it leads to has ETags of its own.
        first = (*answer.history, answer)[0].headers
        etag = first.get("X-Linked-Etag") or first.get("ETag") or entry.etag
        if etag.removeprefix("W/").strip('"') != entry.etag or said != f"{asked}{entry.size}":
            raise TensorError(
                f"{self.name}/{name} is not the file that was listed when reading began (its ETag "
                "or size is another), so that the model would be a mixture; convert again"
            )

    def _entry(self, name: str) -> _Entry:
        if name not in self.entries:
            raise FileNotFoundError(name)
        return self.entries[name]


def _client(address: Address) -> AbstractContextManager[None]:
    limits = replace(
        hub_client.LIMITS,
        # As many as a model has ranges, and as long as they take: each wait has its own limit.
        requests=2**62,
        waits=float("inf"),
        kept="go on with --resume {when}, what was written is not read again",
    )
    return hub_client.hub_client(address, limits)


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _asked[Answer](what: str, repo_id: str, question: Callable[[], Answer]) -> Answer:
    """What the Hub answers.

    Raises:
        NotACheckpointError: There is no such model, or no such revision.
        StorageError: The Hub may not be read, or does not answer.
        TensorError: From the question.
    """
    from huggingface_hub import errors

    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
    try:
        return question()
    except (ConfigError, TensorError, StorageError, UsageError):
        raise
    except MoeconvError as error:  # a limit of the client, or where the token must not go
        raise StorageError(f"{what}: {error}") from None
    except Exception as error:  # its transport's own errors have no stable name to catch
        gated = isinstance(error, errors.GatedRepoError)
        kind = NotACheckpointError if isinstance(error, absent) and not gated else StorageError
        raise kind(f"{what}: {hub_trouble(error, repo_id, 'model', None)}") from error
