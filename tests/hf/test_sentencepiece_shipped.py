"""The sentencepiece models that MaxText ships, against sentencepiece itself and in transformers."""

import json
from pathlib import Path

import pytest
import sentencepiece
from spm_lab import apart, lines, texts
from tokenizer_lab import ASSETS, write
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from moeconv.hf.tokenizer import read_tokenizer
from moeconv.verification.levels.tokenizers import _round_trip

# Size, BOS, EOS and padding of each; a large vocabulary takes 10 s.
MODELS = {
    "tokenizer.default": (32768, 1, 2, None),
    "tokenizer.llama2": (32000, 1, 2, None),
    "tokenizer.mistral-v1": (32000, 1, 2, None),
    "tokenizer.mistral-v3": (32768, 1, 2, None),
    "tokenizer.gemma": (256000, 2, 1, 0),
    "tokenizer.gemma3": (262144, 2, 1, 0),
    "tokenizer_gemma4.model": (262144, 2, 1, 0),
}
SLOW = ("tokenizer.gemma", "tokenizer.gemma3", "tokenizer_gemma4.model")


def params(names: object) -> list[object]:
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in names  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("name", params(MODELS))
def test_ids_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    path = ASSETS / name
    tokenizer = read_tokenizer(str(path), model_max_length=64)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (tokenizer.kind, tokenizer.size, *ids) == ("sentencepiece", *MODELS[name])
    assert len(tokenizer.notes) == (name == "tokenizer.default")
    assert apart(tokenizer, path.read_bytes(), [*texts(2500), *lines()]) == []
    assert json.loads(tokenizer.files["tokenizer_config.json"])["model_max_length"] == 64

    folder = write(tokenizer, tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in lines()[:50]:
        wanted = theirs.encode(text)
        assert loaded.encode(text, add_special_tokens=False) == wanted
        # As MaxText's SentencePieceTokenizer.encode with add_bos.
        assert loaded.encode(text) == [theirs.bos_id(), *wanted]
    assert (loaded.bos_token_id, loaded.eos_token_id) == (theirs.bos_id(), theirs.eos_id())
    assert (
        loaded.decode(loaded.encode("Hello, World!"), skip_special_tokens=True) == "Hello, World!"
    )
    assert loaded.convert_tokens_to_ids(loaded.bos_token) == theirs.bos_id()
    assert _round_trip(folder) is None


def test_every_pair_is_normalised_alike() -> None:
    # Behind a letter with a rule of its own, a syllable and a ligature: any character.
    path = ASSETS / "tokenizer.default"
    content = read_tokenizer(str(path), model_max_length=None).files["tokenizer.json"]
    ours = Tokenizer.from_str(content.decode()).normalizer
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    numbers = [*range(1, 0x3400), *range(0xA000, 0xA100), *range(0xF900, 0x10000)]
    for first in ("\uff4b", "\uac00", "\ufb01"):
        pairs = [f"x{first}{chr(n)}y" for n in numbers]
        apart_ = [p for p in pairs if ours.normalize_str(p) != theirs.normalize(p)]
        assert [ascii(pair) for pair in apart_] == []
