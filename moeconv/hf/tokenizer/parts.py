"""What the files of several kinds of tokenizer have in common."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def compact(value: Any) -> bytes:
    """JSON in one line, as a large `tokenizer.json` is written."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def readable(value: Any) -> bytes:
    """JSON for people, names sorted."""
    return (json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


def config_files(names: Mapping[str, str], model_max_length: int | None) -> dict[str, bytes]:
    """The files that say how transformers uses a `tokenizer.json`.

    Args:
        names: The text of `bos_token` and its like.
        model_max_length: The context length to write, if known.
    """
    config: dict[str, Any] = {
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",  # transformers' default, right, is wrong for generation in batches
        # transformers 5 would write TokenizersBackend, which transformers 4 does not know; the
        # class that a model's type stands for may change how a text is split.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    return {
        "tokenizer_config.json": readable(config),
        "special_tokens_map.json": readable(names),
    }


def added_token(number: int, content: str, *, special: bool = True) -> dict[str, Any]:
    """A token that is sought in a text before it is split.

    One that is not special is sought in the normalised text.
    """
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not special,
        "special": special,
    }


def begin_with(token: str, number: int) -> dict[str, Any]:
    """The post-processor that puts a token before each text, as MaxText does with BOS."""
    first, second = ({"SpecialToken": {"id": token, "type_id": kind}} for kind in (0, 1))
    text, other = (
        {"Sequence": {"id": letter, "type_id": kind}} for kind, letter in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def merges(pairs: Sequence[tuple[str, str]]) -> list[str] | list[list[str]]:
    """BPE's merges in order; no token holds a space.

    A string a merge is what every release of `tokenizers` reads (pairs need 0.20), but one that
    starts with "#version" would be read as a comment.
    """
    if any(left.startswith("#version") for left, _ in pairs):
        return [[left, right] for left, right in pairs]
    return [f"{left} {right}" for left, right in pairs]
