"""Finding the tokenizer that `--tokenizer` or a run names, and reading it."""

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moeconv.errors import TokenizerError
from moeconv.hf.hub_trouble import hub_trouble
from moeconv.hf.tokenizer import from_sentencepiece, tiktoken_bpe
from moeconv.hf.tokenizer.companions import MODEL, put_together
from moeconv.hf.tokenizer.files import (
    TOKENIZER_FILES,
    Kind,
    TokenizerFiles,
    described,
)
from moeconv.hf.tokenizer.generation import GENERATION_CONFIG
from moeconv.hf.tokenizer.sentencepiece import is_sentencepiece, read_model
from moeconv.hf.tokenizer.special_sets import SpecialTokens, asked_set, choose
from moeconv.hf.tokenizer.templates import FOLDER, names_in, read_templates
from moeconv.untrusted.files import (
    is_address,
    open_regular,
    read_inside,
    read_whole,
    without_access,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# Of all files together; the largest that people publish have 40 MB.
_LIMIT = 64 * 2**20
_TEMPLATES_LIMIT = 4 * 2**20
_READ = (*TOKENIZER_FILES, GENERATION_CONFIG)
# What ranks are called here, whatever their file is.
_RANKS = "ranks"
_FILE_SUFFIXES = (".json", ".model", ".tiktoken", ".txt", ".bpe")


def read_tokenizer(spec: str, *, model_max_length: int | None) -> TokenizerFiles:
    """Reads the tokenizer that `--tokenizer` names.

    Args:
        spec: A directory with a `tokenizer.json` or a sentencepiece `tokenizer.model`, one of these
            files, a file of tiktoken ranks (`NAME:FILE` for the special tokens of NAME, see
            `SETS`), or else the id of a repository on the Hub.
        model_max_length: The model's context length, for a `tokenizer_config.json` made here.

    Returns:
        The files to write, with the ids they define.

    Raises:
        TokenizerError: There is no such tokenizer, or it cannot be read, used or fetched.
    """
    special, place = asked_set(spec)
    try:
        path = Path(place).expanduser()
        if path.is_dir():
            return tokenizer_of(
                _directory(path, spec),
                spec,
                "directory",
                model_max_length=model_max_length,
                special=special,
            )
        if path.exists():
            return _from_file(path, spec, model_max_length, special)
    except (OSError, RuntimeError, ValueError) as error:  # ~name of no user, a NUL
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(
            f"{spec}: cannot be read ({reason}); mend that or give another"
        ) from None
    if is_address(place):
        raise TokenizerError(
            f"{without_access(spec)}: is an address; copy the tokenizer into a local folder "
            "and give that with "
            "--tokenizer"
        )
    if _HUB_ID.fullmatch(spec) is None or spec.endswith(_FILE_SUFFIXES):
        raise TokenizerError(
            f"{spec}: no such file or directory; give a directory with a tokenizer.json, a "
            "sentencepiece model, a file of tiktoken ranks, or the id (namespace/name) of a "
            "repository on the Hub"
        )
    try:
        files = _directory(_download(spec), spec)
    except OSError as error:
        raise TokenizerError(f"{spec}: cannot be read ({error.strerror}); fetch it again") from None
    return tokenizer_of(files, spec, "hub", model_max_length=model_max_length)


def _from_file(
    path: Path, source: str, model_max_length: int | None, special: SpecialTokens | None
) -> TokenizerFiles:
    with open_regular(path) as file:
        head = file.read(4096)  # it may be anything, and large
        file.seek(0)
        is_json = path.name == "tokenizer.json" or head.lstrip()[:1] == b"{"
        is_ranks = path.suffix == ".tiktoken" or tiktoken_bpe.is_ranks(head)
        if not (is_json or is_ranks or is_sentencepiece(head)):
            raise TokenizerError(
                f"{source}: is no tokenizer.json, no sentencepiece model and no file of tiktoken "
                "ranks; give a file that is"
            )
        raw = read_whole(file, path, limit=_LIMIT)
    name = "tokenizer.json" if is_json else _RANKS if is_ranks else MODEL
    return tokenizer_of(
        {name: raw}, source, "directory", model_max_length=model_max_length, special=special
    )


def read_files(
    read: Callable[[str, int], bytes | None], source: str, templates: Iterable[str] = ()
) -> dict[str, bytes]:
    """Those of `TOKENIZER_FILES` that are there, generation_config.json, and further templates.

    Args:
        read: Gets a name and the most bytes; gives the content, None where there is none.
        source: Where they are, for people.
        templates: Names of the files with further chat templates.

    Raises:
        TokenizerError: They are too large together.
    """
    files: dict[str, bytes] = {}
    for name in _READ:
        if (raw := read(name, _LIMIT)) is not None:
            files[name] = raw
        if sum(map(len, files.values())) > _LIMIT:
            raise TokenizerError(
                f"{source}: its files up to {name} have more than {_LIMIT // 2**20} MiB, so they "
                "are no tokenizer's; give the tokenizer that the model was trained with"
            )
    return files | read_templates(templates, read, source, limit=_TEMPLATES_LIMIT)


def _directory(folder: Path, source: str) -> dict[str, bytes]:
    """The tokenizer's files in a folder; no link there may lead out of it."""

    def read(name: str, limit: int) -> bytes | None:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            return read_inside(folder, name, limit=limit)
        return None

    return read_files(read, source, names_in(folder))


def tokenizer_of(
    files: Mapping[str, bytes],
    source: str,
    kind: Kind,
    *,
    model_max_length: int | None,
    special: SpecialTokens | None = None,
) -> TokenizerFiles:
    """The tokenizer that some of `TOKENIZER_FILES` hold, or a sentencepiece model, or ranks.

    Args:
        files: Name and content of each.
        source: Where they are, for people.
        kind: How they were read.
        model_max_length: The model's context length, for a `tokenizer_config.json` made here.
        special: The special tokens that were asked for, for tiktoken ranks.

    Raises:
        TokenizerError: They hold none, or it cannot be used.
    """
    found = dict(files)
    ranks = found.pop(_RANKS, found.get(MODEL, b""))
    notes: Sequence[str]
    if special is not None and not (_RANKS in files or tiktoken_bpe.is_ranks(ranks)):
        raise TokenizerError(
            f"{source}: {special.name} names special tokens for tiktoken ranks, and these are "
            "none; leave it out"
        )
    if "tokenizer.json" in files:
        return described(found, source, kind, model_max_length)
    if _RANKS in files or tiktoken_bpe.is_ranks(ranks):
        tokens, kind = tiktoken_bpe.parse_ranks(ranks, source), "tiktoken"
        chosen, notes = choose(special, len(tokens), source)
        made = tiktoken_bpe.tokenizer_files(tokens, chosen, model_max_length=model_max_length)
    elif is_sentencepiece(ranks):
        kind = "sentencepiece"
        made, notes = from_sentencepiece.tokenizer_files(
            read_model(ranks, source), source, model_max_length=model_max_length
        )
    else:
        raise TokenizerError(
            f"{source}: has no tokenizer.json; give a directory into which transformers saved a "
            "fast tokenizer"
        )
    read = described(put_together(found, made, source), source, kind, model_max_length)
    return replace(read, notes=(*notes, *read.notes))


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
                lambda: snapshot_download(repo_id, allow_patterns=[*_READ, f"{FOLDER}/*.jinja"]),
                DOWNLOAD,
                address.host,
            )
        return Path(found)
    except Exception as error:  # its transport's own errors have no stable name to catch
        why = hub_trouble(error, repo_id, "model", "directory")
        raise TokenizerError(f"{repo_id}: {why}") from error
