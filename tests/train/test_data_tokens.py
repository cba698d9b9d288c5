"""Tokenising: Llama-3's own ids, special tokens in a text as text."""

import json
import shutil
from pathlib import Path

import pytest
from moeconv_train import feed
from moeconv_train.data import tokens
from moeconv_train.settings import DataSettings
from moeconv_train.tokenizer import TOKENIZER, read_stories

from moeconv.errors import TokenizerError

STORIES = read_stories()[:50]


@pytest.fixture(scope="module")
def llama3():
    pytest.importorskip("maxtext")
    return tokens.load("llama3")


@pytest.fixture
def tiny(tmp_path):
    """A tokenizer directory whose `tokenizer_config.json` can be changed."""

    def make(**changes):
        directory = shutil.copytree(TOKENIZER, tmp_path / "tokenizer", dirs_exist_ok=True)
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return str(directory)

    return make


def test_llama3_gives_the_ids_that_maxtext_trains_on(llama3):
    import maxtext
    from maxtext.input_pipeline.tokenizer import TikTokenTokenizer

    ranks = Path(maxtext.__file__).parent / "assets" / "tokenizers" / "tokenizer_llama3.tiktoken"
    maxtext_own = TikTokenTokenizer(str(ranks), add_bos=True, add_eos=True)
    texts = [*STORIES, "Wow! <|end_of_text|>!", "naïve — 日本語 🙂\r\n\ttab", " ", "x" * 300]
    for ids, text in zip(llama3.encode(texts), texts, strict=True):
        assert ids.tolist() == maxtext_own.encode(text)
        assert (ids[0], ids[-1]) == (128000, 128001)
        assert not set(ids[1:-1].tolist()) & set(range(128000, 128256))
    told = llama3.record
    assert (told.size, told.bos_token_id, told.eos_token_id) == (128256, 128000, 128001)


def test_what_maxtext_streams_is_not_padded_with_an_exclamation_mark(llama3, tmp_path):
    tokenizer = pytest.importorskip("maxtext.input_pipeline.tokenizer")
    assert llama3.encode(["!"])[0].tolist() == [128000, 0, 128001]
    assert (
        llama3.record.pad_token_id == 0 and not llama3.notes
    )  # of prepared rows nothing is masked by its id
    path = Path(feed.tokenizer_for(DataSettings(tokenizer="llama3"), tmp_path))
    assert tokenizer.HFTokenizer(str(path), True, True, None).pad_id == 128002
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((path / name).read_text())["pad_token"] == "<|reserved_special_token_0|>"
    for name in set(llama3.files) - {"tokenizer_config.json", "special_tokens_map.json"}:
        assert (path / name).read_bytes() == llama3.files[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token": None}, "names no bos_token; stories are written as BOS story EOS"),
        ({"bos_token": None, "eos_token": None}, "no bos_token and no eos_token"),
    ],
)
def test_a_tokenizer_that_would_train_wrongly_is_refused(tiny, changes, message):
    with pytest.raises(TokenizerError, match=message):
        tokens.load(tiny(**changes))


def test_a_ranks_file_of_another_maxtext_is_refused(monkeypatch):
    pytest.importorskip("maxtext")
    monkeypatch.setattr(tokens, "_LLAMA3_SHA256", "0" * 64)
    with pytest.raises(TokenizerError, match=r"ship with maxtext 0\.2\.5, which is not installed"):
        tokens.load("llama3")
    monkeypatch.setattr(tokens.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match=r"ship with maxtext 0\.2\.5, which is not installed"):
        tokens.load("llama3")
