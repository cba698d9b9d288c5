"""`push` as library calls: `plan_push` looks at both sides, `push` carries it out."""

from collections.abc import Sequence
from contextlib import ExitStack

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from moeconv import __version__
from moeconv.artifact.manifest import MANIFEST_NAMES
from moeconv.artifact.names import CARD_NAME
from moeconv.errors import HubError, OutputError, UsageError
from moeconv.hf.hub_address import Address, other_host_warning, read_address
from moeconv.hf.hub_client import hub_client
from moeconv.hub.account import Account, demand_token, read_account
from moeconv.hub.changes import plan_changes
from moeconv.hub.failures import Note, hub_errors, status_of, upload_errors, with_retries
from moeconv.hub.gate import demand
from moeconv.hub.local import File
from moeconv.hub.metadata import read_metadata
from moeconv.hub.plan import Pushed, PushPlan
from moeconv.hub.prepare import PreparedPush, PushOptions
from moeconv.hub.public import demand_sendable
from moeconv.hub.remote import Remote, read_remote
from moeconv.hub.upload import (
    Commit,
    Target,
    check_listing,
    demand_unchanged,
    make_branch,
    make_repository,
    operations_of,
    send,
)
from moeconv.sizes import format_size


def plan_push(
    prepared: PreparedPush, options: PushOptions, *, endpoint: str | None, dry_run: bool, note: Note
) -> PushPlan:
    """Looks at the Hub and says what would happen there; changes nothing.

    Args:
        prepared: From `prepare`.
        options: The user's.
        endpoint: The Hub's address, None for the one of huggingface_hub (HF_ENDPOINT).
        dry_run: What forbids a push, or cannot be found out (no token, no network), is
            reported instead of refused; `push` does not take such a plan.
        note: For people.

    Raises:
        MoeconvError: The card's metadata are wrong, or, outside of a dry run, the output is not
            proven to be the model, the Hub cannot be asked, or it must not go there.
    """
    if not dry_run and not options.unverified:
        demand(prepared.output, prepared.judgement)
    address = read_address(endpoint)
    with hub_client(address):
        return _plan(prepared, options, address, dry_run=dry_run, note=note)


def _plan(
    prepared: PreparedPush, options: PushOptions, address: Address, *, dry_run: bool, note: Note
) -> PushPlan:
    token = get_token() if dry_run else demand_token()
    warning = other_host_warning(address)
    if warning is not None and token is not None:
        note(f"warning: {warning}")
    api = _api(address, token)
    repo_id, unknown = prepared.repo_id, []
    account, remote, on_hub = None, None, None
    old_manifests: dict[str, bytes] = {}
    override = ("license",) if options.license else ()
    try:
        with hub_errors("asking the Hub", repo_id):
            if token is not None:
                account = with_retries(lambda: read_account(api, repo_id), "the account", note)
            author = account.name if account and options.create_pr else None
            remote = read_remote(api, repo_id, options.revision, pull_request_of=author, note=note)
            on_hub = _fetch(api, prepared, remote, CARD_NAME, note)
            for name in MANIFEST_NAMES:
                if (old := _fetch(api, prepared, remote, name, note)) is not None:
                    old_manifests[name] = old.encode()
    except HubError as error:
        if not dry_run:
            raise
        unknown.append(f"what is on the Hub: {error}")
    card, origin = prepared.card(on_hub, override)
    demand_sendable([File.of(CARD_NAME, card.encode())])
    checked = False
    try:
        with hub_errors("validating the card", repo_id):
            if unknown:  # do not wait twice for a Hub that does not answer
                _validate(api, card, origin)
            else:
                with_retries(lambda: _validate(api, card, origin), "validating the card", note)
            checked = True
    except HubError as error:
        if not dry_run:
            raise
        unknown.append(f"whether the card is valid: {error}")
    files = [*prepared.files, File.of(CARD_NAME, card.encode())]
    there = remote.files if remote else {}
    changes = plan_changes(files, there, old_manifests=old_manifests)
    if not dry_run:
        _demand_place(account, remote, repo_id, options)
    return PushPlan(
        prepared,
        options,
        address,
        account,
        remote,
        tuple(changes),
        card,
        origin,
        checked,
        (*prepared.warnings, *_no_license(card, origin), *unknown),
        dry_run,
    )


def _no_license(card: str, origin: str) -> list[str]:
    """A warning, if neither the run nor a flag nor an earlier README names the license."""
    if read_metadata(card, f"the card ({origin})").get("license"):
        return []
    return [
        "neither the run nor a flag says which license the model has, so the card names "
        "none; pass --license ID "
        "(https://huggingface.co/docs/hub/repositories-licenses)"
    ]


def _demand_place(
    account: Account | None, remote: Remote | None, repo_id: str, options: PushOptions
) -> None:
    """Lets a push go where it may.

    Raises:
        HubError: The token may not write there.
        UsageError: It would be public against the user's word.
    """
    if account is not None and account.may_write is False and not options.create_pr:
        raise HubError(
            f"the account {account.name} may not write to {repo_id}: {account.why}; "
            "set HF_TOKEN to a token with write access, or give another --repo-id"
        )
    if options.private and remote is not None and remote.exists and remote.private is False:
        raise UsageError(
            f"{repo_id} is there and public, and --private only decides about a new "
            "repository; make it private in its settings, or leave out --private"
        )


