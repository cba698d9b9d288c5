"""Every field of tokenizer_config.json is one that transformers can use, or refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_lab import refused, write
from transformers import AutoTokenizer

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import read_tokenizer
from moeconv.hf.tokenizer.config_fields import _KINDS, _REPLACING, ADDITIONAL, EXTRA, NAMED

WRONG: list[tuple[str, Any, str]] = [
    ("padding_side", "middle", "padding_side is 'middle', not left or right"),
    ("truncation_side", 3, "truncation_side is 3, not left or right"),
    ("model_max_length", "2048", "model_max_length is '2048', not a whole number"),
    ("model_max_length", -1, "model_max_length is -1"),
    ("model_max_length", 2048.5, "model_max_length is 2048.5"),
    ("model_max_length", True, "model_max_length is True"),
    ("model_input_names", "input_ids", "not a list of texts"),
    ("split_special_tokens", "no", "split_special_tokens is 'no', not true or false"),
    ("chat_template", 3, "chat_template is 3, not a template's text"),
    ("chat_template", [], r"chat_template is []"),
    ("chat_template", [{"name": "default"}], "each with name and template"),
    ("chat_template", {"default": 3}, "not a template's text"),
    ("chat_control_tokens", 3, "not a list of texts"),
    ("tokenizer_class", 3, "tokenizer_class is 3, not the name of a class"),
    ("added_tokens_decoder", [], "added_tokens_decoder is [], not tokens by their ids"),
    ("eos_token", {"content": "<e>", "lstrip": 3}, "eos_token: lstrip is 3, not true or false"),
    (EXTRA, 3, "extra_special_tokens is 3, not"),
    (EXTRA, {"image_token": 3}, "image_token is 3, not a token"),
    (EXTRA, [3], "is 3, not a token"),
]


def changed(folder: Path, **fields: Any) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(("name", "value", "sentence"), WRONG)
def test_a_wrong_value(saved: Path, name: str, value: Any, sentence: str) -> None:
    assert sentence in refused(changed(saved, **{name: value}))


def test_what_would_replace_the_files(saved: Path, tmp_path: Path) -> None:
    """Old releases of transformers wrote paths of the machine that saved a tokenizer."""
    fields = {"tokenizer_file": "/root/tokenizer.json", "special_tokens_map_file": "/root/x"}
    found = read_tokenizer(str(changed(saved, **fields, init_inputs=[])), model_max_length=None)
    assert b"/root" not in found.files["tokenizer_config.json"]
    [note] = [n for n in found.notes if "left out" in n]
    assert "init_inputs, special_tokens_map_file, tokenizer_file" in note
    AutoTokenizer.from_pretrained(write(found, tmp_path / "out"))


def test_null_means_the_default(saved: Path, tmp_path: Path) -> None:
    fields = dict.fromkeys([*_KINDS, "auto_map", "fast_tokenizer_files"])
    found = read_tokenizer(str(changed(saved, **fields)), model_max_length=None)
    loaded = AutoTokenizer.from_pretrained(write(found, tmp_path / "out"))
    assert loaded.truncation_side == "right"
    assert loaded(["hello", "hello world"], padding=True)["input_ids"]


def test_tokens_of_a_model_s_own_are_counted(saved: Path, tmp_path: Path) -> None:
    plain = read_tokenizer(str(saved), model_max_length=None)
    fields = {"image_token": "<image>", EXTRA: {"audio_token": "<audio>"}}
    found = read_tokenizer(str(changed(saved, **fields)), model_max_length=None)
    assert found.size == plain.size + 2
    loaded = AutoTokenizer.from_pretrained(write(found, tmp_path / "out"))
    assert len(loaded) == found.size


KEYS = st.sampled_from(["name", "template", "content", "lstrip", "x", "1"])
TOKEN = st.sampled_from(["<e>", "x", {"content": "<e>"}, {"content": "x", "lstrip": True}])
JUNK = st.recursive(
    st.sampled_from([None, True, False, -1, 0, 3, 2.5, 1e30, "", "<e>", "x", "left"]),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(KEYS, below, max_size=3) | TOKEN,
    max_leaves=4,
)
FIELDS = [*_KINDS, *_REPLACING, *NAMED, ADDITIONAL, EXTRA, "model_specific_special_tokens"]


@settings(max_examples=60, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=3))
def test_refused_or_loaded(tmp_path_factory: pytest.TempPathFactory, fields: Any) -> None:
    """And what is loaded pads, cuts and renders."""
    folder = tmp_path_factory.mktemp("any")
    vocab = {letter: number for number, letter in enumerate("helo wrd<>")}
    added = [{"id": 10, "content": "<e>", "special": True, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}]  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    content = {"version": "1.0", "model": model, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        found = read_tokenizer(str(folder), model_max_length=None)
    except TokenizerError as error:
        assert "\n" not in str(error)
        return
    loaded = AutoTokenizer.from_pretrained(write(found, folder / "out"))
    assert len(loaded) <= found.size
    if loaded.pad_token is not None:
        loaded(["hello", "hello world"], padding=True, truncation=True)
    for name in loaded.chat_template if isinstance(loaded.chat_template, dict) else ():
        assert isinstance(loaded.get_chat_template(name), str)
    if isinstance(loaded.chat_template, str):
        loaded.get_chat_template()
