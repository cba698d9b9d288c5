"""Sending: large files first, then one commit, then the Hub's listing against what was sent."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import tqdm

from moeconv.errors import HubError, MoeconvError
from moeconv.hub.changes import Change, differences
from moeconv.hub.failures import (
    WAITS,
    Note,
    is_transient,
    retry_after,
    status_of,
    with_retries,
)
from moeconv.hub.local import File
from moeconv.hub.remote import (
    PR_MARK,
    RemoteFile,
    find_pull_request,
    list_files,
)
from moeconv.hub.weights import Weights
from moeconv.untrusted.text import printable

_OID = re.compile("[0-9a-f]{40,64}")


@dataclass(frozen=True)
class Target:
    """Where a commit goes.

    Attributes:
        repo_id: Repository.
        revision: Branch, or `refs/pr/N`.
        head: Commit that the changes were planned for.
        author: Account, to find a pull request by.
        create_pr: The commit opens a pull request.
    """

    repo_id: str
    revision: str
    head: str
    author: str
    create_pr: bool


@dataclass(frozen=True)
class Commit:
    """A commit on the Hub."""

    oid: str
    url: str
    revision: str
    pull_request: str | None = None


def make_repository(api: HfApi, repo_id: str, *, private: bool, note: Note) -> None:
    """Makes a repository; one that is there already stays as it is."""
    with_retries(
        # Without --private the namespace's own default decides.
        lambda: api.create_repo(repo_id, private=private or None, exist_ok=True),
        "making the repository",
        note,
    )


def make_branch(api: HfApi, repo_id: str, branch: str, note: Note) -> None:
    """Makes a branch that begins where main is."""
    with_retries(
        lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), "the branch", note
    )


def operations_of(
    changes: Sequence[Change], opened: ExitStack
) -> tuple[list[CommitOperationAdd], list[CommitOperationDelete]]:
    """What the commit does; the digests are known, so no file is hashed again.

    Args:
        changes: What is planned.
        opened: Holds the files of weights open until they are sent.

    Raises:
        OutputError: A file is no longer the one that was hashed.
    """
    adds, deletes = [], []
    for change in changes:
        if change.action == "delete":
            deletes.append(CommitOperationDelete(change.name, is_folder=False))
        elif change.action in ("add", "replace"):
            assert change.file is not None
            adds.append(_add(change.file, opened))
    return adds, deletes


def _add(file: File, opened: ExitStack) -> CommitOperationAdd:
    if file.weights is None:
        return CommitOperationAdd(file.name, file.looked_at)
    descriptor = opened.enter_context(file.weights.descriptor())
    # The file that was hashed, whatever is at its path by now: this is what Xet reads.
    add = _AddWeights(file.name, f"/dev/fd/{descriptor}")
    add.upload_info.sha256 = bytes.fromhex(file.sha256)
    os.lseek(descriptor, 0, os.SEEK_SET)  # where /dev/fd shares the place of reading (macOS)
    add.weights, add.descriptor = file.weights, descriptor
    return add


class _AddWeights(CommitOperationAdd):  # type: ignore[misc]
    """A file that is sent as it was hashed, or not at all."""

    weights: Weights
    descriptor: int

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """What LFS reads: each block is compared with its digest before it is handed out."""
        with (
            self.weights.reader(self.descriptor) as file,
            tqdm(
                unit="B",
                unit_scale=True,
                total=self.weights.size,
                desc=self.path_in_repo,
                disable=None if with_tqdm else True,
            ) as bar,
        ):
            plain = file.read

            def read(size: int | None = -1) -> bytes:
                data = plain(size)
                bar.update(len(data))
                return data

            file.read = read  # type: ignore[method-assign]
            yield file

    def b64content(self) -> bytes:
        """What a commit holds itself; no weights do, as they would have to fit the memory."""
        raise HubError(
            f"the Hub asks for {self.path_in_repo} within the commit, which is for small files; "
            "nothing was committed"
        )

    def demand_unchanged(self) -> None:
        """Raises OutputError if the file changed since it was hashed."""
        self.weights.demand_unchanged(self.descriptor)


def demand_unchanged(adds: Iterable[CommitOperationAdd]) -> None:
    """Makes sure that what was sent is what was hashed; Xet reads the files itself.

    Raises:
        OutputError: It may not be.
    """
    for add in adds:
        if isinstance(add, _AddWeights):
            add.demand_unchanged()


def send(
    api: HfApi,
    target: Target,
    adds: Sequence[CommitOperationAdd],
    deletes: Sequence[CommitOperationDelete],
    changes: Sequence[Change],
    *,
    message: str,
    note: Note,
) -> Commit:
    """Makes the one commit. It lands whole or not at all, and never twice.

    Its answer may be lost after it landed, so before it is sent again the Hub is asked; and it
    names its parent, so that it cannot land on top of another commit made meanwhile.
    """
    last = len(WAITS)
    for attempt in range(last + 1):
        try:
            info = api.create_commit(
                target.repo_id,
                [*adds, *deletes],
                commit_message=message,
                commit_description=PR_MARK if target.create_pr else "",
                revision=None if target.create_pr else target.revision,
                create_pr=target.create_pr,
                parent_commit=target.head,
            )
            if not _OID.fullmatch(info.oid):
                raise ValueError("it names no commit")
            return Commit(
                info.oid,
                printable(info.commit_url),
                info.pr_revision or target.revision,
                info.pr_url and printable(info.pr_url),
            )
        except MoeconvError:
            raise
        except Exception as error:
            # An answer that cannot be read may be one to a commit that landed.
            answered = status_of(error) is None
            if not (is_transient(error) or status_of(error) in (409, 412) or answered):
                raise
            try:
                landed = _landed(api, target, changes, note)
            except Exception:  # whatever comes of an answer that is none
                raise HubError(
                    f"committing ({target.repo_id}) failed: {error_name(error)}, and the Hub does "
                    "not say whether the commit landed all the same; run the same command again, "
                    "nothing is sent or committed twice"
                ) from None
            if landed is not None:
                note("the commit landed, only the answer was lost")
                return landed
            # A 409 may be a lock that is held for a moment; a moved head stays moved.
            moved = status_of(error) == 412 or _moved(api, target, note)
            if moved or attempt == last or not (is_transient(error) or status_of(error) == 409):
                raise
            pause = max(WAITS[attempt], retry_after(error) or 0.0)
            note(f"the commit: {error_name(error)}; trying again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def error_name(error: BaseException) -> str:
    """An error in a few words."""
    status = status_of(error)
    if status is not None:
        return f"the Hub answered {status}"
    return "the connection broke" if is_transient(error) else "the answer is not that of a Hub"


def _landed(api: HfApi, target: Target, changes: Sequence[Change], note: Note) -> Commit | None:
    """Our commit, if it is on the Hub after all."""
    revision, url = target.revision, None
    if target.create_pr:
        number = find_pull_request(api, target.repo_id, target.author, note)
        if number is None:
            return None
        revision = f"refs/pr/{number}"
        url = f"{api.endpoint}/{target.repo_id}/discussions/{number}"
    head = _head(api, target.repo_id, revision, note)
    if head == target.head or differences(changes, list_files(api, target.repo_id, head, note)):
        return None
    return Commit(head, f"{api.endpoint}/{target.repo_id}/commit/{head}", revision, url)


def _moved(api: HfApi, target: Target, note: Note) -> bool:
    return not target.create_pr and target.head != _head(api, target.repo_id, target.revision, note)


def _head(api: HfApi, repo_id: str, revision: str, note: Note) -> str:
    found: str = with_retries(
        lambda: api.model_info(repo_id, revision=revision), "the head", note
    ).sha
    return found


def check_listing(
    api: HfApi, repo_id: str, commit: Commit, changes: Sequence[Change], note: Note
) -> Mapping[str, RemoteFile]:
    """The Hub's listing after the commit, which must be what was planned.

    Raises:
        HubError: It is not.
    """
    try:
        listing = list_files(api, repo_id, commit.oid, note)
    except HfHubHTTPError as error:
        if status_of(error) != 404:
            raise
        listing = list_files(api, repo_id, commit.revision, note)
    if wrong := differences(changes, listing):
        raise HubError(
            f"the commit {commit.url} landed, but the Hub's listing is not what was sent: "
            f"{'; '.join(wrong[:5])}; look at the repository's .gitignore, then push again"
        )
    return listing
