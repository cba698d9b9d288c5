"""The tokenizer that goes with the converted weights: reading one, and checking that it fits."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moeconv.errors import TokenizerError
from moeconv.hf import tiktoken_bpe
from moeconv.hf.hub_trouble import hub_trouble
from moeconv.untrusted import strict_json
from moeconv.untrusted.files import (
    inside,
    is_address,
    open_regular,
    read_inside,
    read_whole,
    without_access,
)
from moeconv.untrusted.text import printable

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

# In the order in which transformers gives ids to those that the vocabulary lacks.
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_ADDITIONAL = "additional_special_tokens"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# Of all files together; the largest that people publish have 40 MB.
_LIMIT = 64 * 2**20
_TEMPLATES = "additional_chat_templates"
# JSON that is written as it was read, and not looked at otherwise.
_COPIED = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "vocab.json")
_FILE_SUFFIXES = (".json", ".model", ".tiktoken", ".txt", ".bpe")

Kind = Literal["directory", "tiktoken", "hub"]


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as it is to be written, and what the model must have for it.

    Attributes:
        files: Name and content of each file.
        source: What was read, as the user said it.
        kind: How it was read: a directory (or a `tokenizer.json`), tiktoken ranks, or the Hub.
        size: One more than the highest id of any token: the rows that the embedding needs.
        bos_token_id: Id of the token that begins a text, where the tokenizer names one.
        eos_token_id: Id of the token that ends a text, where the tokenizer names one.
        pad_token_id: Id of the padding token, where the tokenizer names one.
        notes: What in the files differs from the source and why, a sentence each.
    """

    files: Mapping[str, bytes]
    source: str
    kind: Kind
    size: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    notes: tuple[str, ...] = ()


def read_tokenizer(spec: str, *, model_max_length: int | None) -> TokenizerFiles:
    """Reads the tokenizer that `--tokenizer` names.

    Args:
        spec: A directory with a `tokenizer.json`, such a file, a file of tiktoken ranks, or else
            the id of a repository on the Hub.
        model_max_length: The model's context length, for a `tokenizer_config.json` made here.

    Returns:
        The files to write, with the ids they define.

    Raises:
        TokenizerError: There is no such tokenizer, or it cannot be read, used or fetched.
    """
    try:
        path = Path(spec).expanduser()
        if path.is_dir():
            files = _directory(path, spec)
            found = tokenizer_of(files, spec, "directory", model_max_length=model_max_length)
            return replace(found, notes=(*found.notes, *left_out(path)))
        if path.exists():
            return _from_file(path, spec, model_max_length)
    except (OSError, RuntimeError, ValueError) as error:  # ~name of no user, a NUL
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(
            f"{spec}: cannot be read ({reason}); mend that or give another"
        ) from None
    if is_address(spec):
        raise TokenizerError(
            f"{without_access(spec)}: is an address; copy the tokenizer into a local folder "
            "and give that with "
            "--tokenizer"
        )
    if _HUB_ID.fullmatch(spec) is None or spec.endswith(_FILE_SUFFIXES):
        raise TokenizerError(
            f"{spec}: no such file or directory; give a directory with a tokenizer.json, a file of "
            "tiktoken ranks, or the id (namespace/name) of a repository on the Hub"
        )
    try:
        files = _directory(_download(spec), spec)
    except OSError as error:
        raise TokenizerError(f"{spec}: cannot be read ({error.strerror}); fetch it again") from None
    return tokenizer_of(files, spec, "hub", model_max_length=model_max_length)


def left_out(folder: Path) -> list[str]:
    """A note where a tokenizer's folder has further chat templates, which are not copied."""
    with contextlib.suppress(OSError):
        names = sorted(path.name for path in inside(folder, _TEMPLATES).glob("*.jinja"))
        if names:
            more = ", …" if names[5:] else ""
            return [
                f"{folder}: not copied: {printable(', '.join(names[:5]))}{more} of {_TEMPLATES}; "
                "copy them into the converted model where they are needed"
            ]
    return []


