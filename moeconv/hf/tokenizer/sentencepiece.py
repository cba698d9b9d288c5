"""A sentencepiece model file, read without the sentencepiece package.

The file is one protobuf message, `ModelProto` of sentencepiece's `src/sentencepiece_model.proto`;
field numbers and defaults below are that file's. What `ModelInterface::InitializePieces`
(`src/model_interface.cc`) refuses is refused here too.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from moeconv.errors import TokenizerError

# The mark that sentencepiece writes for a space (`kSpaceSymbol`, src/normalizer.cc).
SPACE = "\u2581"

# Far more than any vocabulary, so that a hostile file ends soon.
_MAX_PIECES = 2_000_000

# How much of a file is looked at to tell what it is.
_HEAD = 4096

type _Value = int | bytes


class Kind(IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    """`TrainerSpec.ModelType`."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its position is its id.

    Attributes:
        text: Never empty; a space is written as `SPACE`.
        score: Log probability (unigram), or minus the order of merges (BPE); a float32's value.
        kind: What it is for.
    """

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides the ids of a text.

    Attributes:
        pieces: The vocabulary in the order of ids.
        algorithm: How pieces are chosen.
        byte_fallback: Characters without a piece become byte pieces.
        whitespace_as_suffix: The space mark ends a word instead of beginning it.
        names: Text of the `bos`, `eos` and `pad` pieces, which need not be there.
        charsmap: Compiled normalisation rules, see `charsmap.py`; empty without any.
        dummy_prefix: A space is put before the text.
        strip_spaces: Spaces at both ends are dropped, and runs of them become one.
        escape_spaces: Spaces become `SPACE`.
        restores: Decoding has normalisation rules of its own.
    """

    pieces: tuple[Piece, ...]
    algorithm: Algorithm
    byte_fallback: bool
    whitespace_as_suffix: bool
    names: dict[str, str]
    charsmap: bytes
    dummy_prefix: bool
    strip_spaces: bool
    escape_spaces: bool
    restores: bool

    def of(self, *kinds: Kind) -> Iterator[tuple[int, Piece]]:
        """Id and piece of all pieces of some kinds, in order."""
        return ((i, piece) for i, piece in enumerate(self.pieces) if piece.kind in kinds)

    @cached_property
    def named(self) -> dict[str, tuple[int, Piece]]:
        """Id and piece of `bos`, `eos`, `unk` and `pad`, of those that there are.

        As `SentencePieceProcessor::bos_id` and its like find them: by text, among the control
        pieces; the unknown piece by its kind.
        """
        found = {
            name: (i, piece)
            for name in ("bos", "eos", "pad")
            for i, piece in self.of(Kind.CONTROL)
            if piece.text == self.names[name]
        }
        return {**found, "unk": next(self.of(Kind.UNKNOWN))}


def is_sentencepiece(head: bytes) -> bool:
    """True if a file begins as a `ModelProto`: messages 1 to 5, of which a piece begins with text.

    Args:
        head: Its first 4096 bytes, or all of it; Gemma 4's begins with the normalisation.
    """
    at = 0
    while at < len(head):
        if head[at] not in (0x0A, 0x12, 0x1A, 0x22, 0x2A):
            return False
        try:
            length, start = _varint(head, at + 1)
        except ValueError:
            return False
        if head[at] == 0x0A:
            return head[start : start + 1] == b"\n"
        at = start + length
    return at > len(head) >= _HEAD


def read_model(data: bytes, source: str) -> SentencePieceModel:
    """Reads a model file.

    Args:
        data: The whole file.
        source: What to call it in an error.

    Raises:
        TokenizerError: It is damaged, or sentencepiece itself would not load it.
    """
    try:
        return _model(data)
    except (ValueError, struct.error) as error:
        raise TokenizerError(
            f"{source}: is no sentencepiece model that can be read ({error}); fetch the file again"
        ) from None


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    # Of repeated messages protobuf merges the fields, so later ones win.
    trainer: dict[int, _Value] = {}
    normalizer: dict[int, _Value] = {}
    restores = False
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
            if len(pieces) > _MAX_PIECES:
                raise ValueError(f"it has more than {_MAX_PIECES} pieces")
        elif number == 2:
            trainer |= dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer |= dict(_fields(_bytes(value)))
        elif number == 5:
            restores |= bool(dict(_fields(_bytes(value))).get(2))
    names = {
        name: _bytes(trainer.get(number, text)).decode()
        for name, number, text in (
            ("bos", 46, b"<s>"),
            ("eos", 47, b"</s>"),
            ("pad", 48, b"<pad>"),
        )
    }
    model = SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=Algorithm(_number(trainer.get(3, 1))),
        byte_fallback=bool(trainer.get(35, 0)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        names=names,
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        strip_spaces=bool(normalizer.get(4, 1)),
        escape_spaces=bool(normalizer.get(5, 1)),
        restores=restores,
    )
    _demand_whole(model)
    return model


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text = _bytes(fields.get(1, b"")).decode()
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    if not text:
        raise ValueError("a piece is empty")
    if not abs(score) < float("inf"):
        raise ValueError(f"the score of {text!r} is {score}")
    return Piece(text, score, Kind(_number(fields.get(3, 1))))


def _demand_whole(model: SentencePieceModel) -> None:
    """What `InitializePieces` demands, and that no text stands twice, for which it has two maps."""
    if len({piece.text for piece in model.pieces}) != len(model.pieces):
        raise ValueError("two pieces have the same text")
    if sum(1 for _ in model.of(Kind.UNKNOWN)) != 1:
        raise ValueError("it has not one unknown piece")
    found = {piece.text for _, piece in model.of(Kind.BYTE)}
    wanted = {byte_piece(value) for value in range(256)} if model.byte_fallback else set()
    if found != wanted:
        raise ValueError("its byte pieces are not those of the 256 bytes")


def byte_piece(value: int) -> str:
    """Text of a byte's piece (`ByteToPiece`, src/model_interface.cc)."""
    return f"<0x{value:02X}>"


def _number(value: _Value) -> int:
    if isinstance(value, bytes):
        raise ValueError("a field has another type")
    return value


def _bytes(value: _Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field has another type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """Number and value of each field of a protobuf message: a varint's number, else bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("it is no protobuf message")
        if at + length > len(data):
            raise ValueError("it ends too early")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it ends too early" if at >= len(data) else "a number is too long")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