def push(plan: PushPlan, *, note: Note) -> Pushed:
    """Carries a plan out, and compares the Hub's listing with it afterwards.

    Raises:
        MoeconvError: No commit was made, unless the message says so; files that arrived stay with
            the Hub, so that another run does not send them again.
    """
    with hub_client(plan.address), ExitStack() as opened:
        return _push(plan, opened, note)


def _push(plan: PushPlan, opened: ExitStack, note: Note) -> Pushed:
    repo_id, options = plan.prepared.repo_id, plan.options
    # `plan_push` has refused already what must not go; a dry run's plan may be of such.
    assert not plan.dry_run
    assert plan.account is not None
    assert plan.remote is not None
    api = _api(plan.address, demand_token())
    remote, changes = plan.remote, list(plan.changes)
    if not remote.exists:
        with hub_errors("making the repository", repo_id):
            make_repository(api, repo_id, private=options.private, note=note)
        note(f"made {plan.address.url}/{repo_id}{' (private)' if options.private else ''}")
        with hub_errors("asking the Hub", repo_id):
            remote = read_remote(api, repo_id, options.revision, pull_request_of=None, note=note)
        # It begins with files of its own (.gitattributes).
        files = [c.file for c in changes if c.file is not None]
        changes = plan_changes(files, remote.files, old_manifests={})
    if not remote.branch:
        with hub_errors("making the branch", repo_id):
            make_branch(api, repo_id, options.revision, note)
    if remote.head is None:
        raise HubError(f"{repo_id} has no commit to build on; make it anew on the Hub")
    number = remote.pull_request
    target = Target(
        repo_id=repo_id,
        revision=options.revision if number is None else f"refs/pr/{number}",
        head=remote.head,
        author=plan.account.name,
        create_pr=options.create_pr and number is None,
    )
    adds, deletes = operations_of(changes, opened)
    if not adds and not deletes:
        note("the Hub has every file already; nothing to commit")
        url = f"{plan.address.url}/{repo_id}/commit/{target.head}"
        head = Commit(target.head, url, target.revision, _pr(plan, number))
        return Pushed(plan, head, tuple(changes), 0)
    size = sum(add.upload_info.size for add in adds)
    note(f"sending {len(adds)} files, {format_size(size)}, to {plan.address.url}/{repo_id}")
    with hub_errors("uploading", repo_id), upload_errors(repo_id):
        api.preupload_lfs_files(
            repo_id,
            adds,
            revision=target.revision,
            create_pr=target.create_pr,
            free_memory=False,
        )
    demand_unchanged(adds)
    message = options.message or f"Upload {repo_id.split('/')[-1]} with moeconv {__version__}"
    with hub_errors("committing", repo_id), upload_errors(repo_id):
        commit = send(api, target, adds, deletes, changes, message=message, note=note)
    with hub_errors(f"reading the listing after the commit {commit.url}", repo_id):
        check_listing(api, repo_id, commit, changes, note)
    if number is not None:
        commit = Commit(commit.oid, commit.url, commit.revision, _pr(plan, number))
    return Pushed(plan, commit, tuple(changes), size)


def _api(address: Address, token: str | None) -> HfApi:
    # False: without a token, and without looking for one.
    return HfApi(
        endpoint=address.url,
        token=token or False,
        library_name="moeconv",
        library_version=__version__,
    )


def _pr(plan: PushPlan, number: int | None) -> str | None:
    if number is None:
        return None
    return f"{plan.address.url}/{plan.prepared.repo_id}/discussions/{number}"


def _fetch(api: HfApi, prepared: PreparedPush, remote: Remote, name: str, note: Note) -> str | None:
    """A small text file of the repository; None when it is not there."""
    if name not in remote.files:
        return None
    url = f"{api.endpoint}/{prepared.repo_id}/resolve/{remote.head}/{name}"
    headers = build_hf_headers(token=api.token)

    def get() -> str:
        response = get_session().get(url, headers=headers)
        hf_raise_for_status(response)
        content: bytes = response.content
        return content.decode("utf-8-sig", "replace")

    return with_retries(get, name, note)


def _validate(api: HfApi, card: str, origin: str) -> None:
    """huggingface_hub's own validation (`ModelCard.validate`), at this endpoint.

    Raises:
        OutputError: The metadata are wrong.
    """
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml", json={"repoType": "model", "content": card}
    )
    try:
        hf_raise_for_status(response)
    except HfHubHTTPError as error:
        if status_of(error) != 400:
            raise
        errors: Sequence[dict[str, str]] = response.json().get("errors") or []
        reasons = "; ".join(str(one.get("message", "")) for one in errors) or response.text[:200]
        raise OutputError(
            f"the Hub does not take the card's metadata ({origin}): {reasons}; mend them, or what "
            "--license and the run's facts say"
        ) from None
