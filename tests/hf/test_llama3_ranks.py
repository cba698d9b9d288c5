"""Llama-3's ranks against MaxText's own encoder, and ranks that are broken."""

import ast
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any, Collection, Literal  # noqa: UP035  (names MaxText's class needs)

import pytest
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_lab import ASSETS, MAXTEXT, RANKS, REPOSITORY, refused, small_ranks, write
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import TokenizerFiles, check_fits, read_tokenizer
from moeconv.hf.tokenizer.special_sets import LLAMA3


@pytest.fixture(scope="module")
def maxtext_tokenizer() -> Any:
    """MaxText's own class, compiled alone from its source: importing maxtext takes 16 s."""
    source = (MAXTEXT / "input_pipeline" / "tokenizer.py").read_text()
    found = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TikTokenTokenizer"
    ]
    silent = type("max_logging", (), {"log": staticmethod(lambda message: None)})
    scope: dict[str, Any] = {
        "Collection": Collection,
        "Literal": Literal,
        "Path": Path,
        "load_tiktoken_bpe": tiktoken.load.load_tiktoken_bpe,
        "max_logging": silent,
        "tiktoken": tiktoken,
    }
    exec(compile(ast.Module(found, []), "tokenizer.py", "exec"), scope)
    return scope["TikTokenTokenizer"](str(RANKS), add_bos=False, add_eos=False)


def ordinary(text: str) -> str:
    """Without Llama-3's special tokens, which only MaxText takes for text (hypothesis, too, copies
    constants from the sources)."""
    return text.replace("<|", "<")


def texts() -> list[str]:
    """Prose in many scripts, code, numbers, runs of white space, emoji, and a bit of each block."""
    prose = [
        "Once upon a time, there was a little girl named Lily. She didn't want to, but she'd try.",
        "WE'LL SEE; they'Ve said I'M 'RE 'd. It’s naïve — “quoted” … café coöperate ſ'ſ",
        "Съешь же ещё этих мягких французских булок, да выпей чаю.",
        "我能吞下玻璃而不伤身体。今天天气很好,我们去公园吧!錦鯉",
        "いろはにほへと ちりぬるを わかよたれそ。カタカナ123ひらがな",
        "다람쥐 헌 쳇바퀴에 타고파. 더욱",
        "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
        "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
        "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
        "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
        "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇫🇷🇯🇵 ☺️ 1️⃣ 🫠x🫠",
        "e\u0301 n\u0303 \u202eright to left\u202c zero\u200bwidth\u200djoiner",
        "\ufeffbom \x00\x01\x7f",
        "<|not_special|> <s> </s> [INST] <unk> #version: 0.2 \\u0041 &amp; <b>bold</b>",
        "",
    ]
    numbers = [f"{10**n}" for n in range(12)] + [
        "3.14159",
        "1,234,567.89",
        "0x1F",
        "1e-10",
        "2024-02-29",
        "½⅓²³",
        "٣٤٥٦",
        "一二三",
    ]
    gaps = [" ", "\t", "\n", "\r\n", "\u3000", "\xa0", "\x85", "\u2028"]
    runs = [
        f"{before}{gap * n}{after}"
        for gap in gaps
        for n in (1, 2, 3, 5, 17)
        for before, after in (("", ""), ("a", "b"), (" x.", " 1"), ("\n", "\n "))
    ]
    code = ordinary((MAXTEXT / "input_pipeline" / "tokenizer.py").read_text())
    blocks = [
        "".join(c for c in map(chr, range(first, first + 64)) if unicodedata.category(c) != "Cs")
        for first in range(0x80, 0x20000, 0x200)
    ]
    return prose + numbers + runs + blocks + [code, code.replace("  ", "\t"), *code.splitlines()]


def test_ids_are_those_of_maxtext(loaded: Any, maxtext_tokenizer: Any) -> None:
    corpus = list(dict.fromkeys(texts()))
    assert len(corpus) >= 300
    ours = loaded(corpus, add_special_tokens=False)["input_ids"]
    theirs = [maxtext_tokenizer.encode(text) for text in corpus]
    assert [text for text, a, b in zip(corpus, ours, theirs, strict=True) if a != b] == []
    assert [text for text, i in zip(corpus, ours, strict=True) if loaded.decode(i) != text] == []


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60).map(ordinary))
def test_ids_of_any_text_are_those_of_maxtext(
    loaded: Any, maxtext_tokenizer: Any, text: str
) -> None:
    ids = loaded.encode(text, add_special_tokens=False)
    assert ids == maxtext_tokenizer.encode(text)
    assert loaded.decode(ids) == text


def test_bos_begins_a_text_and_eos_is_left_to_the_model(loaded: Any) -> None:
    plain = loaded.encode("Hello world", add_special_tokens=False)
    assert loaded.encode("Hello world") == [128000, *plain]
    assert loaded("Hello", "world")["input_ids"] == [
        *loaded.encode("Hello"),
        *loaded.encode("world"),
    ]
    assert loaded.decode(loaded.encode("Hello world"), skip_special_tokens=True) == "Hello world"
    assert (loaded.bos_token_id, loaded.eos_token_id) == (128000, 128001)
    assert (loaded.pad_token_id, loaded.padding_side) == (128001, "left")
    assert loaded.model_max_length == 2048
    assert len(loaded) == 128256


