"""Data that MaxText reads by settings of its own: tokenised while it trains, or files of others."""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any

from moeconv_train.data import tokens
from moeconv_train.data.records import write_bytes
from moeconv_train.data.source import format_of
from moeconv_train.feed import embedded_tokenizer
from moeconv_train.settings import EMBEDDED, DataSettings

from moeconv.errors import UsageError

# What the packaged recipes have otherwise, as their rows are prepared (docs/data.md).
_TOKENISING: Mapping[str, Any] = {
    "tokenizer_type": "huggingface",
    "tokenize_train_data": True,
    "tokenize_eval_data": True,
    "packing": True,
    "add_bos": True,
    "add_eos": True,
    # 0 reads other data at the second evaluation (docs/data.md).
    "grain_worker_count": 1,
    "grain_worker_count_eval": 1,
}
# Settings that say which data are trained on.
_NAMES = ("dataset_type", "dataset_name", "hf_path", "hf_name", "hf_data_dir", "train_split")
_PLACES = ("dataset_path", "hf_train_files", "grain_train_files", "tokenizer_path")


def hf_settings(config: Mapping[str, Any], settings: DataSettings) -> dict[str, Any]:
    """MaxText's settings to tokenise while it trains (docs/data.md).

    Args:
        config: MaxText's. Its `hf_path` and `hf_train_files`, if there are any, name the data.
        settings: Whose `source` does otherwise.
    """
    found = dict(_TOKENISING)
    if config["hf_path"] or config["hf_train_files"]:
        if not (config["hf_eval_split"] or config["hf_eval_files"]):
            found["eval_interval"] = -1
        return found
    if not settings.source:
        return {}
    found |= {
        "train_split": "train",
        "train_data_columns": [settings.column],
        "eval_data_columns": [settings.column],
    }
    path = Path(settings.source).expanduser()
    if settings.source == EMBEDDED or path.is_dir():
        raise UsageError(
            "dataset_type=hf: streams from the Hub or from one local file; use dataset_type=grain "
            f"for {settings.source}"
        )
    if path.exists():
        files = str(path.absolute())
        return {
            **found,
            "hf_path": format_of(path.name),
            "hf_train_files": files,
            "eval_interval": -1,
        }
    return {**found, "hf_path": settings.source, "hf_eval_split": "validation"}


def tokenizer_for(settings: DataSettings, output: Path) -> str:
    """The tokenizer for streaming: what comes with moeconv or MaxText becomes a directory."""
    if settings.tokenizer not in (tokens.LLAMA3, EMBEDDED):
        return settings.tokenizer
    with contextlib.ExitStack() as stack:
        name = settings.tokenizer
        if name == EMBEDDED:
            name = str(stack.enter_context(embedded_tokenizer()))
        # "stories": with a pad token of its own, as MaxText masks by value here.
        loaded = tokens.load(name, "stories")
    directory = output / "data" / f"tokenizer-{settings.tokenizer}"
    for name, content in loaded.files.items():
        write_bytes(directory / name, content)
    return str(directory)


def source_digest(config: Mapping[str, Any]) -> str:
    """What MaxText's settings say of the data: names, and of local files their sizes.

    Only the digest is kept beside a run: paths of this machine are nobody else's business. Folders
    may move, so they do not count.
    """
    told: dict[str, Any] = {key: config[key] for key in _NAMES}
    for key in _PLACES:
        told[key] = [_place(place) for place in re.split("[,;]", str(config[key] or ""))]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _place(place: str) -> Any:
    """Local files as names and sizes; anything else as it is said."""
    found = [] if "://" in place else glob(str(Path(place).expanduser()))  # noqa: PTH207
    files = [
        file
        for path in map(Path, found if place else [])
        for file in ([path] if path.is_file() else path.rglob("*"))
    ]
    return sorted([file.name, file.stat().st_size] for file in files if file.is_file()) or place
