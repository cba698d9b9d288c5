"""What the Hub has: the repository, the head of a branch or pull request, and its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from moeconv.hub.failures import Note, with_retries
from moeconv.hub.local import File

# In the first comment of a pull request that push opened: how a later run finds it again.
PR_MARK = "Opened by `moeconv push --create-pr`; a later run with that flag goes on with it."


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub.

    Attributes:
        size: In bytes.
        git_oid: git's name of it (of its pointer, for an LFS file).
        sha256: Of an LFS file, its oid.
    """

    size: int
    git_oid: str
    sha256: str | None

    def is_same(self, file: File) -> bool:
        """True if a local file has these bytes."""
        if self.size != file.size:
            return False
        if self.sha256 is not None:
            return self.sha256 == file.sha256
        return self.git_oid == file.git_oid


@dataclass(frozen=True)
class Remote:
    """A repository at one commit.

    Attributes:
        exists: True if the repository is there, as far as the token can see.
        private: Its visibility; None when it is not there.
        head: Commit that the files are of; None when there is none.
        branch: True if the branch is there.
        files: By name.
        pull_request: Number of the open pull request that push goes on with.
    """

    exists: bool
    private: bool | None = None
    head: str | None = None
    branch: bool = True
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    pull_request: int | None = None


def read_remote(
    api: HfApi, repo_id: str, revision: str, *, pull_request_of: str | None, note: Note
) -> Remote:
    """Looks at a repository.

    Args:
        api: The Hub.
        repo_id: The repository.
        revision: Branch; without one of this name, the files of `main` are what it begins with.
        pull_request_of: An account: its open pull request is looked at instead, if it has one.
        note: For people.
    """

    def info(at: str | None) -> tuple[str | None, bool | None]:
        found = with_retries(lambda: api.model_info(repo_id, revision=at), "the repository", note)
        if not isinstance(found.sha, str | None) or not isinstance(found.private, bool | None):
            raise TypeError("it describes no repository")
        return found.sha, found.private

    try:
        main = info(None)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Remote(exists=False)
    number = None
    if pull_request_of is not None:
        number = find_pull_request(api, repo_id, pull_request_of, note)
    at = revision if number is None else f"refs/pr/{number}"
    branch = True
    try:
        head, private = info(at)
    except RevisionNotFoundError:
        head, private = main
        branch = False
    files = list_files(api, repo_id, head, note) if head is not None else {}
    return Remote(True, private, head, branch, files, number)


def list_files(api: HfApi, repo_id: str, revision: str, note: Note) -> dict[str, RemoteFile]:
    """Every file at a commit."""
    tree = with_retries(
        lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=revision)),
        "the listing",
        note,
    )
    files = {}
    for one in tree:
        if isinstance(one, RepoFile):
            oid = one.lfs.sha256 if one.lfs else None
            values = (one.path, one.size, one.blob_id, oid)
            if not all(map(isinstance, values, (str, int, str, str | None))):
                raise TypeError("it lists no files")
            files[one.path] = RemoteFile(one.size, one.blob_id, oid)
    return files


def find_pull_request(api: HfApi, repo_id: str, author: str, note: Note) -> int | None:
    """The newest open pull request of an account that push opened."""
    found = with_retries(
        lambda: list(
            api.get_repo_discussions(
                repo_id, author=author, discussion_type="pull_request", discussion_status="open"
            )
        ),
        "the pull requests",
        note,
    )
    for one in sorted(found, key=lambda one: -int(one.num)):

        def details(number: int = one.num) -> Any:
            return api.get_discussion_details(repo_id, number)

        events = with_retries(details, "the pull request", note).events
        if any(PR_MARK in (getattr(event, "content", None) or "") for event in events):
            return int(one.num)
    return None
