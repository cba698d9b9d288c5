"""Small sentencepiece models with every option of the trainer, against sentencepiece itself."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import synthetic
from cli_runner import moeconv
from sentencepiece import sentencepiece_model_pb2 as messages
from spm_lab import apart, texts, train, written
from tokenizer_lab import refused, write
from transformers import AutoTokenizer

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import read_tokenizer
from moeconv.hf.tokenizer.sentencepiece import Algorithm, is_sentencepiece, read_model
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status
from moeconv.verification.levels.tokenizers import check_tokenizer

SYMBOLS = ["<sep>", "ab", "[x]"]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
BYTES = {"byte_fallback": True, "vocab_size": 700}
EXACT = {
    "bytes": BYTES,
    "identity": PLAIN,
    "no prefix": {"add_dummy_prefix": False, **PLAIN},
    "nothing named": {"bos_id": -1, "eos_id": -1},
    "padding": {"pad_id": 3},
    "across words": {"split_by_whitespace": False, "split_digits": True, **PLAIN},
    "runs of spaces": {"allow_whitespace_only_pieces": True, **PLAIN},
    "symbols": {
        "user_defined_symbols": [*SYMBOLS, "▁▁", "\n"],
        "control_symbols": ["<ctl>"],
        "add_dummy_prefix": False,
        **PLAIN,
        **BYTES,
    },
}
WITH_SYMBOLS = ["x<sep>y", "<sep>x", "abab c[x]", "[x[x]", "a\n\nb  c", "x <sep> ", "aab"]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [*texts(700, seed=1), *WITH_SYMBOLS]


@pytest.mark.parametrize("name", EXACT)
def test_bpe(name: str, corpus: list[str], tmp_path: Path) -> None:
    raw = train(model_type="bpe", **EXACT[name])
    tokenizer = written(raw, tmp_path)
    assert tokenizer.notes == ()
    assert apart(tokenizer, raw, corpus) == []


@pytest.mark.parametrize("rules", ["nmt_nfkc", "nfkc_cf"])
def test_normalisation(rules: str, corpus: list[str], tmp_path: Path) -> None:
    raw = train(model_type="bpe", normalization_rule_name=rules)
    tokenizer = written(raw, tmp_path)
    assert bool(tokenizer.notes) == rules.endswith("cf")  # iotas below, which `texts` puts nowhere
    corpus = [text for text in corpus if rules == "nmt_nfkc" or "\u0345" not in text]
    assert apart(tokenizer, raw, corpus) == []


@pytest.mark.parametrize(
    "options",
    [PLAIN, {**BYTES, **PLAIN}, {"user_defined_symbols": SYMBOLS, "control_symbols": ["<ctl>"]}],
)
def test_unigram(options: dict[str, Any], corpus: list[str], tmp_path: Path) -> None:
    raw = train(**options)
    tokenizer = written(raw, tmp_path)
    assert "two ways to split it are equally likely" in tokenizer.notes[0]
    # Where sentencepiece's sums in float32 decide between equal ways: runs of the same character.
    found = apart(tokenizer, raw, corpus)
    assert len(found) <= 2
    assert all(sorted(ours) == sorted(theirs) for _, ours, theirs in found)


def test_prefix_and_symbols(corpus: list[str], tmp_path: Path) -> None:
    raw = train(model_type="bpe", user_defined_symbols=SYMBOLS)
    tokenizer = written(raw, tmp_path)
    assert "nothing but one user-defined symbol" in tokenizer.notes[0]
    assert apart(tokenizer, raw, corpus) == []
    assert apart(tokenizer, raw, ["<sep>"]) == [("<sep>", ["<sep>"], ["▁", "<sep>"])]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "char"}, "its model_type is char"),
        ({"model_type": "word"}, "its model_type is word"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is set"),
        ({"user_defined_symbols": ["ＡＢ"]}, "changes its user-defined symbol 'ＡＢ'"),
    ],
)
def test_what_cannot_be_held_is_refused(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(train(**options))
    message = refused(tmp_path / "m")
    assert "cannot be written as a tokenizer.json with the same ids" in message
    assert why in message


def changed(raw: bytes, change: Any) -> bytes:
    model = messages.ModelProto()
    model.ParseFromString(raw)
    change(model)
    return bytes(model.SerializeToString())


def tie(model: Any) -> None:
    pieces = [piece for piece in model.pieces if piece.type == 1 and len(piece.piece) > 1]
    pieces[1].score = pieces[0].score


def unused(model: Any) -> None:
    model.pieces[20].type = 5


def lone(model: Any) -> None:
    model.pieces.add(piece="e\u4e00", score=-1000)


def spaces(model: Any) -> None:
    model.normalizer_spec.escape_whitespaces = False


def twice(model: Any) -> None:
    model.pieces[20].piece = model.pieces[21].piece


def endless(model: Any) -> None:
    model.pieces[20].score = float("inf")


def rules(model: Any) -> None:
    model.normalizer_spec.precompiled_charsmap = b"\0\0\0"


def own_rule(model: Any) -> None:
    own = sentencepiece_rules("ae\tä")
    model.normalizer_spec.precompiled_charsmap = own


def sentencepiece_rules(line: str) -> bytes:
    """Compiled rules of one line `FROM TO`, as code points."""
    left, right = line.split("\t")
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as file:
        file.write(" ".join(f"{ord(c):X}" for c in left) + "\t" + f"{ord(right):X}\n")
        file.flush()
        model = messages.ModelProto()
        model.ParseFromString(train(normalization_rule_tsv=file.name))
    return bytes(model.normalizer_spec.precompiled_charsmap)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (tie, "have the same score"),
        (unused, "is marked as unused"),
        (lone, "'一' of its piece 'e一' is no piece itself"),
        (spaces, "escape_whitespaces is not set"),
        (twice, "two pieces have the same text"),
        (endless, "the score of"),
        (rules, "its normalisation rules end too early"),
        (own_rule, "its normalisation rules make 'ä' of 'ae'"),
    ],
)
def test_models_that_were_changed(change: Any, why: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(changed(train(model_type="bpe"), change))
    assert why in refused(tmp_path / "m")


def test_runs_of_equal_score(tmp_path: Path) -> None:
    # As Llama 2's: spaces are merged last, and sentencepiece takes the leftmost.
    base = train(model_type="bpe", **PLAIN)

    def runs(*lengths: int) -> bytes:
        def change(model: Any) -> None:
            kept = [p for p in model.pieces if "▁▁" not in p.piece]
            del model.pieces[:]
            model.pieces.extend(kept)
            for length in lengths:
                model.pieces.add(piece="▁" * length, score=-1e9)

        return changed(base, change)

    corpus = [f"{a}{' ' * n}{b}" for n in range(70) for a, b in (("", ""), ("a", "b"), ("", "the"))]
    raw = runs(2, 4, 8, 3, 5, 6, 7)
    assert apart(written(raw, tmp_path), raw, corpus) == []
    (tmp_path / "m").write_bytes(runs(2, 3, 5))
    assert "the runs of '▁' do not follow from an order of merges" in refused(tmp_path / "m")


def test_the_reader_reads_what_protobuf_reads() -> None:
    raw = train(model_type="bpe", pad_id=3, pad_piece="[p]", bos_piece="[b]", **BYTES)
    model, proto = read_model(raw, "x"), messages.ModelProto()
    proto.ParseFromString(raw)
    assert [(p.text, p.score, p.kind) for p in model.pieces] == [
        (p.piece, p.score, p.type) for p in proto.pieces
    ]
    assert model.algorithm is Algorithm.BPE
    assert model.byte_fallback
    assert model.charsmap == proto.normalizer_spec.precompiled_charsmap
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)
    ids = {name: number for name, (number, _) in model.named.items()}
    assert ids == {
        "unk": theirs.unk_id(),
        "bos": theirs.bos_id(),
        "eos": theirs.eos_id(),
        "pad": theirs.pad_id(),
    }


def test_what_is_told_apart() -> None:
    piece = b"\x0a\x08\x0a\x01a\x15\0\0\0\0"
    assert is_sentencepiece(piece)
    assert is_sentencepiece(b"\x1a\x02\x20\x00" + piece)  # as Gemma 4's
    assert is_sentencepiece((b"\x1a\xff\xff\x03" + bytes(5000))[:4096])  # long rules first
    for other in (b"", b"\n", b"\n\nx", b'"quoted"', b"IQ== 0", b"\x12\x05ab", b"\x1a\xff"):
        assert not is_sentencepiece(other)


def test_damage_is_one_sentence_or_nothing() -> None:
    raw, draw = train(model_type="bpe", vocab_size=300, **PLAIN), random.Random(0)
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        cut = bytes(damaged[: draw.randrange(1, len(damaged) + 1)])
        try:
            read_model(cut, "x")
        except TokenizerError as error:
            assert "is no sentencepiece model that can be read" in str(error)


def test_a_slow_tokenizers_directory(tmp_path: Path) -> None:
    raw = train(model_type="bpe", **PLAIN)
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(raw)
    size = sentencepiece.SentencePieceProcessor(model_proto=raw).get_piece_size()
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "pad_token": "<pad>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "normalized": True},
        "added_tokens_decoder": {
            "1": {"content": "<s>", "normalized": True, "special": True},
            str(size): {"content": "<|im_end|>", "special": True, "normalized": False},
        },
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<pad>": size + 1}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = read_tokenizer(str(folder), model_max_length=None)
    assert (tokenizer.size, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        size + 2,
        size,
        size + 1,
    )
    assert "tokenizer.model" not in tokenizer.files
    loaded = AutoTokenizer.from_pretrained(write(tokenizer, tmp_path / "model"))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)
    assert loaded.encode("hello world") == theirs.encode("hello world")
    assert loaded.encode("a<|im_end|>", add_special_tokens=False)[-1] == size
    assert (len(loaded), loaded.padding_side) == (size + 2, "left")
    assert loaded.chat_template == "{{ messages }}"
    (folder / "added_tokens.json").write_text(json.dumps({"<far>": size + 9}))
    assert "do not follow the model's" in refused(folder)


def test_a_model_is_converted_and_verified_with_it(tmp_path: Path) -> None:
    (tmp_path / "my.model").write_bytes(train(vocab_size=300))
    made = synthetic.write(tmp_path / "run", "mixtral", sizes={"V": 320})
    out = tmp_path / "out"
    options = ("--config", made.config_file(), "--tokenizer", tmp_path / "my.model")
    ran = moeconv("convert", made.run, out, *options)
    assert ran.code == 0, ran.error
    assert "may give others for a text where two ways to split it" in ran.err
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    assert not (out / "tokenizer.model").exists()
    assert check_tokenizer(Candidate.open(out)).status is Status.PASS
