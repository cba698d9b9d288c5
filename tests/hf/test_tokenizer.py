"""Tokenizers: Llama-3's ranks against MaxText's own encoder, directories, the Hub, what fits."""

import ast
import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Collection, Literal  # noqa: UP035  (names MaxText's class needs)

import pytest
import sentencepiece
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from moeconv.errors import TokenizerError
from moeconv.hf.tiktoken_bpe import SPECIAL_TOKENS
from moeconv.hf.tokenizer import TokenizerFiles, check_fits, read_tokenizer

MAXTEXT = Path(importlib.util.find_spec("maxtext").submodule_search_locations[0])
REPOSITORY = Path(__file__).parents[2]
ASSETS = MAXTEXT / "assets" / "tokenizers"
RANKS = ASSETS / "tokenizer_llama3.tiktoken"


def write(tokenizer: TokenizerFiles, directory: Path, model_type: str | None = "mixtral") -> Path:
    """Lays the tokenizer down as convert does, beside the model's config.json."""
    directory.mkdir()
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)
    if model_type is not None:
        config = {"model_type": model_type, "transformers_version": "4.46.0"}
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def refused(spec: object) -> str:
    """The one sentence with which `spec` is refused."""
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(str(spec), model_max_length=None)
    message = str(caught.value)
    assert message.startswith(f"{spec}: ")
    assert "\n" not in message
    return message


# Llama-3's ranks ---------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def llama3() -> TokenizerFiles:
    return read_tokenizer(str(RANKS), model_max_length=2048)


@pytest.fixture(scope="module")
def loaded(llama3: TokenizerFiles, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write(llama3, tmp_path_factory.mktemp("llama3") / "model"))


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
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (128000, 128001, None)
    assert loaded.model_max_length == 2048
    assert len(loaded) == 128256


def test_text_that_looks_like_a_special_token(loaded: Any, maxtext_tokenizer: Any) -> None:
    # MaxText trains on it as ordinary text; transformers needs to be told so.
    text = "a <|end_of_text|> b"
    assert 128001 in loaded.encode(text, add_special_tokens=False)
    told = loaded.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert told == maxtext_tokenizer.encode(text)


def test_special_tokens_are_those_of_maxtext(loaded: Any, maxtext_tokenizer: Any) -> None:
    assert dict(zip(SPECIAL_TOKENS, range(128000, 128256), strict=True)) == (
        maxtext_tokenizer.special_tokens
    )
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(128000, 128256))
    assert loaded.decode(range(128000, 128256), skip_special_tokens=True) == ""


def test_vocabulary_and_merges_are_those_of_transformers(llama3: TokenizerFiles) -> None:
    converter = TikTokenConverter(vocab_file=str(RANKS), extra_special_tokens=SPECIAL_TOKENS)
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
    assert llama3.notes == ()
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


# Broken and unusual ranks ------------------------------------------------------------------------


def rank_lines(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


BYTES = [bytes([byte]) for byte in range(256)]


def small_ranks(directory: Path, more: tuple[bytes, ...] = (b"ab", b"abc")) -> Path:
    path = directory / "small.tiktoken"
    path.write_bytes(b"\n".join(rank_lines([*BYTES, *more])))
    return path


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


# Directories -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small tokenizer, saved by transformers 5."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<b>", "<e>", "<x>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(["hello world"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<b>",
        eos_token="<e>",
        extra_special_tokens=["<x>"],
        model_max_length=77,
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


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
    assert len(tokenizer.notes) == 2
    assert "TokenizersBackend is unknown to transformers 4" in tokenizer.notes[0]
    assert "extra_special_tokens is a list" in tokenizer.notes[1]

    loaded = AutoTokenizer.from_pretrained(write(tokenizer, tmp_path / "model"))
    assert len(loaded) == tokenizer.size == 268
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, None)
    assert loaded.all_special_tokens == ["<b>", "<e>", "<x>"]
    assert loaded.encode("hello world") == AutoTokenizer.from_pretrained(saved).encode(
        "hello world"
    )


