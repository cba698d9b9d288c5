"""Weights & Biases as MaxText uses it: the same run on resume, and never a reason to fail.

MaxText calls `wandb.init(project, name, resume="allow")` and `wandb.log`; entity, run id, mode and
directory reach it through the environment.
"""

import contextlib
import importlib
import netrc
import os
import re
import secrets
import string
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moeconv_train.data.records import write_bytes
from moeconv_train.settings import WandbSettings
from moeconv_train.words import first_line

ID_NAME = "wandb-run-id.txt"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ALPHABET = string.ascii_lowercase + string.digits
_FINISH_SECONDS = 60.0


def missing() -> str | None:
    """Why W&B cannot be used at all; None if it can."""
    try:
        importlib.import_module("wandb")
    except ImportError:
        return 'wandb is not installed, so nothing is logged there: pip install "moeconv[train]"'
    except Exception as error:  # a broken installation is no reason either
        return f"wandb cannot be imported ({type(error).__name__}), so nothing is logged there"
    return None


def run_id(run_dir: Path) -> str:
    """The id of a run, the same for as long as its directory lives.

    WANDB_RUN_ID counts for a new run; the directory's own id for one that goes on.
    """
    path = run_dir / ID_NAME
    if path.is_file():
        found = path.read_text(encoding="utf-8").strip()
        if _ID.fullmatch(found):
            return found
    given = os.environ.get("WANDB_RUN_ID", "")
    made = given if _ID.fullmatch(given) else "".join(secrets.choice(_ALPHABET) for _ in range(8))
    write_bytes(path, f"{made}\n".encode())
    return made


def environment(run_dir: Path, settings: WandbSettings) -> dict[str, str]:
    """The variables that wandb reads; those that the user set keep their values."""
    found = {"WANDB_RUN_ID": run_id(run_dir), "WANDB_DIR": str(run_dir)}
    defaults = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    if settings.entity:
        defaults["WANDB_ENTITY"] = settings.entity
    if not has_key():
        defaults["WANDB_MODE"] = "offline"
    return found | {key: value for key, value in defaults.items() if not os.environ.get(key)}


def has_key() -> bool:
    """Whether wandb would find a key: in the environment, or left by `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return bool(host and netrc.netrc(os.environ.get("NETRC")).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


@contextlib.contextmanager
def guarded(config: Callable[[], Mapping[str, Any]], note: Callable[[str], None]) -> Iterator[None]:
    """While this is open, nothing that wandb does ends the run.

    An `init` that fails is tried again offline, and given up if that fails too; the first `log`
    that fails is told.

    Args:
        config: The run's config, for W&B's page of it.
        note: Takes sentences for people.
    """
    wandb: Any = importlib.import_module("wandb")
    init, log = wandb.init, wandb.log
    state = {"alive": False}

    def guarded_init(*args: Any, **kwargs: Any) -> Any:
        for mode in (None, "offline"):
            try:
                run = init(*args, **kwargs, **({"mode": mode} if mode else {}))
                run.config.update(dict(config()), allow_val_change=True)
            except Exception as error:
                note(f"W&B: {first_line(error)}; {'not used' if mode else 'logging offline'}")
                continue
            state["alive"] = True
            return run
        return None

    def guarded_log(*args: Any, **kwargs: Any) -> None:
        if not state["alive"]:
            return
        try:
            log(*args, **kwargs)
        except Exception as error:
            state["alive"] = False
            note(f"W&B: {first_line(error)}; logging there ends, the run goes on")

    wandb.init, wandb.log = guarded_init, guarded_log
    try:
        yield
    finally:
        wandb.init, wandb.log = init, log
        if state["alive"]:
            _finish(wandb, note)


def _finish(wandb: Any, note: Callable[[str], None]) -> None:
    """Lets wandb upload what is left, for a while."""
    trouble: list[str] = []

    def finish() -> None:
        try:
            wandb.finish()
        except Exception as error:
            trouble.append(first_line(error))

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    thread.join(_FINISH_SECONDS)
    if thread.is_alive():
        trouble.append(f"is still uploading after {_FINISH_SECONDS:.0f} s")
    for text in trouble:
        note(f"W&B: {text}; `wandb sync` uploads what is in the run's wandb folder")