def check_fits(tokenizer: TokenizerFiles, vocab_size: int) -> list[str]:
    """Checks that every token has a row in the model's embedding.

    MaxText trains on without one: an id past the table reads its last row, and as a target it
    gives no loss, so a model whose BOS and EOS lie past its table has learned neither.

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
    warnings = []
    if vocab_size > 1.1 * size:
        warnings.append(
            f"{source} has {size} ids and the model {vocab_size} rows: the last "
            f"{vocab_size - size} would be padding; is it the tokenizer the model was trained with?"
        )
    if tokenizer.eos_token_id is None:
        warnings.append(
            f"{source} names no eos_token: generation will stop only at its length limit"
        )
    return warnings


def _from_file(path: Path, source: str, model_max_length: int | None) -> TokenizerFiles:
    with open_regular(path) as file:
        head = file.read(4096)  # it may be anything, and large
        file.seek(0)
        known = path.suffix == ".tiktoken" or tiktoken_bpe.is_ranks(head)
        is_json = path.name == "tokenizer.json" or head.lstrip()[:1] == b"{"
        raw = read_whole(file, path, limit=_LIMIT) if known or is_json else b""
    if is_json:
        return _described({"tokenizer.json": raw}, source, "directory", model_max_length)
    if known:
        tokens = tiktoken_bpe.parse_ranks(raw, source)
        files = tiktoken_bpe.tokenizer_files(tokens, model_max_length=model_max_length)
        return _described(files, source, "tiktoken", model_max_length)
    raise TokenizerError(
        f"{source}: holds neither a tokenizer.json nor tiktoken ranks"
        f"{_SENTENCEPIECE if _is_sentencepiece(head) else '; give a file that does'}"
    )


def read_files(read: Callable[[str, int], bytes | None], source: str) -> dict[str, bytes]:
    """Those of `TOKENIZER_FILES` that are there.

    Args:
        read: Gets a name and the most bytes; gives the content, None where there is none.
        source: Where they lie, for people.

    Raises:
        TokenizerError: They are too large together.
    """
    files: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        if (raw := read(name, _LIMIT)) is not None:
            files[name] = raw
        if sum(map(len, files.values())) > _LIMIT:
            raise TokenizerError(
                f"{source}: its files up to {name} have more than {_LIMIT // 2**20} MiB, so they "
                "are no tokenizer's; give the tokenizer that the model was trained with"
            )
    return files


def _directory(folder: Path, source: str) -> dict[str, bytes]:
    """The tokenizer's files that lie in a folder; no link there may lead out of it."""

    def read(name: str, limit: int) -> bytes | None:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            return read_inside(folder, name, limit=limit)
        return None

    return read_files(read, source)


def tokenizer_of(
    files: Mapping[str, bytes], source: str, kind: Kind, *, model_max_length: int | None
) -> TokenizerFiles:
    """The tokenizer that some of `TOKENIZER_FILES` hold.

    Args:
        files: Name and content of each.
        source: Where they lie, for people.
        kind: How they were read.
        model_max_length: The model's context length, for a `tokenizer_config.json` made here.

    Raises:
        TokenizerError: They hold none, or it cannot be used.
    """
    if "tokenizer.json" not in files:
        model = files.get("tokenizer.model", b"")
        if tiktoken_bpe.is_ranks(model):
            fix = "; its tokenizer.model holds tiktoken ranks: give that file itself"
        elif _is_sentencepiece(model):
            fix = _SENTENCEPIECE
        else:
            fix = "; give a directory into which transformers saved a fast tokenizer"
        raise TokenizerError(f"{source}: has no tokenizer.json{fix}")
    return _described(dict(files), source, kind, model_max_length)


# Not copied as it is: for our model types transformers 5.23 drops the leading space that the model
# was trained with ("▁hello" becomes "hello"), and says nothing. The fix gives the ids of training.
_SENTENCEPIECE = (
    ", only a sentencepiece model, which transformers 5 splits in another way than MaxText; save "
    "it as tokenizer.json once, with transformers 4 (from a directory DIR where the model is named "
    "tokenizer.model): LlamaTokenizerFast.from_pretrained(DIR, legacy=True).save_pretrained(NEW)"
)


def _is_sentencepiece(data: bytes) -> bool:
    # The first field of the protobuf is a piece: tag 0x0a, its length, then tag 0x0a of its text.
    return data[:1] == b"\n" and data[2:3] == b"\n"


