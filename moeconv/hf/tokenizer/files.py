"""The files of a tokenizer: what they define, what is mended in them, and whether they fit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer.config_fields import (
    ADDITIONAL,
    EXTRA,
    NAMED,
    TOKENIZER_CONFIG,
    checked,
    more_tokens,
)
from moeconv.hf.tokenizer.generation import GENERATION_CONFIG, TOKEN_IDS, read_generation
from moeconv.hf.tokenizer.templates import put_into
from moeconv.untrusted import strict_json

# All that transformers reads a tokenizer from; nothing else is ever copied.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)

# JSON that is written as it was read, and not looked at otherwise.
_COPIED = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "vocab.json")

Kind = Literal["directory", "tiktoken", "sentencepiece", "hub"]


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as it is to be written, and what the model must have for it.

    Attributes:
        files: Name and content of each file.
        source: What was read, as the user said it.
        kind: How it was read: a directory (or a `tokenizer.json`), tiktoken ranks, a sentencepiece
            model, or the Hub.
        size: One more than the highest id of any token: the rows that the embedding needs.
        bos_token_id: Id of the token that begins a text, where the tokenizer names one.
        eos_token_id: Id of the token that ends a text, where the tokenizer names one.
        pad_token_id: Id of the padding token, where the tokenizer names one.
        generation: What its own generation_config.json says of token ids and sampling, see
            `read_generation`.
        notes: What in the files differs from the source and why, a sentence each.
    """

    files: Mapping[str, bytes]
    source: str
    kind: Kind
    size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def token_ids(self) -> dict[str, Any]:
        """The ids that the model is to have, several as a tuple; generation_config.json wins."""
        own = {name: getattr(self, name) for name in TOKEN_IDS}
        own |= {name: self.generation[name] for name in TOKEN_IDS if name in self.generation}
        return {name: value for name, value in own.items() if value is not None}


def check_fits(tokenizer: TokenizerFiles, vocab_size: int) -> list[str]:
    """Checks that every token has a row in the model's embedding.

    MaxText trains on without one: an id past the table reads its last row, and as a target it
    gives no loss, so a model whose BOS and EOS are past its table has learned neither.

    Args:
        tokenizer: The tokenizer to write.
        vocab_size: Rows of the model's embedding.

    Returns:
        Warnings, a sentence each.

    Raises:
        TokenizerError: Some id has no row.
    """
    source, size = tokenizer.source, tokenizer.size
    named = {
        "BOS": tokenizer.bos_token_id,
        "EOS": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
    }
    if size > vocab_size:
        past = f"id {vocab_size}" if size == vocab_size + 1 else f"ids {vocab_size} to {size - 1}"
        lost = [f"{name} {i}" for name, i in named.items() if i is not None and i >= vocab_size]
        among = f" (among them {', '.join(lost)})" if lost else ""
        raise TokenizerError(
            f"{source}: no row in the model for {past}{among}, as its vocab_size is {vocab_size}; "
            f"train with vocab_size: {size}, or give the tokenizer that the model was trained with"
        )
    for name, ids in tokenizer.token_ids().items():
        if past_ids := [i for i in ([ids] if isinstance(ids, int) else ids) if i >= vocab_size]:
            raise TokenizerError(
                f"{source}: {GENERATION_CONFIG}: {name} {past_ids[0]} has no row in the model, as "
                f"its vocab_size is {vocab_size}; correct the file, or give another tokenizer"
            )
    warnings = []
    if vocab_size > 1.1 * size:
        warnings.append(
            f"{source} has {size} ids and the model {vocab_size} rows: the last "
            f"{vocab_size - size} would be padding; is it the tokenizer the model was trained with?"
        )
    if "eos_token_id" not in tokenizer.token_ids():
        warnings.append(
            f"{source} names no eos_token: generation will stop only at its length limit"
        )
    return warnings


