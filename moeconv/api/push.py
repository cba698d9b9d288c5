"""`moeconv.push`: a verified model to the Hugging Face Hub, in one commit."""

from pathlib import Path
from typing import TYPE_CHECKING

from moeconv.api.arguments import Note, StrPath, log

if TYPE_CHECKING:
    from moeconv.hub.plan import Pushed


def push(
    out: StrPath,
    repo_id: str | None = None,
    *,
    private: bool = False,
    revision: str = "main",
    create_pr: bool = False,
    dry_run: bool = False,
    unverified: bool = False,
    message: str | None = None,
    license: str | None = None,
    endpoint: str | None = None,
    note: Note = log,
) -> "Pushed":
    """Publishes a verified model on the Hugging Face Hub: everything in one commit, or nothing.

    The token comes from `HF_TOKEN` or `hf auth login`. After a broken run the same call goes on.

    Args:
        out: An output of `convert` that `verify` has found to be the model.
        repo_id: `NAMESPACE/NAME`, by default the repository that the run's config names.
        private: If the repository has to be made, make it private.
        revision: The branch, made if needed.
        create_pr: Open a pull request; while it is open, later calls go on with it.
        dry_run: Change nothing; what would forbid the push is said instead of raised.
        unverified: Push what is not proven to be the model; its card says so.
        message: Of the commit.
        license: Of the model, as the Hub names it; by default what the run says.
        endpoint: Address of the Hub, by default `HF_ENDPOINT`, else https://huggingface.co.
        note: Called with one sentence at a time; see `convert`.

    Returns:
        The commit, and what happened to each file; of a dry run, what would. `print` shows it as
        `moeconv push` does.

    Raises:
        UnverifiedError: `out` is not proven to be the model that was trained.
        OutputError: `out` is damaged, holds a secret, or has a README that cannot be read.
        HubError: The Hub refused or could not be reached; nothing was committed, unless the message
            says so.
        UsageError: An argument has a value that it cannot have.
    """
    from moeconv.hf.hub_address import read_address
    from moeconv.hub import push as hub
    from moeconv.hub.account import demand_token
    from moeconv.hub.failures import hub_words
    from moeconv.hub.plan import Pushed
    from moeconv.hub.prepare import PushOptions, prepare

    options = PushOptions(
        repo_id=repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        unverified=unverified,
        message=message,
        license=license,
    )
    read_address(endpoint)  # one that is none, before anything else
    if not dry_run:
        demand_token()  # before minutes of reading
    prepared = prepare(Path(out), options, dry_run=dry_run, note=note)
    with hub_words(note):
        plan = hub.plan_push(prepared, options, endpoint=endpoint, dry_run=dry_run, note=note)
        for text in plan.warnings:
            note(f"warning: {text}")
        if dry_run:
            return Pushed(plan, None, plan.changes, 0)
        return hub.push(plan, note=note)
