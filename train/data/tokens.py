"""Texts to token ids, `BOS text EOS`, with the tokenizer that goes into the data's directory."""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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

    source: str  # what was asked for
    files: Mapping[str, bytes]  # what is written into the data's directory
    size: int  # rows that the model's embedding needs
    bos: int
    eos: int
    pad: int  # 0 where there is none, as for MaxText; our rows are not masked by it
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over `tokenizer.json`, the file that decides every id."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()


def load(spec: str) -> DataTokenizer:
    """Reads the tokenizer that `--tokenizer` names.

    Args:
        spec: `llama3` (offline, from the ranks file that ships with maxtext), a directory with a
            `tokenizer.json`, a file of tiktoken ranks, or a repository on the Hub.

    Raises:
        TokenizerError: It cannot be read, or names no BOS or EOS.
    """
    read = read_tokenizer(str(_llama3()) if spec == LLAMA3 else spec, model_max_length=None)
    bos, eos = read.bos_token_id, read.eos_token_id
    if bos is None or eos is None:
        missing = [name for name, id in (("bos_token", bos), ("eos_token", eos)) if id is None]
        raise TokenizerError(
            f"{spec}: tokenizer_config.json names no {' and no '.join(missing)}; stories are "
            "written as BOS story EOS, so add it"
        )
    return DataTokenizer(spec, read.files, read.size, bos, eos, read.pad_token_id or 0, read.notes)


class Encoder:
    """A tokenizer at work."""

    def __init__(self, tokenizer: DataTokenizer) -> None:
        self._tokenizer = Tokenizer.from_buffer(tokenizer.files["tokenizer.json"])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # `<|end_of_text|>` in a text is text, as for MaxText (tokenizer.py, `encode`).
        self._tokenizer.encode_special_tokens = True
        self._bos, self._eos = tokenizer.bos, tokenizer.eos

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as `BOS … EOS`, int32."""
        stories = []
        for start in range(0, len(texts), _BATCH):
            batch = list(texts[start : start + _BATCH])
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                stories.append(np.array([self._bos, *encoding.ids, self._eos], np.int32))
        return stories


def _llama3() -> Path:
    found = importlib.util.find_spec("maxtext")
    places = found.submodule_search_locations if found else None
    if not places:
        raise TokenizerError(
            'llama3: its ranks ship with maxtext, which is not installed: pip install "moeconv'
            '[train]", or give a directory with a tokenizer.json'
        )
    path = Path(next(iter(places)), *_LLAMA3_RANKS)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _LLAMA3_SHA256:
        raise TokenizerError(
            "llama3: the installed maxtext does not hold the ranks file of 0.2.5; "
            "install maxtext==0.2.5, or give a directory with a tokenizer.json"
        )
    return path
