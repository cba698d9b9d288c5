"""A sentencepiece model as a fast `tokenizer.json` that gives the ids of sentencepiece itself.

The steps are those of sentencepiece's `Normalizer::Normalize` (`src/normalizer.cc`) and of its
models' `Encode` (`src/bpe_model.cc`, `src/unigram_model.cc`); the sources are those of 0.2.1.
What cannot be held is refused by name; what differs in rare texts is said in a note, and measured
in docs/tokenizers.md.
"""

import base64
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer.charsmap import joined, read_rules, replaced
from moeconv.hf.tokenizer.parts import added_token, begin_with, compact, config_files, merges
from moeconv.hf.tokenizer.sentencepiece import SPACE, Algorithm, Kind, Piece, SentencePieceModel
from moeconv.hf.tokenizer.ties import unequal_tie

# Stands before whatever may join the character before it to one grapheme, while single characters
# are replaced (charsmap.py says why). A noncharacter: no text has it.
_APART = "\U0010ffff"
_JOINS = (
    r"[\p{M}\p{Cf}\p{Cn}\n\x{0E33}\x{0EB3}\x{1160}-\x{11FF}\x{FF9E}\x{FF9F}\x{1F3FB}-\x{1F3FF}]"
)
# Score of a piece that is no text, below any sum of scores. Whole, so that sums stay exact.
_NEVER = -1e9


def tokenizer_files(
    model: SentencePieceModel, source: str, *, model_max_length: int | None
) -> tuple[dict[str, bytes], list[str]]:
    """Builds the tokenizer of a model.

    Args:
        model: What `read_model` gave.
        source: What to call it in an error or a note.
        model_max_length: The context length to write into `tokenizer_config.json`, if known.

    Returns:
        File names and contents (the same model gives the same bytes), and a sentence for each way
        in which ids may differ.

    Raises:
        TokenizerError: A `tokenizer.json` cannot hold it.
    """
    _demand_holdable(model, source)
    rules = _rules(model, source)
    try:
        sequences, others = joined(rules)
    except ValueError as error:
        raise _cannot(source, str(error)) from None
    _demand_symbols_kept(model, rules, source)
    names = {f"{name}_token": piece.text for name, (_, piece) in model.named.items()}
    files = {
        "tokenizer.json": compact(_tokenizer(model, rules, sequences, source)),
        **config_files(names, model_max_length),
    }
    return files, _notes(model, others, source)


def _cannot(source: str, why: str) -> TokenizerError:
    return TokenizerError(
        f"{source}: this sentencepiece model cannot be written as a tokenizer.json with the same "
        f"ids: {why}; give a directory with a tokenizer.json that you have compared with it"
    )


def _demand_holdable(model: SentencePieceModel, source: str) -> None:
    if model.algorithm not in (Algorithm.BPE, Algorithm.UNIGRAM):
        raise _cannot(source, f"its model_type is {model.algorithm.name.lower()}")
    if model.whitespace_as_suffix:
        raise _cannot(source, "treat_whitespace_as_suffix is set")
    if not model.escape_spaces:
        raise _cannot(source, "escape_whitespaces is not set")
    if unused := next(model.of(Kind.UNUSED), None):
        raise _cannot(source, f"its piece {unused[1].text!r} is marked as unused")
    normal = [piece for _, piece in model.of(Kind.NORMAL)]
    # Sentencepiece also joins characters that are no pieces, which `tokenizers` cannot.
    letters = {piece.text for _, piece in model.of(Kind.NORMAL, Kind.USER_DEFINED)}
    for piece in normal:
        if lone := next((letter for letter in piece.text if letter not in letters), None):
            raise _cannot(source, f"{lone!r} of its piece {piece.text!r} is no piece itself")


def _rules(model: SentencePieceModel, source: str) -> dict[str, str]:
    try:
        return read_rules(model.charsmap) if model.charsmap else {}
    except ValueError as error:
        raise TokenizerError(
            f"{source}: is no sentencepiece model that can be read ({error}); fetch the file again"
        ) from None


