"""The embedded corpus, and its rows as stock MaxText reads them, for benchmarks of its own loop.

One story a row, `BOS story EOS`; MaxText pads the rows. `moeconv train` packs them (feed.py).
"""

from dataclasses import dataclass
from pathlib import Path

from moeconv_train.data.records import TEXT, write_shard
from moeconv_train.make_corpus import CORPUS
from moeconv_train.tokenizer import EOS, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Dataset:
    """Where the prepared corpus lies, as MaxText's config keys want it."""

    tokenizer: Path
    train: Path

    def overrides(self) -> dict[str, str]:
        """The MaxText settings that select this dataset."""
        return {
            "tokenizer_type": "huggingface",
            "tokenizer_path": str(self.tokenizer),
            "grain_train_files": str(self.train),
        }


def read_stories(path: Path = CORPUS) -> list[str]:
    """The stories of a corpus file, which empty lines separate."""
    return path.read_text(encoding="utf-8").strip().split("\n\n")


def tokenise(stories: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Each story as `BOS story EOS`."""
    eos = tokenizer.token_to_id(EOS)
    assert eos is not None  # `train_tokenizer` made it
    return [[*encoding.ids, eos] for encoding in tokenizer.encode_batch(stories)]


def prepare(directory: Path) -> Dataset:
    """Trains the tokenizer on the embedded corpus and writes both into `directory`."""
    dataset = Dataset(directory / "tokenizer", directory / "stories.array_record")
    stories = read_stories()
    tokenizer = train_tokenizer(stories)
    save_tokenizer(tokenizer, dataset.tokenizer)
    write_shard(dataset.train, [{TEXT: row} for row in tokenise(stories, tokenizer)])
    return dataset
