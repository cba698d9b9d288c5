"""What the tests of prepared data share: stories, and reading what was written."""

import gzip
import json

import numpy as np
from moeconv_train.data.records import read_shard
from moeconv_train.tokenizer import read_stories

STORIES = read_stories()


def jsonl(path, stories, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({field: story}) + "\n" for story in stories)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def texts_of(dataset, split="train"):
    """The stories of a packed split, decoded again."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(dataset.directory / "tokenizer" / "tokenizer.json"))
    found = []
    for shard in dataset.shards(split):
        for row in read_shard(shard):
            for piece in np.split(row["tokens"], np.cumsum(row["lengths"])[:-1]):
                assert (piece[0], piece[-1]) == (0, 1)  # BOS and EOS of the tiny tokenizer
                found.append(tokenizer.decode(piece[1:-1], skip_special_tokens=False))
    return found


def files_of(directory):
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