def _demand_symbols_kept(model: SentencePieceModel, rules: Mapping[str, str], source: str) -> None:
    """Sentencepiece does not normalise its user-defined symbols; our normaliser must keep them."""
    for _, piece in model.of(Kind.USER_DEFINED):
        text = replaced(piece.text, rules)
        text = unicodedata.normalize("NFC", text) if rules else text
        text = text.strip(" " + SPACE) if model.strip_spaces else text
        if text != piece.text or " " in text:
            raise _cannot(
                source, f"its normalisation changes its user-defined symbol {piece.text!r}"
            )


def _notes(model: SentencePieceModel, others: Sequence[str], source: str) -> list[str]:
    rare = []
    if others:
        rare.append(
            f"with {others[0]!r} or {len(others) - 1} like it, written as several characters"
        )
    if model.algorithm is Algorithm.UNIGRAM:
        rare.append("where two ways to split it are equally likely up to rounding")
    elif model.dummy_prefix and next(model.of(Kind.USER_DEFINED), None):
        rare.append("that is nothing but one user-defined symbol")
    if not rare:
        return []
    return [
        f"{source}: tokenizer.json gives the ids of this sentencepiece model, but may give others "
        f"for a text {', or '.join(rare)} (docs/tokenizers.md has how often)"
    ]


def _tokenizer(
    model: SentencePieceModel,
    rules: Mapping[str, str],
    sequences: Sequence[tuple[str, ...]],
    source: str,
) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    byte_steps = [{"type": "ByteFallback"}] if model.byte_fallback else []
    # All that there are where sentencepiece drops all (`DecodeSentencePiece`,
    # src/sentencepiece_processor.cc).
    drop = 2**16 if model.strip_spaces else int(model.dummy_prefix)
    bos = model.named.get("bos")
    normalizers = list(_normalizers(model, rules, sequences))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added_tokens(model)),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": bos and begin_with(bos[1].text, bos[0]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace({"String": SPACE}, " "),
                *byte_steps,
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": drop, "stop": 0}] if drop else []),
            ],
        },
        "model": _bpe(model, source)
        if model.algorithm is Algorithm.BPE
        else _unigram(model, source),
    }


def _added_tokens(model: SentencePieceModel) -> Iterator[dict[str, Any]]:
    """Control pieces, which text can name here; and BPE's user-defined symbols, never merged.

    Those are `normalized`: sought in the normalised text, as `bpe::Model::SampleEncode` does.
    """
    kinds = [Kind.UNKNOWN, Kind.CONTROL]
    if model.algorithm is Algorithm.BPE:
        kinds.append(Kind.USER_DEFINED)
    for number, piece in model.of(*kinds):
        yield added_token(number, piece.text, special=piece.kind is not Kind.USER_DEFINED)


def _normalizers(
    model: SentencePieceModel, rules: Mapping[str, str], sequences: Sequence[tuple[str, ...]]
) -> Iterator[dict[str, Any]]:
    if model.charsmap:
        if alone := _alone(rules, sequences):
            yield _replace({"Regex": alone}, _APART * 2)
        behind = {letter for sets in sequences for letters in sets[1:] for letter in letters}
        becomes = [key for key, value in rules.items() if len(key) == 1 and value[:1] in behind]
        joins = f"{_JOINS}|{_any(becomes)}" if becomes else _JOINS
        yield _replace({"Regex": rf"(?<=[\s\S])(?={joins})"}, _APART)
        encoded = base64.b64encode(model.charsmap).decode()
        yield {"type": "Precompiled", "precompiled_charsmap": encoded}
        if sequences:
            yield _replace({"Regex": _within(sequences)}, "")
            yield {"type": "NFC"}
        yield _replace({"String": _APART}, "")
    if model.strip_spaces:
        yield _replace({"Regex": r"\A +"}, "")
        yield _replace({"Regex": r" {2,}"}, " ")
        yield _replace({"Regex": rf"(?<![ {SPACE}])[ {SPACE}]+\z"}, "")
    if model.dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE}
        symbols = [re.escape(piece.text) for _, piece in model.of(Kind.USER_DEFINED)]
        if symbols and model.algorithm is Algorithm.BPE:
            # `tokenizers` normalises the symbols too before it looks for them.
            yield _replace({"Regex": rf"\A{SPACE}(?=(?:{'|'.join(symbols)})\z)"}, "")
    yield _replace({"String": " "}, SPACE)


