"""Every setting of the installed MaxText is classified, and the file of classes is sound."""

import json

import maxtext_keys as tool
import pytest
from moeconv_train import recipe
from moeconv_train.preflight.config import maxtext_defaults

from moeconv.arch.keys import keys

ENTRIES = tool.read()
FUNCTION = {key: entry for key, entry in ENTRIES.items() if entry["class"] == "function"}


def test_every_key_of_the_installed_maxtext_is_classified():
    assert sorted(recipe.maxtext_keys() - ENTRIES.keys()) == []


def test_what_the_installed_maxtext_lacks_says_until_when_there_was_one():
    gone = {key for key, entry in ENTRIES.items() if "until" in entry}
    assert gone == ENTRIES.keys() - recipe.maxtext_keys()


def test_the_classes_are_sound():
    assert tool.faults(ENTRIES) == []


def test_the_file_has_one_key_a_line():
    assert tool.PATH.read_text() == tool.text(ENTRIES)


def test_a_default_asks_for_nothing_but_tied_logits_divided():
    defaults = maxtext_defaults()
    odd = {
        key for key in FUNCTION if key in defaults and defaults[key] not in FUNCTION[key]["neutral"]
    }
    assert odd == {"normalize_embedding_logits"}


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"class": "fuction"}, "is no class"),
        ({}, "is no class"),
        ({"class": "function", "neutral": [0]}, "not class, neutral, what"),
        ({"class": "function", "what": "caps"}, "not class, neutral, what"),
        ({"class": "function", "neutral": [], "what": "caps"}, "no list of values"),
        ({"class": "function", "neutral": False, "what": "caps"}, "no list of values"),
        ({"class": "function", "neutral": [0], "what": ""}, "is not said"),
        ({"class": "io", "neutral": [""]}, "not class"),
        ({"class": "io", "visible": True}, "not class"),
    ],
)
def test_a_fault_is_found(entry, fault):
    assert [fault in sentence for sentence in tool.faults({"key": entry})] == [True]


OLD = {
    "cap": {"class": "function", "neutral": [0], "what": "caps"},
    "steps": {"class": "training"},
    "back": {"class": "io", "until": "1.0"},
    "gone": {"class": "io", "until": "1.1"},
}


def test_a_new_release_keeps_the_classes():
    assert tool.renewed(OLD, ["cap", "back"], "1.2") == {
        "cap": OLD["cap"],
        "steps": {"class": "training", "until": "1.2"},
        "back": {"class": "io"},
        "gone": {"class": "io", "until": "1.1"},
    }


def test_a_new_key_must_be_classified():
    with pytest.raises(SystemExit, match="not classified: new_a, new_b"):
        tool.renewed(OLD, ["cap", "new_b", "new_a"], "1.2")


def test_the_text_reads_back():
    assert json.loads(tool.text(OLD)) == OLD


def test_a_section_is_neutral_if_its_settings_are():
    lora = keys()["lora"]
    assert lora.is_neutral({"enable_lora": False, "lora_rank": 0, "lora_module_path": "x.*y"})
    assert not lora.is_neutral({"enable_lora": True, "lora_rank": 8})
    assert not lora.is_neutral({"enable_lora": False, "lora_of_tomorrow": 0})
