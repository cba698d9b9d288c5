"""`moeconv push`: a verified model to the Hub, in one commit."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeconv.cli.options import JSON, QUIET, LocalPath, Revision, Text, output_of
from moeconv.cli.output import Output
from moeconv.cli.streams import say
from moeconv.untrusted.text import printable

if TYPE_CHECKING:
    from moeconv.hub.push import Pushed, PushPlan

_SAYS = {
    "add": "add",
    "replace": "replace",
    "same": "same, not sent",
    "delete": "delete",
    "keep": "left alone",
}


@click.command("push")
@click.argument("out", metavar="[OUT]", required=False, type=LocalPath())
@click.option(
    "--repo-id",
    metavar="NAMESPACE/NAME",
    help="Where to. Default: the repository that the run's config names.",
)
@click.option("--private", is_flag=True, help="If the repository has to be made, make it private.")
@click.option(
    "--revision",
    type=Revision(),
    default="main",
    show_default=True,
    metavar="BRANCH",
    help="Made if needed.",
)
@click.option(
    "--create-pr",
    is_flag=True,
    help="Open a pull request; while it is open, later runs go on with it.",
)
@click.option("--dry-run", is_flag=True, help="Say what would happen, and change nothing.")
@click.option(
    "--unverified",
    is_flag=True,
    help="Push what is not proven to be the model; its card says so.",
)
@click.option("--message", type=Text(), metavar="TEXT", help="Of the commit.")
@click.option(
    "--license",
    metavar="ID",
    help="License of the model, as the Hub names it. Default: what the run says.",
)
@click.option(
    "--endpoint",
    metavar="URL",
    help="Address of the Hub. Default: HF_ENDPOINT, else https://huggingface.co.",
)
@JSON
@QUIET
def command(
    out: Path | None,
    dry_run: bool,
    endpoint: str | None,
    json_mode: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Publish a verified model on the Hugging Face Hub.

    OUT is an output of `moeconv convert`; the newest one below the current directory is taken
    unless one is named. The token comes from HF_TOKEN or `hf auth login`. Everything lands in one
    commit, or nothing does; after a broken run the same command goes on.
    """
    output = output_of(json_mode, quiet)
    if not sys.stderr.isatty():
        # Read by tqdm when it is imported: into a file, bars say something every few seconds.
        os.environ.setdefault("TQDM_MININTERVAL", "5")
    from huggingface_hub.utils import disable_progress_bars

    from moeconv.hf.hub_address import read_address
    from moeconv.hub.account import demand_token
    from moeconv.hub.failures import hub_words
    from moeconv.hub.prepare import PushOptions, find_output, prepare
    from moeconv.hub.push import plan_push, push

    if json_mode or quiet:
        disable_progress_bars()
    settings = PushOptions(**options)
    read_address(endpoint)  # one that is none, before anything else
    folder = find_output(out, output.warn if quiet else output.note)
    if not dry_run:
        demand_token()  # before minutes of reading
    parcel = prepare(folder, settings, dry_run=dry_run, note=output.note)
    try:
        with hub_words(output.note):
            plan = plan_push(parcel, settings, endpoint=endpoint, dry_run=dry_run, note=output.note)
            for text in plan.warnings:
                output.warn(text)
            if dry_run:
                output.data(describe(plan, settings))
                _print_plan(output, plan, settings)
                return
            done = push(plan, settings, note=output.note)
    except KeyboardInterrupt:
        say("interrupted: a commit lands whole or not at all; the same command goes on")
        sys.exit(130)
    output.data(_result(plan, done))
    _print_files(output, done.changes)
    sent = sum(1 for change in done.changes if change.action in ("add", "replace"))
    output.print(
        f"the Hub lists what was sent: {len([c for c in done.changes if c.file])} files with their "
        f"sizes and digests ({sent} new)"
    )
    output.print(f"commit: {done.commit.url}")
    if done.commit.pull_request:
        output.print(f"pull request: {done.commit.pull_request}")


