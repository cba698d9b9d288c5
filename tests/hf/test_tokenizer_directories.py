"""Directories with a tokenizer: what is copied, made loadable, refused, and what fits."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from denied import unreadable
from tokenizer_lab import ASSETS, refused, small_ranks, write
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import TokenizerFiles, check_fits, read_tokenizer


def configure(directory: Path, **fields: Any) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_transformers_5_saved_is_made_loadable_in_4(saved: Path, tmp_path: Path) -> None:
    before = json.loads((saved / "tokenizer_config.json").read_text())
    assert before["tokenizer_class"] == "TokenizersBackend"
    assert before["extra_special_tokens"] == ["<x>"]

    tokenizer = read_tokenizer(str(saved), model_max_length=5)
    config = json.loads(tokenizer.files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<x>"]
    assert "extra_special_tokens" not in config
    assert config["model_max_length"] == 77
    assert len(tokenizer.notes) == 4
    assert "TokenizersBackend is unknown to transformers 4" in tokenizer.notes[0]
    assert "extra_special_tokens is a list" in tokenizer.notes[1]
    assert "padding_side is missing" in tokenizer.notes[2]
    assert "names no pad_token; '<e>' is written" in tokenizer.notes[3]

    loaded = AutoTokenizer.from_pretrained(write(tokenizer, tmp_path / "model"))
    assert len(loaded) == tokenizer.size == 268
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    assert loaded.all_special_tokens == ["<b>", "<e>", "<x>"]
    assert loaded.encode("hello world") == AutoTokenizer.from_pretrained(saved).encode(
        "hello world"
    )


def test_only_tokenizer_files_are_copied_and_as_they_are(saved: Path) -> None:
    own = {"padding_side": "right", "pad_token": "<x>"}
    configure(saved, tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens={}, **own)
    for name in ("config.json", "model.safetensors", "README.md", "generation_config.json"):
        (saved / name).write_text("{}")
    tokenizer = read_tokenizer(str(saved), model_max_length=5)
    assert set(tokenizer.files) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for name, content in tokenizer.files.items():
        assert content == (saved / name).read_bytes()
    assert tokenizer.notes == ()
    assert tokenizer.kind == "directory"


def test_a_lone_tokenizer_json_does_not_become_llamas(saved: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(str(saved / "tokenizer.json"), model_max_length=5)
    assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert json.loads(tokenizer.files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "model_max_length": 5,
    }
    assert (tokenizer.size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (268, None, None)
    assert "tokenizer_class is missing" in tokenizer.notes[0]
    loaded = AutoTokenizer.from_pretrained(write(tokenizer, tmp_path / "model"))
    assert (len(loaded), loaded.all_special_tokens) == (268, [])


def test_texts_of_different_lengths_are_generated_in_one_batch(saved: Path, tmp_path: Path) -> None:
    out = write(read_tokenizer(str(saved), model_max_length=64), tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(out)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 1.0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), **shape, **heads)).eval()
    prompts = ["hello", "hello world hello world", "w"]
    usual = {"max_new_tokens": 8, "do_sample": False}

    def generated(texts: list[str]) -> list[list[int]]:
        batch = loaded(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        length = batch["input_ids"].shape[1]
        return [row[length:].tolist() for row in model.generate(**batch, **usual)]

    assert generated(prompts) == [generated([text])[0] for text in prompts]


def test_tokens_that_transformers_will_add_are_counted(saved: Path, tmp_path: Path) -> None:
    configure(
        saved,
        tokenizer_class="PreTrainedTokenizerFast",
        extra_special_tokens=["<q>", "<x>"],
        mask_token={"__type": "AddedToken", "content": "<m>"},
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer = read_tokenizer(str(saved), model_max_length=None)
    loaded = AutoTokenizer.from_pretrained(write(tokenizer, tmp_path / "model"))
    assert (tokenizer.size, tokenizer.pad_token_id) == (len(loaded), loaded.pad_token_id)
    assert (tokenizer.size, tokenizer.pad_token_id) == (272, 269)
    assert sum("is not in tokenizer.json" in note for note in tokenizer.notes) == 4


def test_names_from_special_tokens_map(saved: Path) -> None:
    configure(saved, bos_token=None)
    named = {"bos_token": {"content": "<x>", "lstrip": False}, "pad_token": "<e>"}
    (saved / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = read_tokenizer(str(saved), model_max_length=None)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 1)
    # transformers does not open the map when the config defines its added tokens.
    configure(saved, added_tokens_decoder={"400": {"content": "<far>"}})
    tokenizer = read_tokenizer(str(saved), model_max_length=None)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.size) == (None, None, 401)


def test_maxtexts_qwen3_and_a_unigram_model(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(str(ASSETS / "qwen3-tokenizer"), model_max_length=None)
    loaded = AutoTokenizer.from_pretrained(ASSETS / "qwen3-tokenizer")
    assert tokenizer.size == len(loaded)
    assert tokenizer.bos_token_id is None
    assert tokenizer.eos_token_id == loaded.eos_token_id
    assert tokenizer.pad_token_id == loaded.pad_token_id
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    unigram.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(str(tmp_path), model_max_length=None).size == 3


def test_ranks_named_as_meta_names_them(tmp_path: Path) -> None:
    small_ranks(tmp_path).rename(tmp_path / "tokenizer.model")
    for spec in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = read_tokenizer(str(spec), model_max_length=None)
        assert (tokenizer.kind, tokenizer.size) == ("tiktoken", 514)
        assert "tokenizer.model" not in tokenizer.files


# Sentences ---------------------------------------------------------------------------------------


def test_no_tokenizer_there(tmp_path: Path) -> None:
    assert "has no tokenizer.json; give a directory into which" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert "is no tokenizer.json, no sentencepiece model and no file of tiktoken" in refused(
        tmp_path / "model.safetensors"
    )


@pytest.mark.parametrize(
    "spec",
    [
        "/no/such/place",
        "./some/where",
        "../up",
        "~/no-such-tokenizer",
        "a/b/c",
        "gpt2",
        "assets/tokenizer_llama3.tiktoken",
        "runs/tokenizer.json",
        "",
    ],
)
def test_paths_are_never_looked_up_on_the_hub(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import would fail
    if spec == "":
        monkeypatch.chdir(Path(__file__).parent)
        assert "has no tokenizer.json" in refused(spec)
        return
    assert "no such file or directory; give a directory with a tokenizer.json" in refused(spec)


def test_nobodys_home() -> None:
    assert "cannot be read" in refused("~no-such-user/tokenizer")


def test_a_directory_that_may_not_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable(monkeypatch, saved / "tokenizer.json")
    assert "cannot be read (Permission denied)" in refused(saved)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not JSON"),
        ("tokenizer.json", "\udcff{", "tokenizer.json is not JSON"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json is not JSON"),
        ("tokenizer.json", "[]", "tokenizer.json is not a JSON object"),
        ("tokenizer.json", "{}", "model.vocab is missing or empty"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "model.vocab is missing or empty"),
        ("tokenizer.json", '{"model": {"vocab": []}}', "model.vocab is missing or empty"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "0"}}}', "token 'a' has the id '0'"),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}', "token 'a' has the id -1"),
        ("tokenizer.json", '{"model": {"vocab": [["a"]]}}', "lacks its content or id"),
        (
            "tokenizer.json",
            '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}',
            "lacks its content or id",
        ),
        ("tokenizer_config.json", "nothing", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", '{"eos_token": 2}', "eos_token is 2, not a token"),
        ("tokenizer_config.json", '{"eos_token": {}}', "eos_token is {}, not a token"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "y"}}}',
            "lacks its content or id",
        ),
        (
            "tokenizer_config.json",
            '{"additional_special_tokens": [3]}',
            "additional_special_tokens is 3, not a token",
        ),
        (
            "tokenizer_config.json",
            '{"additional_special_tokens": 4}',
            "additional_special_tokens is 4, not a list of tokens",
        ),
        ("tokenizer_config.json", '{"auto_map": {}}', "auto_map asks for Python code"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json is not a JSON object"),
        ("added_tokens.json", "{", "added_tokens.json is not JSON"),
        ("added_tokens.json", '{"<t>": null}', "token '<t>' has the id None"),
    ],
)
def test_broken_files(saved: Path, name: str, content: str, sentence: str) -> None:
    (saved / name).write_text(content, errors="surrogateescape")
    assert sentence in refused(saved)


# What fits ---------------------------------------------------------------------------------------


def sized(size: int, bos: int | None, eos: int | None, pad: int | None = None) -> TokenizerFiles:
    return TokenizerFiles({}, "here", "directory", size, bos, eos, pad)


def test_one_id_too_many_and_unnamed_ones() -> None:
    with pytest.raises(TokenizerError, match="for id 9, as its vocab_size is 9; train with"):
        check_fits(sized(10, 0, 1), 9)
    with pytest.raises(TokenizerError, match=r"for ids 9 to 11 \(among them padding 11\), as"):
        check_fits(sized(12, 0, 1, 11), 9)


def test_padding_rows_are_fine_up_to_a_tenth() -> None:
    assert check_fits(sized(1000, 0, 1), 1100) == []
    (warning,) = check_fits(sized(1000, 0, 1), 1101)
    assert "1000 ids and the model 1101 rows: the last 101 would be padding" in warning


def test_a_tokenizer_without_an_end() -> None:
    (warning,) = check_fits(sized(10, None, None), 10)
    assert "names no eos_token" in warning
