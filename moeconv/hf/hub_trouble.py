"""Why a repository on the Hub cannot be read, in one sentence."""

import os
from typing import Literal

from moeconv.untrusted.text import printable

_NOUN = {"model": "repository", "dataset": "dataset"}


def hub_trouble(
    error: Exception, repo_id: str, kind: Literal["model", "dataset"], local: str | None
) -> str:
    """What went wrong and what to do; a token is never part of it.

    Args:
        error: Whatever huggingface_hub raised, or its transport.
        repo_id: The repository.
        kind: Of which kind it is.
        local: What could have been meant on this machine, and is not there; None for nothing.
    """
    from huggingface_hub import constants, errors

    from moeconv.hf.hub_client import HttpError

    noun = _NOUN[kind]
    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo_id}"
    absent = f"no such {local}, and " if local else ""
    instead = f", or give a {local}" if local else ""
    chain = [error, error.__cause__, error.__context__]
    answered = next((e for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return f"{absent}with HF_HUB_OFFLINE set the Hub is not asked; unset it{instead}"
    if isinstance(error, errors.HFValidationError):
        return f"{absent}no {noun}'s id on the Hub (name or namespace/name)"
    if isinstance(answered, errors.GatedRepoError):
        return (
            f"this {noun} on the Hub is gated; accept its terms on {page}, then set HF_TOKEN or "
            "run `hf auth login`"
        )
    if isinstance(answered, errors.RevisionNotFoundError):
        return f"has no such revision; see {page}"
    if isinstance(answered, errors.RepositoryNotFoundError):
        return (
            f"{absent}no {noun} on the Hub that you may read; check the id, and if it is private "
            "set HF_TOKEN or run `hf auth login`"
        )
    if answered is not None:
        status = answered.response.status_code
        if status not in (401, 403):
            return f"the Hub answers with {status}; try again later{instead}"
        what = "your token" if os.environ.get("HF_TOKEN") else "to answer without a token"
        return (
            f"the Hub refuses {what} ({status}); set HF_TOKEN to one that may read this {noun}, or "
            "run `hf auth login`"
        )
    if isinstance(error, (errors.LocalEntryNotFoundError, HttpError, ConnectionError)):
        return f"{absent}the Hub cannot be reached; check the network{instead}"
    reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
    return f"fetching it from the Hub failed ({reason}); try again{instead}"
