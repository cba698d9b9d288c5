"""The table of keys that decoder blocks read is what MaxText does, seen again."""

import json
from enum import Enum
from typing import Any

import keys_lab
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.maxtext,
    pytest.mark.proof("keys that blocks read", inputs=["moeconv/arch/data/*keys*.json"]),
]

TABLE = json.loads(keys_lab.KEYS_READ.read_text())
CLASSES = json.loads(keys_lab.CLASSES.read_text())


@pytest.mark.parametrize("block", keys_lab.BLOCKS)
def test_a_block_reads_what_the_table_says(block):
    assert keys_lab.function_keys_read(block) == TABLE[block]


def test_watching_sees_a_read():
    # A table that nobody reads from would agree with itself.
    read: set[str] = set()
    config = keys_lab.Watched(keys_lab.resolved(rope_max_timescale=5), read)
    assert config.rope_max_timescale == 5
    assert getattr(config, "no_such_key", None) is None
    assert read == {"rope_max_timescale"}
    with pytest.raises(NotImplementedError, match="get_keys"):
        config.get_keys()


def test_what_maxtext_resolves_is_neutral_by_default():
    config = keys_lab.resolved().get_keys()
    odd = {
        key: plain(config[key])
        for key, entry in CLASSES.items()
        if entry["class"] == "function"
        and key in config
        and plain(config[key]) not in entry["neutral"]
    }
    assert odd == {"normalize_embedding_logits": True}


def plain(value: Any) -> Any:
    """A resolved value as YAML would have it."""
    match value:
        case Enum():
            return value.value
        case tuple() | list():
            return [plain(item) for item in value]
        case None | bool() | int() | float() | str() | dict():
            return value
    return str(value)  # a dtype
