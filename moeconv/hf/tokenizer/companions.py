"""The files next to a sentencepiece model or ranks in a slow tokenizer's directory."""

from collections.abc import Mapping
from typing import Any

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer.files import json_object, token_text
from moeconv.hf.tokenizer.parts import added_token, compact, readable

MODEL = "tokenizer.model"
_CONFIG, _TOKENIZER, _ADDED = "tokenizer_config.json", "tokenizer.json", "added_tokens.json"
# Of a tokenizer_config.json; its class and switches are those of a slow tokenizer.
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_USE = ("additional_special_tokens", "chat_template", "model_max_length", "padding_side")


def put_together(
    files: Mapping[str, bytes], made: Mapping[str, bytes], source: str
) -> dict[str, bytes]:
    """The files made of a model, with what the files next to it say of its use.

    Tokens that were added to it are taken over, and so is `add_bos_token: false`. The model itself
    is left out: it may name paths of the machine that trained it.

    Args:
        files: What was found.
        made: The files made of the model or the ranks.
        source: Where they are, for people.

    Raises:
        TokenizerError: A file is damaged, or its added tokens do not follow the model's.
    """
    own = json_object(files, _CONFIG, source)
    config = json_object(made, _CONFIG, source)
    config |= {name: own[name] for name in _USE if own.get(name) is not None}
    config |= {name: token_text(own[name], name, source) for name in _NAMES if own.get(name)}
    left = {name: raw for name, raw in files.items() if name not in (MODEL, _ADDED)}
    names = {name: config[name] for name in _NAMES if name in config}
    found: dict[str, bytes] = {
        **{**left, **made},
        _CONFIG: readable(config),
        "special_tokens_map.json": readable(names),
    }
    if not own and _ADDED not in files:
        return found
    content = json_object(made, _TOKENIZER, source)
    added = _added(content, own, json_object(files, _ADDED, source), source)
    if added or own.get("add_bos_token") is False:
        begin = None if own.get("add_bos_token") is False else content["post_processor"]
        tokens = [*content["added_tokens"], *added]
        found[_TOKENIZER] = compact({**content, "added_tokens": tokens, "post_processor": begin})
    return found


def _added(
    content: Mapping[str, Any], config: Mapping[str, Any], map_: Mapping[str, Any], source: str
) -> list[dict[str, Any]]:
    """Entries of `tokenizer.json` for tokens past its own."""
    size = 1 + max(
        [len(content["model"]["vocab"]) - 1, *(t["id"] for t in content["added_tokens"])]
    )
    try:
        entries = {
            number: added_token(number, text) for text, number in map_.items() if number >= size
        }
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            if int(number) >= size:
                entry = added_token(int(number), token["content"])
                flags = {
                    name: bool(token[name]) for name in entry.keys() & token.keys() - {"content"}
                }
                entries[int(number)] = {**entry, **flags}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise TokenizerError(
            f"{source}: a token of {_ADDED} or of {_CONFIG} (added_tokens_decoder) lacks its "
            "content or id; save the tokenizer again"
        ) from None
    if sorted(entries) != list(range(size, size + len(entries))):
        raise TokenizerError(
            f"{source}: the ids of its added tokens ({_ADDED}, {_CONFIG}) do not follow the "
            f"model's, which end with {size - 1}; save it as a fast tokenizer, and give that"
        )
    return [entries[number] for number in sorted(entries)]
