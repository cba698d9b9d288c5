"""Weights & Biases: one run for as long as the directory lives, and never a reason to fail.

MaxText's own `wandb.init` (common/metric_logger.py) cannot name a run's id, entity or directory. We
begin the run first; MaxText's call then returns the live one, as wandb does by default.
"""

import contextlib
import importlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moeconv_train import seams
from moeconv_train.data.records import write_bytes
from moeconv_train.sidecar import public_config
from moeconv_train.words import first_line

from moeconv.untrusted import files

ID_NAME = "wandb-run-id.txt"
_SECONDS = 60.0  # for init, and for the upload of what is left at the end


def missing() -> str | None:
    """Why W&B cannot be used at all; None if it can."""
    try:
        importlib.import_module("wandb")
    except ImportError:
        return 'wandb is not installed, so nothing is logged there: pip install ".[train]"'
    except Exception as error:  # a broken installation is no reason either
        return f"wandb cannot be imported ({type(error).__name__}), so nothing is logged there"
    return None


def run_id(run_dir: Path) -> str:
    """The id of a run, the same for as long as its directory lives; WANDB_RUN_ID if it is new."""
    with contextlib.suppress(FileNotFoundError):
        if found := files.read_inside(run_dir, ID_NAME).decode(errors="replace").strip():
            return found
    made = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_bytes(run_dir / ID_NAME, f"{made}\n".encode())
    return made


@contextlib.contextmanager
def logged(
    run_dir: Path, config: Any, entity: str | None, note: Callable[[str], None]
) -> Iterator[None]:
    """A run of W&B while this is open; nothing that wandb does ends ours.

    Args:
        run_dir: Keeps the run's id and what W&B writes.
        config: MaxText's.
        entity: Whose run it is, unless WANDB_ENTITY says so.
        note: Takes sentences for people.
    """
    wandb: Any = importlib.import_module("wandb")
    run, log = _begin(wandb, run_dir, config, entity, note), wandb.log
    failed = False

    def guarded(*args: Any, **kwargs: Any) -> None:
        nonlocal failed
        try:
            if not failed:
                log(*args, **kwargs)
        except Exception as error:
            failed = True
            note(f"W&B: {first_line(error)}; logging there ends, the run goes on")

    try:
        with seams.replaced(wandb, log=guarded):
            yield
    finally:
        try:
            run.finish()
        except Exception as error:
            note(f"W&B: {first_line(error)}; `wandb sync {run_dir}/wandb` uploads what is left")


def _begin(
    wandb: Any, run_dir: Path, config: Any, entity: str | None, note: Callable[[str], None]
) -> Any:
    """The run: online, else offline, else one that keeps nothing."""
    wanted = os.environ.get("WANDB_MODE") or "online"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for mode, otherwise in ((wanted, "logging offline"), ("offline", "not used")):
            # For MaxText's call too, which looks for a key. An init that finds none ignores its
            # `dir`, and would leave a folder where we are.
            wandb.setup(wandb.Settings(mode=mode, root_dir=scratch))
            try:
                return wandb.init(
                    entity=os.environ.get("WANDB_ENTITY") or entity,
                    project=config.wandb_project_name,
                    name=config.wandb_run_name,
                    id=run_id(run_dir),
                    resume="allow",
                    dir=str(run_dir),
                    config=public_config(config.get_keys()),
                    settings=wandb.Settings(
                        silent=True,
                        console="off",
                        init_timeout=_SECONDS,
                        finish_timeout=_SECONDS,
                        finish_timeout_raises=True,
                    ),
                )
            except Exception as error:
                note(f"W&B: {first_line(error).rstrip('.')}; {otherwise}")
    wandb.setup(wandb.Settings(mode="disabled"))
    return wandb.init()
