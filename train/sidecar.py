"""The sidecar `moeconv.json` of a run: what its checkpoints do not say about the model.

`moeconv.arch.sidecar.RunSidecar` reads it.
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

import moeconv
from moeconv.arch.sidecar import RunFacts

SIDECAR = "moeconv.json"
TOKENIZER = "tokenizer"
SAMPLE = "sample.txt"
_PACKAGES = ("maxtext", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")

_PRIVATE_KEY = re.compile(
    r"(token|secret|password|credentials?|api_key|dir|directory|folder|path|files?|bucket|project)$"
)
_PRIVATE_VALUE = re.compile(r"^[/~]|://")


def plain(value: Any) -> Any:
    """A config value as JSON can hold it."""
    match value:
        case enum.Enum():
            return plain(value.value)
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return public_config(value)
        case list() | tuple():
            return [plain(item) for item in value]
        case _:
            return str(value)  # a dtype


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved config without secrets and without this machine's paths."""
    return {
        key: plain(value)
        for key, value in sorted(config.items())
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

    Args:
        config: MaxText's resolved config.
        sample: Documents of the corpus; `moeconv verify` runs both models on them.
        run: What the model card tells of the run.
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
    path = directory / SIDECAR
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")
    return partial.replace(path)
