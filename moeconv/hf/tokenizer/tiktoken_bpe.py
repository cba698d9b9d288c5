"""Tiktoken ranks, as MaxText trains on them, written as a Hugging Face tokenizer in pure Python.

The result is what transformers' `TikTokenConverter` makes of the same ranks and special tokens.
"""

import base64
import binascii
import re
from typing import Any

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer.parts import added_token, begin_with, compact, config_files, merges
from moeconv.hf.tokenizer.special_sets import SpecialTokens

_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2}[ \t]+[0-9]{1,9}\s*")


def is_ranks(data: bytes) -> bool:
    """Returns True if a file's first line is `<base64> <rank>`."""
    head = data.lstrip()[:4096].splitlines()
    return bool(head) and _RANK_LINE.fullmatch(head[0]) is not None


def parse_ranks(data: bytes, source: str) -> list[bytes]:
    """Reads a ranks file.

    Args:
        data: The file: a token in base64, a space and its rank on each line, in any order.
        source: What to call the file in an error.

    Returns:
        The tokens in the order of their ranks.

    Raises:
        TokenizerError: A line is no rank, or the ranks are not 0 to N-1, or a byte has none.
    """
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        if _RANK_LINE.fullmatch(line) is None:
            raise TokenizerError(
                f"{source}: line {number} is not a base64 token and its rank; fetch the file again"
            )
        token, rank = line.split()
        try:
            decoded = base64.b64decode(token, validate=True)
        except binascii.Error as error:
            raise TokenizerError(
                f"{source}: the token of line {number} is not base64 ({error}); "
                "fetch the file again"
            ) from None
        if int(rank) in ranks:
            raise TokenizerError(
                f"{source}: line {number} gives rank {int(rank)} a second time; "
                "fetch the file again"
            )
        ranks[int(rank)] = decoded
    tokens = [ranks[rank] for rank in sorted(ranks)]
    if max(ranks, default=-1) != len(tokens) - 1:
        missing = next(rank for rank in range(len(tokens)) if rank not in ranks)
        raise TokenizerError(
            f"{source}: no token has rank {missing}, though ranks go up to {max(ranks)}; "
            "fetch the file again"
        )
    known = set(tokens)
    if len(known) != len(tokens):
        raise TokenizerError(f"{source}: a token has two ranks; fetch the file again")
    lacking = [byte for byte in range(256) if bytes([byte]) not in known]
    if lacking:
        raise TokenizerError(
            f"{source}: {len(lacking)} of the 256 single bytes have no rank (0x{lacking[0]:02x} "
            "first), so not every text can be encoded; fetch the file again"
        )
    return tokens


def tokenizer_files(
    tokens: list[bytes], special: SpecialTokens, *, model_max_length: int | None
) -> dict[str, bytes]:
    """Builds the tokenizer of `tokens` (in the order of their ranks) and the special ones.

    Args:
        tokens: What `parse_ranks` returned.
        special: What comes after them.
        model_max_length: The context length to write into `tokenizer_config.json`, if known.

    Returns:
        File names and contents; the same tokens give the same bytes.
    """
    names = {"bos_token": special.bos, "eos_token": special.eos}
    if special.pad is not None:
        names["pad_token"] = special.pad
    return {
        "tokenizer.json": compact(_tokenizer(tokens, special)),
        **config_files(names, model_max_length),
    }


def _tokenizer(tokens: list[bytes], special: SpecialTokens) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    first = len(tokens)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    bos = begin_with(special.bos, first + special.tokens.index(special.bos))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(first + i, name) for i, name in enumerate(special.tokens)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": special.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {**byte_level, "use_regex": True},
                *([bos] if special.begins else []),
            ],
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken looks a whole piece up before it merges.
            "ignore_merges": True,
            "vocab": {_spelled(token): rank for rank, token in enumerate(tokens)},
            "merges": _merges(tokens),
        },
    }


def _merges(tokens: list[bytes]) -> list[str] | list[list[str]]:
    """Every split of every token into two tokens, the lower ranks first: BPE's merges in order."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs: list[tuple[bytes, bytes]] = []
    for token in tokens:
        splits = [
            (ranks[left], ranks[right])
            for left, right in ((token[:i], token[i:]) for i in range(1, len(token)))
            if left in ranks and right in ranks
        ]
        pairs += [(tokens[left], tokens[right]) for left, right in sorted(splits)]
    return merges([(_spelled(left), _spelled(right)) for left, right in pairs])


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, others move past 255."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {b: chr(256 + i) for i, b in enumerate(moved)}


_LETTERS = _byte_letters()


def _spelled(token: bytes) -> str:
    # latin-1 gives each byte the code point of its value, which translate then maps.
    return token.decode("latin-1").translate(_LETTERS)
