"""Files that are not MaxText's own: W&B's record, which has its settings, and some that have none.

A run's `config.yaml` of W&B has `KEY: {desc: …, value: VALUE}`, its API gives `KEY: VALUE` and
`_wandb`.
"""

from collections.abc import Mapping
from typing import Any

from moeconv.arch.keys import keys

# What W&B writes around a value.
_AROUND = {"value", "desc"}
_OWN = ("_wandb", "wandb_version")
_DEEPEST = 3

# Marks of files that are easily taken for a config: keys, and what the file is.
_OTHERS: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(marks.split()), what)
    for marks, what in (
        ("peft_type", "the adapter_config.json of an adapter for PEFT"),
        ("model_type", "the config.json of a Hugging Face model"),
        ("architectures", "the config.json of a Hugging Face model"),
        ("transformers_version", "the generation_config.json of a Hugging Face model"),
        ("weight_map", "the index of a Hugging Face model"),
        ("tokenizer_class", "the tokenizer_config.json of a tokenizer"),
        ("added_tokens model", "a tokenizer.json"),
        ("tree_metadata", "the metadata of a checkpoint's arrays"),
        ("item_handlers", "the metadata of a checkpoint's step"),
        ("heartbeatAt", "W&B's wandb-metadata.json, which has a run's command line at most"),
        ("_runtime _step", "W&B's wandb-summary.json, which has a run's last metrics"),
    )
)
_OF_MOECONV = {
    "moeconv": "the manifest of a model that moeconv has converted",
    "moeconv plan": "a plan of moeconv's",
}
SIDECAR = "moeconv-run"

Path = tuple[str, ...]


def what_else(content: Mapping[str, Any]) -> str | None:
    """What a file is that has no settings of MaxText, in words; None where it is not known."""
    if name := _OF_MOECONV.get(str(content.get("format"))):
        return name
    return next((what for marks, what in _OTHERS if marks <= content.keys()), None)


def is_record(content: Mapping[str, Any]) -> bool:
    """True if W&B wrote it, or its API gave it."""
    return any(key in content for key in _OWN) or any(map(_is_wrapped, content.values()))


def sections(content: Mapping[str, Any], path: Path = ()) -> dict[Path, dict[str, Any]]:
    """The mappings in a record that hold settings of MaxText, by the keys that lead there.

    A program gives W&B its settings as they are, or all of them under one name of its own.
    """
    plain = {
        key: (value["value"] if _is_wrapped(value) else value)
        for key, value in content.items()
        if key not in _OWN
    }
    inner = {
        key: value
        for key, value in plain.items()
        if isinstance(value, Mapping) and key not in keys() and len(path) < _DEEPEST
    }
    below: dict[Path, dict[str, Any]] = {}
    for key, value in inner.items():
        wrapped = ("value",) if _is_wrapped(content[key]) else ()
        below |= sections(value, (*path, key, *wrapped))
    own = {k: v for k, v in plain.items() if not any(p[len(path)] == k for p in below)}
    return below if not own.keys() & keys().keys() else {path: own, **below}


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value and value.keys() <= _AROUND