def _described(
    files: dict[str, bytes], source: str, kind: Kind, model_max_length: int | None
) -> TokenizerFiles:
    """Mends what would keep `files` from loading, and reads out the ids they define."""
    for name in _COPIED:
        _json_object(files, name, source)
    config = _json_object(files, "tokenizer_config.json", source)
    config, notes = _mended_config(config, source, model_max_length)
    if notes:
        files["tokenizer_config.json"] = strict_json.dumps(config)
    ids = _ids(files, config, source)
    size = 1 + max(ids.values())
    # transformers reads the map only where the config does not define its added tokens.
    names = dict(config)
    if "added_tokens_decoder" not in config:
        names |= _json_object(files, "special_tokens_map.json", source)
    said = [(field, names.get(field)) for field in _NAMED]
    more = names.get(_ADDITIONAL) or []
    said += [(_ADDITIONAL, token) for token in (more if isinstance(more, list) else [more])]
    special: dict[str, int] = {}
    for field, token in said:
        if token is None:
            continue
        text = _text(token, field, source)
        if text not in ids:
            ids[text], size = size, size + 1
            notes.append(
                f"{source}: {field} {text!r} is not in tokenizer.json; transformers gives it "
                f"id {ids[text]} on loading"
            )
        special[field] = ids[text]
    return TokenizerFiles(
        files=files,
        source=source,
        kind=kind,
        size=size,
        bos_token_id=special.get("bos_token"),
        eos_token_id=special.get("eos_token"),
        pad_token_id=special.get("pad_token"),
        notes=tuple(notes),
    )


def _mended_config(
    config: dict[str, Any], source: str, model_max_length: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The config that loads in transformers 4 and 5, and a note for each change."""
    if "auto_map" in config:
        raise TokenizerError(
            f"{source}: tokenizer_config.json: auto_map asks for Python code of the tokenizer's "
            "own, which is not copied; save the tokenizer as a PreTrainedTokenizerFast"
        )
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
    if isinstance(config.get("extra_special_tokens"), list):
        extra = mended.pop("extra_special_tokens")
        more = config.get(_ADDITIONAL)
        also = more if isinstance(more, list) else []
        mended[_ADDITIONAL] = extra + [token for token in also if token not in extra]
        notes.append(
            f"{where} extra_special_tokens is a list, which transformers 4 cannot load; "
            f"renamed to {_ADDITIONAL}"
        )
    if not config and model_max_length is not None:
        mended["model_max_length"] = model_max_length
    return mended, notes


def _ids(files: Mapping[str, bytes], config: dict[str, Any], source: str) -> dict[str, int]:
    """Every token's id, from all the places that define one."""
    tokenizer = _json_object(files, "tokenizer.json", source)
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    try:
        decoder = config.get("added_tokens_decoder") or {}
        ids = {token["content"]: int(i) for i, token in decoder.items()}
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        ids |= _json_object(files, "added_tokens.json", source)
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


def _text(token: object, field: str, source: str) -> str:
    """A special token's text, which is written as such or as an `AddedToken`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TokenizerError(
            f"{source}: tokenizer_config.json or special_tokens_map.json: {field} is "
            f"{json.dumps(token, ensure_ascii=False)}, not a token; save the tokenizer again"
        )
    return text


def _json_object(files: Mapping[str, bytes], name: str, source: str) -> dict[str, Any]:
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


def _download(repo_id: str) -> Path:
    """Fetches the tokenizer's files of a repository into the Hub's cache."""
    from huggingface_hub import snapshot_download

    from moeconv.hf.hub_address import read_address
    from moeconv.hf.hub_client import DOWNLOAD, hub_client, within

    address = read_address(None)  # says itself where a token must not go
    try:
        with hub_client(address):
            found = within(
                # Whole: what is downloaded through Xet has no limit of ours besides.
                lambda: snapshot_download(repo_id, allow_patterns=list(TOKENIZER_FILES)),
                DOWNLOAD,
                address.host,
            )
        return Path(found)
    except Exception as error:  # its transport's own errors have no stable name to catch
        why = hub_trouble(error, repo_id, "model", "directory")
        raise TokenizerError(f"{repo_id}: {why}") from error
