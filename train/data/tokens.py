"""Texts to token ids, `BOS text EOS`, with the tokenizer that goes into the data's directory."""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from moeconv_train.data.manifest import TokenizerRecord
from moeconv_train.tokenizer import EMBEDDED
from moeconv_train.tokenizer import TOKENIZER as EMBEDDED_TOKENIZER
from tokenizers import Tokenizer

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import read_tokenizer

LLAMA3 = "llama3"
# Ships with maxtext; the digest is of the file that Meta published and 0.2.5 holds.
_LLAMA3_RANKS = ("assets", "tokenizers", "tokenizer_llama3.tiktoken")
_LLAMA3_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
# Texts a call: enough to amortise it, few enough that their encodings stay small.
_BATCH = 2048


@dataclass(frozen=True)
class DataTokenizer:
    """A tokenizer as data is prepared with it."""

    record: TokenizerRecord
    files: Mapping[str, bytes]  # what is written into the data's directory
    notes: tuple[str, ...] = ()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as `BOS … EOS`, int32; on all processors."""
        bos, eos = self.record.bos_token_id, self.record.eos_token_id
        stories = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                stories.append(np.array([bos, *encoding.ids, eos], np.int32))
        return stories

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_buffer(self.files["tokenizer.json"])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # `<|end_of_text|>` in a text is text, as for MaxText (tokenizer.py, `encode`).
        tokenizer.encode_special_tokens = True
        return tokenizer


def load(spec: str) -> DataTokenizer:
    """Reads the tokenizer that `--tokenizer` names.

    Args:
        spec: `llama3` (offline, from the ranks file that ships with maxtext), `embedded` (that of
            the embedded corpus), a directory with a `tokenizer.json`, a file of tiktoken ranks, or
            a repository on the Hub.

    Raises:
        TokenizerError: It cannot be read, or names no BOS or EOS.
    """
    place = spec
    if spec in (EMBEDDED, LLAMA3):
        place = str(EMBEDDED_TOKENIZER) if spec == EMBEDDED else f"llama3:{_llama3()}"
    read = read_tokenizer(place, model_max_length=None)
    bos, eos = read.bos_token_id, read.eos_token_id
    if bos is None or eos is None:
        missing = [name for name, id in (("bos_token", bos), ("eos_token", eos)) if id is None]
        raise TokenizerError(
            f"{spec}: tokenizer_config.json names no {' and no '.join(missing)}; stories are "
            "written as BOS story EOS, so add it"
        )
    record = TokenizerRecord(
        source=Path(spec).name if Path(spec).exists() else spec,  # no path of this machine
        digest=hashlib.sha256(read.files["tokenizer.json"]).hexdigest(),
        size=read.size,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=read.pad_token_id or 0,  # as MaxText's; our rows are not masked by it
    )
    return DataTokenizer(record, read.files, read.notes)


def _llama3() -> Path:
    found = importlib.util.find_spec("maxtext")
    for place in (found and found.submodule_search_locations) or ():
        path = Path(place, *_LLAMA3_RANKS)
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _LLAMA3_SHA256:
            return path
    raise TokenizerError(
        'llama3: its ranks ship with maxtext 0.2.5, which is not installed: pip install "moeconv'
        '[train]", or give a directory with a tokenizer.json'
    )