def described(
    files: dict[str, bytes], source: str, kind: Kind, model_max_length: int | None
) -> TokenizerFiles:
    """Mends what would keep `files` from loading, and reads out the ids they define.

    Args:
        files: Name and content of each, and of a generation_config.json; changed.
        source: Where they are, for people.
        kind: How they were read.
        model_max_length: The model's context length, for a `tokenizer_config.json` made here.

    Raises:
        TokenizerError: A file is damaged, or asks for code.
    """
    given = json_object(files, GENERATION_CONFIG, source)
    files.pop(GENERATION_CONFIG, None)
    generation, left = read_generation(given, source)
    for name in _COPIED:
        json_object(files, name, source)
    given_config = json_object(files, TOKENIZER_CONFIG, source)
    config, left_fields = checked(given_config, source)
    config, notes = _mended_config(config, source, model_max_length)
    config, moved = put_into(config, files, source)
    notes += [*left_fields, *moved]
    ids = _ids(files, config, source)
    size = 1 + max(ids.values())
    # transformers reads the map only where the config does not define its added tokens.
    names = dict(config)
    if "added_tokens_decoder" not in config:
        names |= json_object(files, "special_tokens_map.json", source)
    said = [(name, names.get(name)) for name in NAMED]
    more = names.get(ADDITIONAL) or []
    said += [(ADDITIONAL, token) for token in (more if isinstance(more, list) else [more])]
    said += more_tokens(config)
    special: dict[str, int] = {}
    for name, token in said:
        if token is None:
            continue
        text = token_text(token, name, source)
        if text not in ids:
            ids[text], size = size, size + 1
            notes.append(
                f"{source}: {name} {text!r} is not in tokenizer.json; transformers gives it "
                f"id {ids[text]} on loading"
            )
        special[name] = ids[text]
    if "eos_token" in special and "pad_token" not in special:
        # In config.json too, it would keep fine-tuning from moving its row of the embedding.
        config["pad_token"] = text = token_text(names["eos_token"], "eos_token", source)
        if kind in ("directory", "hub"):
            notes.append(
                f"{source}: names no pad_token; {text!r} is written, so that texts of different "
                "lengths can be generated in one batch"
            )
    if config != given_config:
        files[TOKENIZER_CONFIG] = strict_json.dumps(config)
    return TokenizerFiles(
        files=files,
        source=source,
        kind=kind,
        size=size,
        bos_token_id=special.get("bos_token"),
        eos_token_id=special.get("eos_token"),
        pad_token_id=special.get("pad_token"),
        generation=generation,
        notes=(*notes, *left),
    )


def _mended_config(
    config: Mapping[str, Any], source: str, model_max_length: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The config that loads in transformers 4 and 5, and a note for each change."""
    mended, notes = dict(config), []
    where = f"{source}: tokenizer_config.json:"
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        why = (
            "is missing, and by the model's type transformers 4 would take Llama's and add its <s>"
            if config.get("tokenizer_class") is None
            else "TokenizersBackend is unknown to transformers 4"
        )
        mended["tokenizer_class"] = "PreTrainedTokenizerFast"
        notes.append(f"{where} tokenizer_class {why}; PreTrainedTokenizerFast written instead")
    if isinstance(config.get(EXTRA), list):
        extra = mended.pop(EXTRA)
        more = config.get(ADDITIONAL)
        also = more if isinstance(more, list) else []
        mended[ADDITIONAL] = extra + [token for token in also if token not in extra]
        notes.append(
            f"{where} {EXTRA} is a list, which transformers 4 cannot load; renamed to {ADDITIONAL}"
        )
    if config.get("padding_side") is None:
        mended["padding_side"] = "left"
        notes.append(
            f"{where} padding_side is missing, and would be right; left written instead, as "
            "generation in batches needs it"
        )
    if not config and model_max_length is not None:
        mended["model_max_length"] = model_max_length
    return mended, notes


def _ids(files: Mapping[str, bytes], config: dict[str, Any], source: str) -> dict[str, int]:
    """Every token's id, from all the places that define one."""
    tokenizer = json_object(files, "tokenizer.json", source)
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    try:
        decoder = config.get("added_tokens_decoder") or {}
        ids = {token["content"]: int(i) for i, token in decoder.items()}
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        ids |= json_object(files, "added_tokens.json", source)
        # Last, as a token of the model keeps its id when it is added once more.
        if isinstance(vocab, dict) and vocab:
            ids |= vocab
        elif isinstance(vocab, list) and vocab:  # Unigram: [token, score] in the order of ids
            ids |= {token: i for i, (token, _) in enumerate(vocab)}
        else:
            raise TokenizerError(
                f"{source}: tokenizer.json: model.vocab is missing or empty; "
                "give the tokenizer that the model was trained with"
            )
    except (TypeError, KeyError, ValueError, AttributeError):
        raise TokenizerError(
            f"{source}: a token in tokenizer.json (model.vocab, added_tokens) or tokenizer_config"
            ".json (added_tokens_decoder) lacks its content or id; save the tokenizer again"
        ) from None
    for token, i in ids.items():
        if not isinstance(i, int) or i < 0:
            raise TokenizerError(
                f"{source}: token {token!r} has the id {i!r}, not a whole number from 0; "
                "save the tokenizer again"
            )
    return ids


def token_text(token: object, name: str, source: str) -> str:
    """A special token's text, which is written as such or as an `AddedToken`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TokenizerError(
            f"{source}: tokenizer_config.json or special_tokens_map.json: {name} is "
            f"{json.dumps(token, ensure_ascii=False)}, not a token; save the tokenizer again"
        )
    return text


def json_object(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
    """A file's JSON object; empty where there is no such file."""
    if name not in files:
        return {}
    try:
        value = strict_json.loads(files[name])
    except ValueError as error:
        raise TokenizerError(
            f"{source}: {name} is not JSON ({error}); fetch or save the tokenizer again"
        ) from None
    if not isinstance(value, dict):
        raise TokenizerError(
            f"{source}: {name} is not a JSON object; fetch or save the tokenizer again"
        )
    return value
