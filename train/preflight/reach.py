"""Whether what the run needs from the network is there: dataset, tokenizer, Hub and W&B accounts.

Only questions are asked, nothing is downloaded; every refusal is one sentence with the fix.
"""

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeconv_train.data.source import names_a_file
from moeconv_train.preflight.report import Finding
from moeconv_train.settings import EMBEDDED

from moeconv.errors import HubError, MoeconvError

if TYPE_CHECKING:
    from moeconv_train.plan import Plan

_TIMEOUT = 15
_ACCOUNT = "query { viewer { username teams { edges { node { name } } } } }"


def check_reach(plan: "Plan", *, online: bool) -> Iterator[Finding]:
    """Dataset, tokenizer, Hub repository and W&B, in this order."""
    feed, config = plan.feed, plan.config
    data, dataset, tokenizer = feed.settings, None, str(config["tokenizer_path"] or "")
    if feed.dataset is None and feed.kind != "maxtext":
        dataset = feed.named or data.source
        tokenizer = tokenizer if data.tokenizer in ("llama3", EMBEDDED) else data.tokenizer
    if config["hf_train_files"] and feed.kind == "hf" and "://" not in config["hf_train_files"]:
        files = str(config["hf_train_files"])
        dataset = next(iter(glob(files)), files)  # noqa: PTH207 (may be absolute)
    if dataset and dataset != EMBEDDED:
        yield _source("dataset", dataset, online)
    if tokenizer:
        yield _source("tokenizer", tokenizer, online)
    if plan.run.hub_repo:
        yield _target_repository(plan.run.hub_repo, online)
    if config["enable_wandb"]:
        yield _wandb(plan.run.wandb.entity, online)


def _source(check: str, name: str, online: bool) -> Finding:
    """A local path, or a repository of the Hub that must be readable."""
    if Path(name).expanduser().exists():
        return Finding(check=check, status="ok", message=f"{name} is a local path.")
    parts, file = name.split("/"), check == "dataset" and names_a_file(name)
    if file or name.startswith((".", "/", "~")) or len(parts) > 2 or "" in parts:
        message = f"{name}: there is no such file; give an existing path, or a Hub id owner/name."
        return Finding(check=check, status="refused", message=message)
    if not online:
        message = f"{name} was not asked for: no network checks."
        return Finding(check=check, status="skipped", message=message)
    from moeconv.hf.hub_trouble import hub_trouble

    kind: Literal["dataset", "model"] = "dataset" if check == "dataset" else "model"
    error = _asked(name, kind)
    if error is None:
        return Finding(check=check, status="ok", message=f"{name} on the Hub can be read.")
    why = str(error)
    if not isinstance(error, MoeconvError):
        why = hub_trouble(error, name, kind, "file or folder")
        why = why.replace("check the network", "check the network (on Kaggle: Settings, Internet)")
    code = HubError.exit_code
    return Finding(check=check, status="refused", message=f"{name}: {why}.", exit_code=code)


def _asked(name: str, kind: str, *, write: bool = False) -> Exception | None:
    """What comes of asking the Hub for a repository; None if it may be read, or written to."""
    from huggingface_hub import HfApi

    from moeconv.hf.hub_address import read_address
    from moeconv.hf.hub_client import hub_client

    try:
        address = read_address(None)
        with hub_client(address):
            HfApi(endpoint=address.url).auth_check(name, repo_type=kind, write=write)
    except Exception as error:  # its transport's own errors have no stable name to catch
        return error
    return None


def _target_repository(name: str, online: bool) -> Finding:
    """Where the model goes in the end; a run without it is still a run."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if get_token() is None:
        message = f"HF_TOKEN is not set, so the model will not be pushed to {name}; set it to push."
        return Finding(check="hub", status="warn", message=message)
    if not online:
        message = f"{name} was not asked for: no network checks."
        return Finding(check="hub", status="skipped", message=message)
    from moeconv.hub.failures import explain

    error = _asked(name, "model", write=True)
    if error is None:
        return Finding(check="hub", status="ok", message=f"HF_TOKEN may write to {name}.")
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        message = f"{name} does not exist yet; moeconv push makes it."
        return Finding(check="hub", status="note", message=message)
    message = f"{explain(error, 'asking whether the model can be pushed', name)}."
    return Finding(check="hub", status="warn", message=message)


def _wandb(entity: str | None, online: bool) -> Finding:
    """Weights & Biases is a convenience: it never keeps a run from starting."""
    key, entity = os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_ENTITY") or entity
    if not key:
        message = "WANDB_API_KEY is not set: W&B logs offline into the run's directory."
        return Finding(check="wandb", status="note", message=message)
    if not online:
        return Finding(check="wandb", status="skipped", message="W&B was not asked for.")
    host = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    unknown = "W&B does not know WANDB_API_KEY: it will log offline; get a new key."
    try:
        viewer = (_graphql(f"{host.rstrip('/')}/graphql", key).get("data") or {}).get("viewer")
        teams = {edge["node"]["name"] for edge in viewer["teams"]["edges"]} if viewer else set()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        message = f"{host} cannot be asked ({type(error).__name__}): W&B will log offline."
        if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
            message = unknown
        return Finding(check="wandb", status="warn", message=message)
    if not viewer:
        return Finding(check="wandb", status="warn", message=unknown)
    if entity and entity not in {viewer.get("username"), *teams}:
        message = (
            f"WANDB_API_KEY's account is neither {entity} nor in a team of that name: W&B will log "
            "offline; set run.wandb.entity to an account or a team of yours, or to none."
        )
        return Finding(check="wandb", status="warn", message=message)
    where = f" and may log to {entity}" if entity else ""
    message = f"WANDB_API_KEY is known to W&B{where}."
    return Finding(check="wandb", status="ok", message=message)


def _graphql(url: str, key: str) -> dict[str, Any]:
    basic = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        url,
        data=json.dumps({"query": _ACCOUNT}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Basic {basic}"},
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
