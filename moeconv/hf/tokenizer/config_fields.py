"""The fields of `tokenizer_config.json` that transformers passes to a tokenizer's constructor.

Values of the wrong kind end in a traceback there (`PreTrainedTokenizerBase.__init__` and
`_from_pretrained`, tokenization_utils_base.py; `TokenizersBackend.__init__`,
tokenization_utils_tokenizers.py), some of them only when a text is tokenized or a chat is rendered.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moeconv.errors import TokenizerError
from moeconv.untrusted.text import printable

TOKENIZER_CONFIG = "tokenizer_config.json"
# In the order in which transformers gives ids to those that the vocabulary lacks.
NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
ADDITIONAL, EXTRA = "additional_special_tokens", "extra_special_tokens"
_OWN = "model_specific_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# From here on a length is no limit (tokenization_utils_base.py `LARGE_INTEGER`).
_NO_LIMIT = 10**20
# What a constructor would take instead of the files that are copied: other files, positional
# arguments, and objects that JSON cannot hold.
_REPLACING = (
    "fast_tokenizer_files",
    "gguf_file",
    "init_inputs",
    "merges_file",
    "post_processor",
    "special_tokens_map_file",
    "tokenizer_file",
    "tokenizer_object",
    "tokenizer_padding",
    "tokenizer_truncation",
    "vocab_file",
)


def _is_side(value: object) -> bool:
    return value in ("left", "right")


def _is_length(value: object) -> bool:
    if isinstance(value, float):
        return _NO_LIMIT <= value < float("inf")
    return type(value) is int and value > 0


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_template(value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(isinstance(text, str) for text in value.values())
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(each, dict)
            and isinstance(each.get("name"), str)
            and isinstance(each.get("template"), str)
            for each in value
        )
    return isinstance(value, str)


_Kind = tuple[Callable[[object], bool], str]
_SIDE: _Kind = _is_side, "left or right"
_LENGTH: _Kind = _is_length, "a whole number from 1"
_TEXTS: _Kind = _are_texts, "a list of texts"
_SWITCH: _Kind = _is_bool, "true or false"
_KINDS: Mapping[str, _Kind] = {
    "padding_side": _SIDE,
    "truncation_side": _SIDE,
    "model_max_length": _LENGTH,
    "max_len": _LENGTH,
    "model_input_names": _TEXTS,
    "chat_control_tokens": _TEXTS,
    "clean_up_tokenization_spaces": _SWITCH,
    "split_special_tokens": _SWITCH,
    "tokenizer_class": (_is_text, "the name of a class"),
    "chat_template": (
        _is_template,
        "a template's text, or a list of templates, each with name and template",
    ),
    "added_tokens_decoder": (lambda value: isinstance(value, dict), "tokens by their ids"),
    ADDITIONAL: (lambda value: isinstance(value, list), "a list of tokens"),
    EXTRA: (lambda value: isinstance(value, list | dict), "a list of tokens, or tokens by name"),
    _OWN: (lambda value: isinstance(value, dict), "tokens by name"),
}


def checked(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The fields that transformers can use.

    A `null` is left out: it means the default, which transformers does not take everywhere.

    Args:
        config: The file's object.
        source: Where the tokenizer is, for people.

    Returns:
        The fields, and a note on those left out.

    Raises:
        TokenizerError: A field has a value that transformers cannot use, or asks for code.
    """
    found = {name: value for name, value in config.items() if value is not None}
    if "auto_map" in found:
        raise TokenizerError(
            f"{source}: {TOKENIZER_CONFIG}: auto_map asks for Python code of the tokenizer's own, "
            "which is not copied; save the tokenizer as a PreTrainedTokenizerFast"
        )
    for name, (fits, wanted) in _KINDS.items():
        if name in found and not fits(found[name]):
            raise _wrong(source, name, found[name], wanted)
    left = [name for name in _REPLACING if name in found]
    for name in left:
        del found[name]
    for name, value in found.items():
        if name in (*NAMED, ADDITIONAL, EXTRA, _OWN):
            found[name] = _typed(name, value, source)
    for token in (found.get("added_tokens_decoder") or {}).values():
        _demand_flags("added_tokens_decoder", token, source)
    if not left:
        return found, []
    return found, [
        f"{source}: {TOKENIZER_CONFIG}: left out, as it would be read instead of the files here: "
        f"{', '.join(left)}"
    ]


def more_tokens(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Special tokens with names of a model's own, which transformers 5 adds on loading.

    Sources: `_from_pretrained` and `__init__`: every field `…_token` that is a text, and
    `extra_special_tokens` and `model_specific_special_tokens` where they are objects.
    """
    for name, value in config.items():
        if name.endswith("_token") and name not in NAMED and isinstance(value, str):
            yield name, value
    for field in (EXTRA, _OWN):
        named = config.get(field)
        if isinstance(named, dict):
            yield from ((f"{field}.{name}", token) for name, token in named.items())


def _typed(name: str, value: Any, source: str) -> Any:
    """A token, or several, without those that are `null`."""
    if isinstance(value, list):
        return [_token(name, each, source) for each in value if each is not None]
    if isinstance(value, dict) and name in (EXTRA, _OWN):
        named = {each: token for each, token in value.items() if token is not None}
        return {each: _token(each, token, source) for each, token in named.items()}
    return _token(name, value, source)


def _token(name: str, token: Any, source: str) -> Any:
    """A token that is an object, marked as such: transformers 5 takes no other in this file."""
    if not (isinstance(token, dict) and "content" in token):
        return token
    _demand_flags(name, token, source)
    return {"__type": "AddedToken", **token}


def _demand_flags(name: str, token: Any, source: str) -> None:
    for flag in _FLAGS if isinstance(token, dict) else ():
        if not isinstance(token.get(flag, True), bool):
            raise _wrong(source, f"{name}: {flag}", token[flag], "true or false")


def _wrong(source: str, name: str, value: object, wanted: str) -> TokenizerError:
    return TokenizerError(
        f"{source}: {TOKENIZER_CONFIG}: {name} is {printable(repr(value))[:60]}, not {wanted}; "
        "correct the file, or save the tokenizer again"
    )