def test_only_tokenizer_files_are_copied_and_as_they_are(saved: Path) -> None:
    configure(saved, tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens={})
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
        "model_max_length": 5,
    }
    assert (tokenizer.size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (268, None, None)
    assert "tokenizer_class is missing" in tokenizer.notes[0]
    loaded = AutoTokenizer.from_pretrained(write(tokenizer, tmp_path / "model"))
    assert (len(loaded), loaded.all_special_tokens) == (268, [])


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


def test_sentencepiece_alone_is_refused(tmp_path: Path) -> None:
    model = ASSETS / "tokenizer.llama2"
    shutil.copy(model, tmp_path / "tokenizer.model")
    for spec in (model, tmp_path / "tokenizer.model", tmp_path):
        assert "LlamaTokenizerFast.from_pretrained(DIR, legacy=True)" in refused(spec)
    # Why: what transformers makes of the copy is not what MaxText trained on.
    trained = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode("hello world")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    copied = AutoTokenizer.from_pretrained(tmp_path)
    assert copied.encode("hello world", add_special_tokens=False) != trained


def test_ranks_named_as_meta_names_them(tmp_path: Path) -> None:
    small_ranks(tmp_path).rename(tmp_path / "tokenizer.model")
    assert "tokenizer.model holds tiktoken ranks: give that file itself" in refused(tmp_path)
    tokenizer = read_tokenizer(str(tmp_path / "tokenizer.model"), model_max_length=None)
    assert (tokenizer.kind, tokenizer.size) == ("tiktoken", 514)


# Sentences ---------------------------------------------------------------------------------------


def test_no_tokenizer_there(tmp_path: Path) -> None:
    assert "has no tokenizer.json; give a directory into which" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert "holds neither a tokenizer.json nor tiktoken ranks; give" in refused(
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
        "gs://bucket/tokenizer",
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
    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
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
            "additional_special_tokens is 4, not a token",
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


def test_llama3_needs_128256_rows(llama3: TokenizerFiles) -> None:
    assert check_fits(llama3, 128256) == []
    with pytest.raises(TokenizerError) as caught:
        check_fits(llama3, 128000)
    assert str(caught.value) == (
        f"{RANKS}: no row in the model for ids 128000 to 128255 (among them BOS 128000, EOS "
        "128001), as its vocab_size is 128000; train with vocab_size: 128256, or give the "
        "tokenizer that the model was trained with"
    )


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


# The Hub -----------------------------------------------------------------------------------------

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as fetching a few small files takes; each repository answers one way."""

    repository: Path
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        path = self.path.split("?")[0].removeprefix("/api/models")
        owner, name, *rest = path.strip("/").split("/")
        said = {"X-Error-Message": name}
        if owner == "missing":
            self.answer(404, {"X-Error-Code": "RepoNotFound", **said})
        elif owner == "private":
            self.answer(401, {"X-Error-Code": "RepoNotFound", **said})
        elif owner == "badtoken":
            self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif owner == "forbidden":
            self.answer(403, said)
        elif owner == "broken":
            self.answer(400, said)
        elif owner == "gated" and rest[0] == "resolve":
            self.answer(403, {"X-Error-Code": "GatedRepo", **said})
        elif rest[0] == "revision":
            self.json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []})
        elif rest[0] == "tree":
            files = [] if owner == "bare" else sorted(self.repository.iterdir())
            self.json(
                [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                    for f in files
                ]
            )
        else:
            content = (self.repository / rest[-1]).read_bytes()
            self.answer(
                200,
                {"X-Repo-Commit": COMMIT, "ETag": f'"{rest[-1]}"'},
                content,
            )

    do_HEAD = do_GET  # noqa: N815

    def json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(saved: Path) -> Any:
    (saved / "model.safetensors").write_bytes(b"never fetched")
    handler = type("OneHub", (Hub,), {"repository": saved, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask_hub(server: Any, cache: Path, specs: list[str], **env: str) -> list[Any]:
    """What reading each spec gives, in a process of its own: the Hub's client reads its
    environment when it is imported."""
    code = (
        "import json, sys\n"
        "from moeconv.errors import TokenizerError\n"
        "from moeconv.hf.tokenizer import read_tokenizer\n"
        "for spec in sys.argv[1:]:\n"
        "    try:\n"
        "        got = read_tokenizer(spec, model_max_length=None)\n"
        "        said = [got.kind, got.source, got.size, got.eos_token_id, sorted(got.files)]\n"
        "    except TokenizerError as error:\n"
        "        said = str(error)\n"
        "    print(json.dumps(said))\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    clean |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(REPOSITORY),
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *specs], env=clean, cwd=cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub_gives_the_tokenizer_and_nothing_else(hub: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    expected = ["hub", "someone/small", 268, 1, names]
    asked = hub.RequestHandlerClass.asked
    assert ask_hub(hub, cache, ["someone/small"], HF_TOKEN="hf_mine") == [expected]
    assert {token for _, token in asked} == {"Bearer hf_mine"}
    assert not any("safetensors" in path for path, _ in asked)
    # Then from the cache, with the Hub never asked.
    asked.clear()
    assert ask_hub(hub, cache, ["someone/small"], HF_HUB_OFFLINE="1") == [expected]
    assert asked == []


def test_each_failure_of_the_hub_is_one_sentence(hub: Any, tmp_path: Path) -> None:
    sentences = {
        "missing/repo": "no repository on the Hub that you may read; check the id",
        "private/repo": "if it is private set HF_TOKEN or run `hf auth login`",
        "badtoken/repo": "the Hub refuses your token (401); set HF_TOKEN to one that may read",
        "forbidden/repo": "the Hub refuses your token (403)",
        "gated/repo": "is gated; accept its terms on https://huggingface.co/gated/repo, then set",
        "broken/repo": "the Hub answers with 400; try again later, or give a directory",
        "bare/repo": "has no tokenizer.json; give a directory",
        "a--b/repo": "fetching it from the Hub failed (",
    }
    (tmp_path / "cache").mkdir()
    answers = ask_hub(hub, tmp_path / "cache", list(sentences), HF_TOKEN="hf_mine")
    for (spec, sentence), answer in zip(sentences.items(), answers, strict=True):
        assert answer.startswith(f"{spec}: ")
        assert sentence in answer
        assert "\n" not in answer
        assert "hf_mine" not in answer


def test_no_hub_at_all(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (offline,) = ask_hub(hub, tmp_path / "cache", ["some/one"], HF_HUB_OFFLINE="1")
    assert "with HF_HUB_OFFLINE set the Hub is not asked; unset it" in offline
    (away,) = ask_hub(hub, tmp_path / "cache", ["some/one"], HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub cannot be reached; check the network, or give a directory" in away
