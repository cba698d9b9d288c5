"""The embedded corpus and its tokenizer, a small byte-level BPE that transformers 4 and 5 load."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# How settings call both.
EMBEDDED = "embedded"
BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
# MaxText masks every token that equals the pad id, and without a pad token takes id 0 for it.
PAD = "<|pad|>"
VOCAB_SIZE = 1024
# Written by tools/make_corpus.py.
CORPUS = Path(__file__).parent / "corpus" / "stories.txt"


def read_stories() -> list[str]:
    """The stories of the corpus, which empty lines separate."""
    return CORPUS.read_text(encoding="utf-8").strip().split("\n\n")


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learns the merges; encoding puts BOS first, as Llama-3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer; no transformers needed.

    The class is named by hand: transformers 5 would write one that 4.x does not know.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes these files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(tokenizer).items():
        (directory / name).write_bytes(content)
