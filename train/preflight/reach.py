"""Whether what the run needs from the network is there: dataset, tokenizer, Hub and W&B accounts.

Only questions are asked, nothing is downloaded; every refusal is one sentence with the fix. Tokens
come from the environment and are never shown.
"""

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from moeconv_train.data.source import names_a_file
from moeconv_train.preflight.case import Case
from moeconv_train.preflight.report import Finding

_TIMEOUT = 15


def check_reach(case: Case, *, online: bool) -> Iterator[Finding]:
    """Dataset, tokenizer, Hub repository and W&B, in this order."""
    settings = case.settings
    dataset = settings.dataset or _streamed(case)
    tokenizer = settings.tokenizer or case["tokenizer_path"]
    if dataset:
        yield _source("dataset", str(dataset), "dataset", online)
    if tokenizer:
        yield _source("tokenizer", str(tokenizer), "model", online)
    if settings.hub_repo:
        yield _target_repository(settings.hub_repo, online)
    if settings.wandb:
        yield _wandb(online)


def _streamed(case: Case) -> Any:
    """What MaxText streams: local files, where `hf_path` is their format, or a dataset."""
    if case["dataset_type"] != "hf" or "://" in str(case["hf_train_files"]):
        return None
    files = str(case["hf_train_files"] or "")
    return next(iter(glob(files)), files) or case["hf_path"]  # noqa: PTH207 (may be absolute)


def _source(check: str, name: str, kind: str, online: bool) -> Finding:
    """A local path, or a repository of the Hub that must be readable."""
    if Path(name).expanduser().exists():
        return Finding(check=check, status="ok", message=f"{name} is a local path.")
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or "" in parts:
        message = f"There is no {check} {name}; give an existing path, or a Hub id owner/name."
        return Finding(check=check, status="refused", message=message)
    if kind == "dataset" and names_a_file(name):
        message = f"{name}: there is no such file; give an existing path, or a Hub id owner/name."
        return Finding(check=check, status="refused", message=message)
    if not online:
        message = f"{name} was not asked for: no network checks."
        return Finding(check=check, status="skipped", message=message)
    trouble = _ask_hub(name, kind)
    if trouble:
        return Finding(check=check, status="refused", message=trouble)
    return Finding(check=check, status="ok", message=f"{name} on the Hub can be read.")


def _ask_hub(name: str, kind: str, *, write: bool = False) -> str | None:
    """What stands between us and a repository, as one sentence; None for nothing."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    token = os.environ.get("HF_TOKEN") or None
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        HfApi(endpoint=endpoint, token=token or False).auth_check(name, repo_type=kind, write=write)
    except GatedRepoError:
        if token is None:
            return (
                f"{name} is gated and HF_TOKEN is not set; accept its terms at {page} and set it."
            )
        return (
            f"{name} is gated and HF_TOKEN's account has no access; accept its terms at {page} "
            "and wait for the approval."
        )
    except OfflineModeIsEnabled:
        return f"{name} cannot be reached because HF_HUB_OFFLINE is set; unset it."
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401 and token is None:
            return f"{name} does not exist or is private; check the name, or set HF_TOKEN."
        return f"{name} does not exist, or HF_TOKEN's account cannot see it; check the name."
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            return f"The Hub does not know HF_TOKEN; make a new one at {endpoint}/settings/tokens."
        if status == 403:
            what = "write to" if write else "read"
            return f"HF_TOKEN may not {what} {name}; give it the permission, or use another token."
        return f"The Hub answered {status} for {name}; try again later."
    except Exception as error:  # the HTTP client's own, whichever it is
        if not _is_connection(error):
            raise
        return (
            f"{endpoint} cannot be reached for {name} ({type(error).__name__}); turn the network "
            "on (on Kaggle: Settings, Internet), or give a local path."
        )
    return None


def _is_connection(error: Exception) -> bool:
    """Whether an exception is the transport's (httpx in huggingface_hub 1, httpx2 in 2)."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0].startswith("httpx")


def _target_repository(name: str, online: bool) -> Finding:
    """Where the model goes in the end; a run without it is still a run."""
    if not os.environ.get("HF_TOKEN"):
        message = f"HF_TOKEN is not set, so the model will not be pushed to {name}; set it to push."
        return Finding(check="hub", status="warn", message=message)
    if not online:
        message = f"{name} was not asked for: no network checks."
        return Finding(check="hub", status="skipped", message=message)
    trouble = _ask_hub(name, "model", write=True)
    if trouble is None:
        return Finding(check="hub", status="ok", message=f"HF_TOKEN may write to {name}.")
    if "does not exist" in trouble:
        message = f"{name} does not exist yet; moeconv push makes it."
        return Finding(check="hub", status="note", message=message)
    return Finding(check="hub", status="warn", message=trouble)


def _wandb(online: bool) -> Finding:
    """Weights & Biases is a convenience: it never keeps a run from starting."""
    key = os.environ.get("WANDB_API_KEY")
    if not key:
        message = "WANDB_API_KEY is not set: W&B logs offline into the run's directory."
        return Finding(check="wandb", status="note", message=message)
    if not online:
        return Finding(check="wandb", status="skipped", message="W&B was not asked for.")
    host = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        answer = _graphql(f"{host.rstrip('/')}/graphql", key)
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            message = "W&B does not know WANDB_API_KEY: it will log offline; get a new key."
        else:
            message = f"{host} cannot be reached ({type(error).__name__}): W&B will log offline."
        return Finding(check="wandb", status="warn", message=message)
    if not (answer.get("data") or {}).get("viewer"):
        message = "W&B does not know WANDB_API_KEY: it will log offline; get a new key."
        return Finding(check="wandb", status="warn", message=message)
    return Finding(check="wandb", status="ok", message="WANDB_API_KEY is known to W&B.")


def _graphql(url: str, key: str) -> dict[str, Any]:
    basic = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        url,
        data=json.dumps({"query": "query { viewer { username } }"}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Basic {basic}"},
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
