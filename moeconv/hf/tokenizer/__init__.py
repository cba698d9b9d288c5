"""The tokenizer that goes with the converted weights: reading one, and checking that it fits."""

from moeconv.hf.tokenizer.files import TOKENIZER_FILES, TokenizerFiles, check_fits
from moeconv.hf.tokenizer.source import read_files, read_tokenizer, tokenizer_of
from moeconv.hf.tokenizer.special_sets import asked_set
from moeconv.hf.tokenizer.templates import FOLDER as TEMPLATES_FOLDER

__all__ = [
    "TEMPLATES_FOLDER",
    "TOKENIZER_FILES",
    "TokenizerFiles",
    "asked_set",
    "check_fits",
    "read_files",
    "read_tokenizer",
    "tokenizer_of",
]
