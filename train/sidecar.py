"""The sidecar `moeconv_run.json` of a run: what its checkpoints do not say about the model.

`moeconv.maxtext.sidecar.RunSidecar` reads it.
"""

import contextlib
import enum
import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moeconv_train.data.records import write_bytes

import moeconv
from moeconv.maxtext.sidecar import OLD_SIDECAR_NAME, SIDECAR_NAME, RunFacts

TOKENIZER = "tokenizer"
SAMPLE = "sample.txt"
_PACKAGES = ("maxtext", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")

_PRIVATE_KEY = re.compile(
    r"(token|secret|password|credentials?|api_key|dir|directory|folder|path|files?|bucket|project)$"
)
_PRIVATE_VALUE = re.compile(r"^[/~]|://")


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved config as JSON has it, without secrets and without this machine's paths."""
    text = json.dumps(dict(config), default=_plain, sort_keys=True)
    found: dict[str, Any] = json.loads(text, object_hook=_public)
    return found


def _plain(value: Any) -> Any:
    match value:
        case enum.Enum():
            return value.value
        case Mapping():
            return dict(value)
        case _:
            return str(value)  # a dtype


def _public(found: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in found.items()
        if not _PRIVATE_KEY.search(key)
        and not (isinstance(value, str) and _PRIVATE_VALUE.search(value))
    }


def versions() -> dict[str, str]:
    """What the run is computed with, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_sidecar(
    config: Mapping[str, Any],
    sample: Sequence[str] = (),
    *,
    run: RunFacts | None = None,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Puts the config, a copy of the tokenizer and some of the text into the run's directory.

    A run that moeconv 0.1.0 began gets its sidecar renamed.

    Args:
        config: MaxText's resolved config.
        sample: Documents of the corpus; `moeconv verify` runs both models on them.
        run: What the model card says about the run.
        data: How the prepared data were made, and what they hold.
    """
    directory = Path(config["base_output_directory"], config["run_name"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Path(config["tokenizer_path"] or "")
    has_tokenizer = (tokenizer / "tokenizer.json").is_file()
    if has_tokenizer:
        shutil.copytree(tokenizer, directory / TOKENIZER, dirs_exist_ok=True)
    if sample:
        (directory / SAMPLE).write_text("\n\n".join(sample) + "\n", encoding="utf-8")
    sidecar = {
        "format": "moeconv-run",
        "version": 1,
        "maxtext_version": version("maxtext"),
        "moeconv_version": moeconv.__version__,
        "config": public_config(config),
        "tokenizer": TOKENIZER if has_tokenizer else None,
        "text_sample": SAMPLE if sample else None,
        "run": run.model_dump(exclude_none=True) if run else None,
        "data": data,
        "versions": versions(),
    }
    path, old = directory / SIDECAR_NAME, directory / OLD_SIDECAR_NAME
    if old.exists() and not path.exists():
        old.rename(path)
    write_bytes(path, f"{json.dumps(sidecar, indent=1)}\n".encode())
    return path