def _alone(rules: Mapping[str, str], sequences: Sequence[tuple[str, ...]]) -> str:
    """Regex of the places where the text of a rule joins nothing, although its letters would.

    As behind U+FB01 (fi) or a character that is dropped, before U+0344 (two marks), and, where case
    is folded, between a capital T and a diaeresis, which only the small t has.
    """
    before = {letter for sets in sequences for letters in sets[:-1] for letter in letters}
    singles = {key: value for key, value in rules.items() if len(key) == 1}
    closed = [k for k, v in singles.items() if not v or (len(v) > 1 and v[-1] in before)]
    places = [rf"(?<={_any(closed)})(?={_JOINS})"] if closed else []
    bases: dict[str, set[str]] = {}
    for key in rules:
        if len(key) == 2:
            bases.setdefault(key[1], set()).add(replaced(key[0], rules))
    alike: dict[str, list[str]] = {}
    for key, value in singles.items():
        if missing := bases.get(value[:1], set()) - bases.get(key, set()):
            missing |= {key for key, value in singles.items() if value[-1:] in missing}
            alike.setdefault(_any(missing), []).append(key)
    for behind, known in bases.items():
        if missing := {k for k, v in singles.items() if v in known and k + behind not in rules}:
            alike.setdefault(_any(missing), []).append(behind)
    return "|".join([*places, *(f"(?<={base})(?={_any(keys)})" for base, keys in alike.items())])


def _any(letters: Iterable[str]) -> str:
    return "[" + "".join(map(re.escape, sorted(letters))) + "]"


def _within(sequences: Sequence[tuple[str, ...]]) -> str:
    """Regex of `_APART` between characters that a rule joins."""
    places = []
    for sets in sequences:
        classes = [_any(letters) for letters in sets]
        for at in range(1, len(sets)):
            before, after = (_APART.join(part) for part in (classes[:at], classes[at:]))
            places.append(f"(?<={before}{_APART})(?={after})")
    return f"{_APART}(?:{'|'.join(places)})"


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _bpe(model: SentencePieceModel, source: str) -> dict[str, Any]:
    """Merges in the order of scores: every pair of pieces whose text is a piece."""
    normal = [piece for _, piece in model.of(Kind.NORMAL)]
    known = {piece.text for piece in normal}
    pairs: list[tuple[str, str]] = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        splits = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
        pairs += [(left, right) for left, right in splits if left in known and right in known]
    if wrong := unequal_tie(normal, pairs):
        raise _cannot(source, wrong)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.named["unk"][1].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
        "merges": merges(pairs),
    }


def _unigram(model: SentencePieceModel, source: str) -> dict[str, Any]:
    """Scores as `unigram::Model::EncodeOptimized` takes them."""
    scores = [piece.score for _, piece in model.of(Kind.NORMAL)]
    if not scores:
        raise _cannot(source, "it has no pieces")
    best = max(scores)

    def score(piece: Piece) -> float:
        if piece.kind is Kind.NORMAL:
            return piece.score
        if piece.kind is Kind.USER_DEFINED:
            return len(piece.text.encode()) * best - 0.1
        return _NEVER

    return {
        "type": "Unigram",
        "unk_id": model.named["unk"][0],
        "vocab": [[piece.text, score(piece)] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }
