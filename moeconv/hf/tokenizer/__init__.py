"""The tokenizer that goes with the converted weights: reading one, and checking that it fits."""

from moeconv.hf.tokenizer.files import TOKENIZER_FILES, TokenizerFiles, check_fits
from moeconv.hf.tokenizer.source import left_out, read_files, read_tokenizer, tokenizer_of
from moeconv.hf.tokenizer.special_sets import asked_set

__all__ = [
    "TOKENIZER_FILES",
    "TokenizerFiles",
    "asked_set",
    "check_fits",
    "left_out",
    "read_files",
    "read_tokenizer",
    "tokenizer_of",
]
