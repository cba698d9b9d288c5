"""Special tokens after tiktoken ranks: which sets there are, and that none is guessed."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken_ext.openai_public as openai
from spm_lab import texts
from tokenizer_lab import BYTES, rank_lines, refused, small_ranks, write
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import read_tokenizer
from moeconv.hf.tokenizer.special_sets import SETS, choose
from moeconv.hf.tokenizer.tiktoken_bpe import tokenizer_files

WORDS = (b"th", b"the", b" t", b" th", b" the", b"ca", b"Ca", b"at", b"cat", b"'s", b"12", b"123")


def many_ranks(folder: Path, count: int) -> Path:
    """Ranks of a real number of tokens, most of which no text has."""
    tokens = [*BYTES, *(b"\xff" + number.to_bytes(3, "big") for number in range(count - 256))]
    path = folder / f"ranks{count}.tiktoken"
    path.write_bytes(b"\n".join(rank_lines(tokens)))
    return path


@pytest.mark.parametrize("name", SETS)
def test_ids_of_a_text_are_tiktokens(name: str) -> None:
    special, tokens = SETS[name], [*BYTES, *WORDS]
    theirs = tiktoken.Encoding(
        name=name,
        pat_str=special.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={text: len(tokens) + i for i, text in enumerate(special.tokens)},
    )
    files = tokenizer_files(tokens, special, model_max_length=None)
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    corpus = [text.replace("<|", "<") for text in texts(400, seed=2)]
    corpus += ["THE cat's 12345 caféS/\n x", special.eos, special.bos]
    for text in corpus:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, allowed_special="all"), ascii(text)
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_gpt_oss_is_o200k_harmony(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "load_tiktoken_bpe", lambda *_, **__: {})
    harmony: dict[str, Any] = openai.o200k_harmony()
    special = SETS["gpt-oss"]
    assert special.pattern == SETS["llama4"].pattern == harmony["pat_str"]
    ours = {text: 199_998 + i for i, text in enumerate(special.tokens)}
    assert ours.items() <= harmony["special_tokens"].items()
    # All that have a use.
    named = {text for text in harmony["special_tokens"] if "reserved" not in text}
    assert named <= set(special.tokens)


@pytest.mark.parametrize(
    ("name", "ranks", "size", "ids"),
    [
        ("llama3.1", 128_000, 128_256, {"<|eom_id|>": 128_008, "<|python_tag|>": 128_010}),
        ("llama4", 200_000, 201_134, {"<|eot|>": 200_008, "<|finetune_right_pad|>": 200_018}),
        ("gpt-oss", 199_998, 200_019, {"<|return|>": 200_002, "<|endofprompt|>": 200_018}),
    ],
)
def test_a_set_is_asked_for(
    name: str, ranks: int, size: int, ids: dict[str, int], tmp_path: Path
) -> None:
    path = many_ranks(tmp_path, ranks)
    tokenizer = read_tokenizer(f"{name}:{path}", model_max_length=None)
    assert (tokenizer.kind, tokenizer.size, tokenizer.notes) == ("tiktoken", size, ())
    loaded = AutoTokenizer.from_pretrained(write(tokenizer, tmp_path / "model"))
    special = SETS[name]
    assert {text: loaded.convert_tokens_to_ids(text) for text in ids} == ids
    assert loaded.bos_token_id == ranks + special.tokens.index(special.bos)
    assert loaded.pad_token_id == ranks + special.tokens.index(str(special.pad))
    begun = loaded.encode("a")[0] == loaded.bos_token_id
    assert begun == special.begins == (name != "gpt-oss")


def test_none_is_guessed(tmp_path: Path) -> None:
    for ranks, name in ((200_000, "llama4"), (199_998, "gpt-oss")):
        with pytest.raises(TokenizerError, match=f"give {name}:FILE .* or llama3:FILE"):
            choose(None, ranks, "x")
        assert choose(SETS["llama3"], ranks, "x")[0] is SETS["llama3"]
    with pytest.raises(TokenizerError, match="llama4's special tokens come after 200000"):
        choose(SETS["llama4"], 128_000, "x")
    assert "give llama3.1:FILE" in choose(None, 128_000, "x")[1][0]
    small = small_ranks(tmp_path)
    assert "llama4's special tokens come after" in refused(f"llama4:{small}")
    assert read_tokenizer(f"llama3:{small}", model_max_length=None).notes == ()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "names special tokens for tiktoken ranks" in refused(f"llama4:{tmp_path}")
    assert "no such file or directory" in refused("llama4:no/such")


def test_names_are_those_of_the_releases() -> None:
    llama31 = json.dumps(SETS["llama3.1"].tokens)
    assert llama31.count("reserved") == 248 and len(SETS["llama3.1"].tokens) == 256
    assert len(SETS["llama4"].tokens) == 201_134 - 200_000
    assert all(len(set(each.tokens)) == len(each.tokens) for each in SETS.values())
