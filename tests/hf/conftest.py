"""A small tokenizer, saved by transformers."""

from pathlib import Path
from typing import Any

import pytest
from tokenizer_lab import RANKS, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moeconv.hf.tokenizer import TokenizerFiles, read_tokenizer


@pytest.fixture(scope="session")
def llama3() -> TokenizerFiles:
    return read_tokenizer(str(RANKS), model_max_length=2048)


@pytest.fixture(scope="session")
def loaded(llama3: TokenizerFiles, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(write(llama3, tmp_path_factory.mktemp("llama3") / "model"))


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