def describe(plan: "PushPlan", settings: Any) -> dict[str, Any]:
    """A dry run as data."""
    account, remote, judgement = plan.account, plan.remote, plan.parcel.judgement
    return {
        "out": str(plan.parcel.output.folder),
        "endpoint": plan.address.url,
        "repo_id": plan.parcel.repo_id,
        "revision": settings.revision,
        "repository": _repository(plan, settings),
        "exists": remote.exists if remote else None,
        "private": remote.private if remote and remote.exists else settings.private or None,
        "account": account.name if account else None,
        "may_write": account.may_write if account else None,
        "verified": judgement.verified,
        "problem": judgement.problem,
        "files": _files(plan.changes),
        "left_behind": list(plan.parcel.left_behind),
        "card": plan.card,
        "card_checked": plan.card_checked,
        "warnings": list(plan.warnings),
    }


def _result(plan: "PushPlan", done: "Pushed") -> dict[str, Any]:
    return {
        "endpoint": plan.address.url,
        "repo_id": plan.parcel.repo_id,
        "revision": done.commit.revision,
        "commit": done.commit.oid,
        "commit_url": done.commit.url,
        "pull_request": done.commit.pull_request,
        "verified": plan.parcel.judgement.verified,
        "sent_bytes": done.sent_bytes,
        "files": _files(done.changes),
        "left_behind": list(plan.parcel.left_behind),
        "warnings": list(plan.warnings),
    }


def _files(changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "bytes": one.size,
            "action": one.action,
            "sha256": one.file.sha256 if one.file else None,
        }
        for one in changes
    ]


def _print_plan(output: Output, plan: "PushPlan", settings: Any) -> None:
    _print_files(output, plan.changes, known=plan.remote is not None)
    for name, why in plan.parcel.left_behind.items():
        output.print(f"{name}: stays here ({why})")
    output.print()
    output.print(
        f"repository: {plan.address.url}/{plan.parcel.repo_id}, {_repository(plan, settings)}"
    )
    output.print(f"account: {_account(plan)}")
    judgement = plan.parcel.judgement
    if judgement.verified:
        output.print(f"verified: yes, levels {_levels(plan)}")
    elif settings.unverified:
        output.print(f"verified: no, {judgement.problem}; the card says so")
    else:
        output.print(f"verified: no, {judgement.problem}; push would refuse (--unverified)")
    checked = "" if plan.card_checked else ", not validated by the Hub"
    output.print(f"card: {plan.card_origin}{checked}")
    output.print()
    output.print(plan.card.rstrip())


def _print_files(output: Output, changes: Any, *, known: bool = True) -> None:
    from rich.table import Table
    from rich.text import Text

    from moeconv.sizes import format_size

    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("on the Hub")
    for one in changes:
        table.add_row(
            Text(printable(one.name)),
            format_size(one.size),
            _SAYS[one.action] if known else "unknown",
        )
    output.print(table)


def _repository(plan: "PushPlan", settings: Any) -> str:
    remote = plan.remote
    if remote is None:
        return "of which nothing is known"
    if not remote.exists:
        kind = (
            "private" if settings.private else "public, unless the namespace's default is private"
        )
        seen = "" if plan.account else " (or is private, which nobody without a token can see)"
        return f"which is not there{seen} and would be made: {kind}"
    kind = {True: "private", False: "public", None: "of unknown visibility"}[remote.private]
    where = f"branch {settings.revision}" + ("" if remote.branch else " (would be made)")
    if remote.pull_request is not None:
        where = f"pull request {remote.pull_request} (open, goes on)"
    elif settings.create_pr:
        where = "a new pull request"
    return f"{kind}; {where}"


def _account(plan: "PushPlan") -> str:
    account = plan.account
    if account is None:
        return "no token, or the Hub did not tell"
    if account.may_write is None:
        return f"{account.name}; whether it may write is unknown: {account.why}"
    return (
        f"{account.name}, {'may write' if account.may_write else f'may not write: {account.why}'}"
    )


def _levels(plan: "PushPlan") -> str:
    report = plan.parcel.judgement.report
    assert report is not None
    return ", ".join(f"{level} {status.value}" for level, status in report.levels.items())
