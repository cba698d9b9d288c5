"""Data that MaxText reads by settings of its own: tokenised while it trains, or files of others."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv_train.data import tokens
from moeconv_train.data.records import write_bytes
from moeconv_train.settings import EMBEDDED, DataSettings

from moeconv.errors import UsageError
from moeconv.untrusted import strict_json

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
    if config["hf_path"] or config["hf_train_files"]:
        evaluated = config["hf_eval_split"] or config["hf_eval_files"]
        return {**_TOKENISING, **({} if evaluated else {"eval_interval": -1})}
    source = settings.source
    if not source:
        return {}
    if source == EMBEDDED or Path(source).expanduser().exists():
        raise UsageError(
            f"dataset_type=hf: run.data.source={source} is no dataset on the Hub; use "
            "dataset_type=grain, or name your files with hf_path and hf_train_files"
        )
    return {
        **_TOKENISING,
        "hf_path": source,
        "hf_eval_split": "validation",
        "train_split": "train",
        "train_data_columns": [settings.column],
        "eval_data_columns": [settings.column],
    }


def tokenizer_for(settings: DataSettings, output: Path) -> str:
    """The tokenizer for streaming: what comes with moeconv or MaxText becomes a directory."""
    name = settings.tokenizer
    if name not in (EMBEDDED, tokens.LLAMA3):
        return name
    directory = output / "data" / f"tokenizer-{name}"
    files = dict(tokens.load(name).files)
    if name == tokens.LLAMA3:
        # MaxText masks its pad token wherever it stands (input_pipeline_utils.py,
        # `shift_and_refine`), and would take id 0, the exclamation mark, for want of one.
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            told = {**json.loads(files[file]), "pad_token": "<|reserved_special_token_0|>"}
            files[file] = strict_json.dumps(told)
    for file, content in files.items():
        write_bytes(directory / file, content)
    return str(directory)


def source_digest(config: Mapping[str, Any]) -> str:
    """What MaxText's settings say of the data, by the names of files; folders may move.

    Only the digest is kept beside a run: paths of this machine are nobody else's business.
    """
    told: dict[str, Any] = {key: config[key] for key in _NAMES}
    for key in _PLACES:
        told[key] = [Path(place).name for place in re.split("[,;]", str(config[key] or ""))]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
