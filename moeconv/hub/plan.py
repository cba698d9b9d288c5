"""What a push would do and what it did, as values that print themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeconv.hf.hub_address import Address
from moeconv.hub.account import Account
from moeconv.hub.changes import Change
from moeconv.hub.prepare import PreparedPush, PushOptions
from moeconv.hub.remote import Remote
from moeconv.hub.upload import Commit
from moeconv.printing import Printable
from moeconv.sizes import format_size
from moeconv.untrusted.text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SAYS = {
    "add": "add",
    "replace": "replace",
    "same": "same, not sent",
    "delete": "delete",
    "keep": "left alone",
}


@dataclass(frozen=True)
class PushPlan(Printable):
    """What a push would do.

    Attributes:
        prepared: What is sent.
        options: The user's.
        address: To which Hub.
        account: Whose token it is; None without a token, or if the Hub does not say.
        remote: What is there; None when the Hub could not be reached.
        changes: File by file.
        card: The README as it would be.
        card_origin: Whose text it is.
        card_checked: True if the Hub has validated its metadata.
        warnings: The prepared push's, and what could not be found out; a sentence each.
        dry_run: It is for looking at: nothing was refused.
    """

    prepared: PreparedPush
    options: PushOptions
    address: Address
    account: Account | None
    remote: Remote | None
    changes: tuple[Change, ...]
    card: str
    card_origin: str
    card_checked: bool
    warnings: tuple[str, ...]
    dry_run: bool

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv push --dry-run --json` prints."""
        account, remote, judgement = self.account, self.remote, self.prepared.judgement
        there = remote if remote and remote.exists else None
        return {
            "out": str(self.prepared.output.folder),
            "endpoint": self.address.url,
            "repo_id": self.prepared.repo_id,
            "revision": self.options.revision,
            "repository": self._repository(),
            "exists": remote.exists if remote else None,
            "private": there.private if there else self.options.private or None,
            "account": account.name if account else None,
            "may_write": account.may_write if account else None,
            "verified": judgement.verified,
            "problem": judgement.problem,
            "files": _files(self.changes),
            "left_behind": list(self.prepared.left_behind),
            "card": self.card,
            "card_checked": self.card_checked,
            "warnings": list(self.warnings),
        }

    def parts(self) -> "Iterator[RenderableType]":
        """What `moeconv push --dry-run` prints."""
        yield _table(self.changes, known=self.remote is not None)
        for name, why in self.prepared.left_behind.items():
            yield f"{name}: stays here ({why})"
        yield ""
        yield f"repository: {self.address.url}/{self.prepared.repo_id}, {self._repository()}"
        yield f"account: {self._account()}"
        yield f"verified: {self._verified()}"
        checked = "" if self.card_checked else ", not validated by the Hub"
        yield f"card: {self.card_origin}{checked}"
        yield ""
        yield self.card.rstrip()

    def _repository(self) -> str:
        remote, options = self.remote, self.options
        if remote is None:
            return "of which nothing is known"
        if not remote.exists:
            default = "public, unless the namespace's default is private"
            kind = "private" if options.private else default
            seen = "" if self.account else " (or is private, which needs a token to be seen)"
            return f"which is not there{seen} and would be made: {kind}"
        kind = {True: "private", False: "public", None: "of unknown visibility"}[remote.private]
        where = f"branch {options.revision}" + ("" if remote.branch else " (would be made)")
        if remote.pull_request is not None:
            where = f"pull request {remote.pull_request} (open, goes on)"
        elif options.create_pr:
            where = "a new pull request"
        return f"{kind}; {where}"

    def _account(self) -> str:
        account = self.account
        if account is None:
            return "no token, or the Hub did not say"
        if account.may_write is None:
            return f"{account.name}; whether it may write is unknown: {account.why}"
        may = "may write" if account.may_write else f"may not write: {account.why}"
        return f"{account.name}, {may}"

    def _verified(self) -> str:
        report, problem = self.prepared.judgement.report, self.prepared.judgement.problem
        if problem is None:
            assert report is not None
            levels = ", ".join(f"{level} {status}" for level, status in report.levels.items())
            return f"yes, levels {levels}"
        if self.options.unverified:
            return f"no, {problem}; the card says so"
        return f"no, {problem}; push would refuse (--unverified)"


@dataclass(frozen=True)
class Pushed(Printable):
    """What was done.

    Attributes:
        plan: What was to be done.
        commit: The commit, or the head where nothing had to change; None of a dry run.
        changes: File by file.
        sent_bytes: Of the files that were new or replaced.
    """

    plan: PushPlan
    commit: Commit | None
    changes: tuple[Change, ...]
    sent_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv push --json` prints."""
        plan, commit = self.plan, self.commit
        if commit is None:
            return plan.as_dict()
        return {
            "endpoint": plan.address.url,
            "repo_id": plan.prepared.repo_id,
            "revision": commit.revision,
            "commit": commit.oid,
            "commit_url": commit.url,
            "pull_request": commit.pull_request,
            "verified": plan.prepared.judgement.verified,
            "sent_bytes": self.sent_bytes,
            "files": _files(self.changes),
            "left_behind": list(plan.prepared.left_behind),
            "warnings": list(plan.warnings),
        }

    def parts(self) -> "Iterator[RenderableType]":
        """What `moeconv push` prints."""
        if self.commit is None:
            yield from self.plan.parts()
            return
        yield _table(self.changes)
        new = sum(change.action in ("add", "replace") for change in self.changes)
        listed = sum(change.file is not None for change in self.changes)
        yield (
            f"the Hub lists what was sent: {listed} files with their sizes and digests ({new} new)"
        )
        yield f"commit: {self.commit.url}"
        if self.commit.pull_request:
            yield f"pull request: {self.commit.pull_request}"


def _files(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [
        {
            "name": change.name,
            "bytes": change.size,
            "action": change.action,
            "sha256": change.file.sha256 if change.file else None,
        }
        for change in changes
    ]


def _table(changes: Sequence[Change], *, known: bool = True) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("on the Hub")
    for change in changes:
        action = _SAYS[change.action] if known else "unknown"
        table.add_row(Text(printable(change.name)), format_size(change.size), action)
    return table