def test_text_that_looks_like_a_special_token(loaded: Any, maxtext_tokenizer: Any) -> None:
    # MaxText trains on it as ordinary text; transformers needs to be told so.
    text = "a <|end_of_text|> b"
    assert 128001 in loaded.encode(text, add_special_tokens=False)
    told = loaded.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert told == maxtext_tokenizer.encode(text)


def test_special_tokens_are_those_of_maxtext(loaded: Any, maxtext_tokenizer: Any) -> None:
    assert dict(zip(LLAMA3.tokens, range(128000, 128256), strict=True)) == (
        maxtext_tokenizer.special_tokens
    )
    assert loaded.convert_tokens_to_ids(list(LLAMA3.tokens)) == list(range(128000, 128256))
    assert loaded.decode(range(128000, 128256), skip_special_tokens=True) == ""


def test_vocabulary_and_merges_are_those_of_transformers(llama3: TokenizerFiles) -> None:
    converter = TikTokenConverter(vocab_file=str(RANKS), extra_special_tokens=LLAMA3.tokens)
    vocab, merges = converter.extract_vocab_merges_from_model(str(RANKS))
    ours = json.loads(llama3.files["tokenizer.json"])
    assert ours["model"]["vocab"] == vocab
    assert [tuple(merge.split(" ")) for merge in ours["model"]["merges"]] == merges
    assert ours["model"]["ignore_merges"] is True
    pattern = ours["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert pattern == converter.pattern


def test_it_is_described_and_loads_by_its_class(llama3: TokenizerFiles, tmp_path: Path) -> None:
    assert (llama3.kind, llama3.source, llama3.size) == ("tiktoken", str(RANKS), 128256)
    assert (llama3.bos_token_id, llama3.eos_token_id, llama3.pad_token_id) == (128000, 128001, None)
    (note,) = llama3.notes
    assert "Llama 3's are put after its 128000 ranks" in note
    assert "give llama3.1:FILE" in note
    config = json.loads(llama3.files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False
    model = write(llama3, tmp_path / "model", model_type=None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    assert tokenizer.encode("hello world") == [128000, 15339, 1917]


def test_same_ranks_same_bytes_in_any_order(llama3: TokenizerFiles, tmp_path: Path) -> None:
    again = tmp_path / "again.tiktoken"
    again.write_bytes(b"\r\n".join(reversed(RANKS.read_bytes().splitlines())))
    assert read_tokenizer(str(again), model_max_length=2048).files == llama3.files


def test_context_length_is_written_only_when_known(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(str(small_ranks(tmp_path)), model_max_length=None)
    assert "model_max_length" not in json.loads(tokenizer.files["tokenizer_config.json"])


def test_the_bare_install_can_read_it() -> None:
    heavy = ["torch", "transformers", "jax", "tokenizers", "tiktoken", "huggingface_hub"]
    code = (
        "import sys; from moeconv.hf.tokenizer import read_tokenizer;"
        f"read_tokenizer({str(ASSETS / 'qwen3-tokenizer')!r}, model_max_length=None);"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_other_ranks_put_the_special_tokens_after_themselves(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(str(small_ranks(tmp_path)), model_max_length=None)
    assert (tokenizer.size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (514, 258, 259)


def test_a_merge_that_looks_like_a_comment_is_kept(tmp_path: Path) -> None:
    word = b"#version!?"
    ranks = small_ranks(tmp_path, tuple(word[:n] for n in range(2, 11)))
    tokenizer = read_tokenizer(str(ranks), model_max_length=None)
    content = json.loads(tokenizer.files["tokenizer.json"])
    # One piece, and not looked up whole, so that only merges can make the word.
    content["model"]["ignore_merges"] = False
    content["pre_tokenizer"]["pretokenizers"].pop(0)
    merged = Tokenizer.from_str(json.dumps(content))
    assert merged.encode("#version!?", add_special_tokens=False).tokens == ["#version!?"]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["IQ== 0", "IQ=="], "line 2 is not a base64 token and its rank"),
        (["IQ== 0", "I 1"], "the token of line 2 is not base64"),
        (["IQ== 0", "Ig== 0"], "line 2 gives rank 0 a second time"),
        (["IQ== 0", "Ig== 2"], "no token has rank 1, though ranks go up to 2"),
        (["IQ== 0", "IQ== 1"], "a token has two ranks"),
        (["IQ== 0"], "255 of the 256 single bytes have no rank (0x00 first)"),
        ([], "256 of the 256 single bytes have no rank"),
    ],
)
def test_broken_ranks(tmp_path: Path, lines: list[str], sentence: str) -> None:
    path = tmp_path / "broken.tiktoken"
    path.write_text("\n".join(lines))
    message = refused(path)
    assert sentence in message
    assert message.endswith("fetch the file again")


def test_llama3_needs_128256_rows(llama3: TokenizerFiles) -> None:
    assert check_fits(llama3, 128256) == []
    with pytest.raises(TokenizerError) as caught:
        check_fits(llama3, 128000)
    assert str(caught.value) == (
        f"{RANKS}: no row in the model for ids 128000 to 128255 (among them BOS 128000, EOS "
        "128001), as its vocab_size is 128000; train with vocab_size: 128256, or give the "
        "tokenizer that the model was trained with"
    )
