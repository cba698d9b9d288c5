"""The directory of a run: who may write to it, whether it goes on, whether it is the same run."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from moeconv_train.sidecar import versions
from moeconv_train.words import first_line

import moeconv
from moeconv.errors import (
    ConfigError,
    MissingPackageError,
    NotACheckpointError,
    OutputError,
    UnsupportedError,
)
from moeconv.execution.lock import Lock
from moeconv.maxtext.sidecar import SIDECAR_NAME, SIDECAR_NAMES, RunFacts, RunSidecar
from moeconv.orbax.locate import locate
from moeconv.untrusted import files, strict_json

Resume = Literal["auto", "never"]

LOCK = ".train.lock"

# What may change when a run goes on: what is logged, kept and evaluated, and where.
_FREE = (
    "steps",  # its schedule may not: learning_rate_schedule_steps
    "*wandb*",
    "*tensorboard*",
    "*goodput*",
    "*mldiagnostics*",
    "*profiler*",
    "eval_interval",
    "eval_start_step",
    "eval_steps",
    "*checkpoint*",
    "gcs_metrics",
    "save_config_to_gcs",
    "log_*",
    "dump_*",
    "metrics_*",
    "hide_profiler_step_metric",
    "jax_cache_dir",
    "*heartbeat*",
    "abort_on_*",
    "compile_xla_flags",  # train.py hands them to a compilation whose result it drops
)
# What changes how the same model is computed, and so its last bits.
_ROUNDING = ("remat_policy", "num_vocab_tiling")


def may_change(key: str) -> bool:
    """Whether a run goes on with another value of a MaxText setting."""
    return key in _ROUNDING or any(fnmatchcase(key, pattern) for pattern in _FREE)


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes the directory and holds it for this process.

    A new one goes again if the run was refused before its first save.

    Raises:
        OutputError: Another process holds it, or it cannot be made.
    """
    made = not run_dir.exists()
    lock = Lock(run_dir / LOCK)
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            folder = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            lock.take(folder)
        except BlockingIOError:
            raise OutputError(f"{run_dir}: another process is training there") from None
        except OSError as error:
            raise OutputError(f"{run_dir}: cannot be written ({error.strerror})") from None
        stack.callback(lock.release)
        try:
            yield
        except (ConfigError, UnsupportedError, MissingPackageError):
            if made and saved_step(run_dir) is None:
                shutil.rmtree(run_dir, ignore_errors=True)
            raise


def saved_step(run_dir: Path) -> int | None:
    """The newest step (from 0) that was saved whole; None if there is none."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return None
    try:
        return locate(str(folder)).number
    except NotACheckpointError:
        return None  # nothing, or a first save that was cut off: MaxText begins anew and clears it


def check_new(run_dir: Path, resume: Resume) -> int | None:
    """The step to go on from, None for a new run.

    Raises:
        OutputError: There is a run, and it is not to be resumed.
    """
    step = saved_step(run_dir)
    if step is not None and resume == "never":
        raise OutputError(
            f"{run_dir}: holds a run with {step + 1} steps, and --resume never begins a new one; "
            "give it another run_name, or move the directory away"
        )
    return step


def read_sidecar(run_dir: Path) -> RunSidecar | None:
    """What the run wrote when it began.

    Raises:
        ConfigError: It is damaged.
    """
    for name in SIDECAR_NAMES:
        path = run_dir / name
        try:
            return RunSidecar.model_validate(strict_json.loads(files.read_inside(run_dir, name)))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; begin a new run_name") from None
        except ValueError as error:  # pydantic's too
            raise ConfigError(f"{path}: {first_line(error)}; begin a new run_name") from None
    return None


def check_same(
    run_dir: Path, before: RunSidecar | None, config: Mapping[str, Any], now: RunFacts
) -> list[str]:
    """Refuses to go on with another model, optimizer, schedule or other data.

    Args:
        run_dir: For the message.
        before: The sidecar of the run so far.
        config: MaxText's resolved config now, as the sidecar holds it.
        now: What the sidecar would say of the data and of how a step is computed.

    Returns:
        What changes nothing but the last bits, one sentence each.

    Raises:
        ConfigError: Names every setting that differs.
    """
    if before is None:
        raise ConfigError(
            f"{run_dir}: has checkpoints but no {SIDECAR_NAME}, so nothing says that this is the "
            "same run; begin a new run_name, or train it on with MaxText itself"
        )
    told: list[str] = []
    rounding: list[str] = []
    for key in sorted(before.config.keys() & config.keys()):
        if before.config[key] != config[key] and (key in _ROUNDING or not may_change(key)):
            text = f"{key} was {before.config[key]} and is {config[key]}"
            (rounding if key in _ROUNDING else told).append(text)
    then = before.run or RunFacts()
    patches, others = (getattr(facts, "patches", None) for facts in (then, now))
    if None not in (patches, others) and patches != others:
        rounding.append(f"loss scale and patches were {patches} and are {others}")
    notes = [f"{text}: the same model, but not to the bit" for text in rounding]
    if releases := _other_versions(before):
        notes.append(f"{releases}: the same run, but the last bits may differ")
    digest = now.dataset_digest
    if then.dataset_digest not in (None, digest):
        told.append(
            f"the data's digest was {then.dataset_digest:.12} and is {(digest or 'none'):.12}"
        )
    source, scaled = (getattr(then, name, None) for name in ("source_digest", "loss_scaled"))
    if source not in (None, getattr(now, "source_digest", None)):
        told.append("the data or the tokenizer had other names when it began")
    if scaled not in (None, getattr(now, "loss_scaled", None)):
        # The scale is part of the optimizer's state; Orbax says in pages that it is not the same.
        mode = "dynamic" if scaled else "off"
        told.append(f"run.loss_scale.mode was {mode}, as the checkpoints are")
    if told:
        more = f" and {len(told) - 8} more" if len(told) > 8 else ""
        raise ConfigError(
            f"{run_dir}: is another run: {'; '.join(told[:8])}{more}; "
            "give these as they were, or begin a new run_name"
        )
    return notes


def _other_versions(before: RunSidecar) -> str:
    """The releases that compute a step, where they are not those that the run began with."""
    extra = before.model_extra or {}
    then = {**(extra.get("versions") or {}), "moeconv": before.moeconv_version}
    now = {**versions(), "moeconv": moeconv.__version__}
    return ", ".join(
        f"{name} was {then[name]} and is {now[name]}"
        for name in ("moeconv", "maxtext", "jax", "jaxlib")
        if then.get(name) and now.get(name) and then[name] != now[name]
    )
