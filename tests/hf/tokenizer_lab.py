"""What the tests of tokenizers share: MaxText's assets, ranks, and laying a tokenizer down."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import TokenizerFiles, read_tokenizer

MAXTEXT = Path(importlib.util.find_spec("maxtext").submodule_search_locations[0])

REPOSITORY = Path(__file__).parents[2]

ASSETS = MAXTEXT / "assets" / "tokenizers"

RANKS = ASSETS / "tokenizer_llama3.tiktoken"


def write(tokenizer: TokenizerFiles, directory: Path, model_type: str | None = "mixtral") -> Path:
    """Lays the tokenizer down as convert does, beside the model's config.json."""
    directory.mkdir()
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)
    if model_type is not None:
        config = {"model_type": model_type, "transformers_version": "4.46.0"}
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def refused(spec: object) -> str:
    """The one sentence with which `spec` is refused."""
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(str(spec), model_max_length=None)
    message = str(caught.value)
    assert message.startswith(f"{spec}: ")
    assert "\n" not in message
    return message


def rank_lines(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


BYTES = [bytes([byte]) for byte in range(256)]


def small_ranks(directory: Path, more: tuple[bytes, ...] = (b"ab", b"abc")) -> Path:
    path = directory / "small.tiktoken"
    path.write_bytes(b"\n".join(rank_lines([*BYTES, *more])))
    return path
