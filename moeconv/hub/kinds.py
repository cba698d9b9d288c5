"""Checks that a file is what its name says, so that push sends nothing else under that name.

Of what `push` sends, only weights, pictures and a sentencepiece model are not text.
"""

import re
import struct
import zlib
from collections.abc import Iterator

from moeconv.untrusted import strict_json

_PNG = b"\x89PNG\r\n\x1a\n"
# What matplotlib writes, and compressed texts.
_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tEXt", b"zTXt", b"iTXt"}
_LENGTHS = {b"IHDR": {13}, b"IEND": {0}, b"pHYs": {9}}
# Samples a pixel, by color type.
_SAMPLES = {0: 1, 2: 3, 4: 2, 6: 4}
_MOST_PIXELS = 64 * 2**20  # bytes
_MOST_TEXT = 2**20
# Fields of sentencepiece's ModelProto (sentencepiece_model.proto): pieces, trainer_spec,
# normalizer_spec, self_test_data, denormalizer_spec; all are length-delimited messages.
_MODEL_FIELDS = range(1, 6)
_RANKS = re.compile(rb"(?:[A-Za-z0-9+/]++={0,2} \d{1,7}(?:\r?\n|\Z))++")


def unlike(name: str, content: bytes) -> str | None:
    """How a file is not what its name says; None where it is.

    Args:
        name: Of the file; it decides what the file must be.
        content: All of it.
    """
    try:
        if name.endswith(".png"):
            for _ in png_texts(content):
                pass
        elif name.endswith(".json"):
            if not isinstance(strict_json.loads(content), dict):
                return "is no JSON object"
        elif name.endswith(".model"):
            _demand_tokenizer(content)
        else:
            if "\0" in content.decode("utf-8-sig"):
                return "is no text"
    except UnicodeDecodeError:
        return "is no text in UTF-8"
    except ValueError as error:
        return str(error)
    return None


def png_texts(content: bytes) -> Iterator[bytes]:
    """All that a picture may hide a text in: its texts and pixels, unpacked, and the file itself.

    Once all are taken, it is known to be a PNG and no more.

    Raises:
        ValueError: It is no PNG, is damaged, or holds something that no plain picture has.
    """
    if not content.startswith(_PNG):
        raise ValueError("is no PNG")
    at, pixels, header, last = len(_PNG), bytearray(), b"", b""
    while at < len(content):
        if len(content) - at < 12:
            raise ValueError("is a PNG with something behind it")
        (length,), kind = struct.unpack_from(">I", content, at), content[at + 4 : at + 8]
        data, end = content[at + 8 : at + 8 + length], at + 12 + length
        if last == b"IEND" or end > len(content):
            raise ValueError("is a PNG with something behind it, or cut off")
        if kind not in _CHUNKS:
            raise ValueError("is a PNG with parts that no plot has")
        if zlib.crc32(kind + data) != int.from_bytes(content[end - 4 : end], "big"):
            raise ValueError("is a damaged PNG")
        if (kind == b"IHDR") != (last == b"") or length not in _LENGTHS.get(kind, {length}):
            raise ValueError("is no PNG")
        if kind == b"IHDR":
            header = data
        elif kind == b"IDAT":
            pixels += data
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            yield _text(kind, data)
        last, at = kind, end
    if last != b"IEND":
        raise ValueError("is a PNG that is cut off")
    yield _image(header, bytes(pixels))
    yield content


def _text(kind: bytes, data: bytes) -> bytes:
    """Keyword and text of a chunk (PNG 1.2, 4.2.3)."""
    keyword, _, rest = data.partition(b"\0")
    if kind == b"zTXt":
        rest = _inflate(rest[1:], _MOST_TEXT)
    elif kind == b"iTXt":
        flags, rest = rest[:2], rest[2:]
        language, _, rest = rest.partition(b"\0")
        translated, _, rest = rest.partition(b"\0")
        rest = _inflate(rest, _MOST_TEXT) if flags[:1] == b"\1" else rest
        keyword += b" " + language + b" " + translated
    return keyword + b": " + rest


def _image(header: bytes, pixels: bytes) -> bytes:
    """The pixels unpacked, exactly as many as the header says.

    Raises:
        ValueError: They are not.
    """
    width, height, depth, color, method, filters, interlaced = struct.unpack(">IIBBBBB", header)
    if color not in _SAMPLES or depth not in (1, 2, 4, 8, 16) or method or filters or interlaced:
        raise ValueError("is a PNG of a kind that no plot is")
    row = 1 + (width * depth * _SAMPLES[color] + 7) // 8
    if not 0 < row * height <= _MOST_PIXELS or not width:
        raise ValueError("is a PNG too large for a plot")
    found = _inflate(pixels, row * height)
    if len(found) != row * height:
        raise ValueError("is a damaged PNG")
    return found


def _inflate(data: bytes, most: int) -> bytes:
    """What zlib packed, whole.

    Raises:
        ValueError: It is damaged, larger than it may be, or has something behind it.
    """
    unpack = zlib.decompressobj()
    try:
        found = unpack.decompress(data, most + 1)
    except zlib.error:
        raise ValueError("is a damaged PNG") from None
    if not unpack.eof or unpack.unused_data or len(found) > most:
        raise ValueError("is a PNG whose parts hold more than they say")
    return found


def _demand_tokenizer(content: bytes) -> None:
    """A sentencepiece model, or tiktoken's ranks, a line each.

    Raises:
        ValueError: It is neither.
    """
    if _RANKS.fullmatch(content):
        return
    at, pieces = 0, 0
    while at < len(content):
        tag, at = _varint(content, at)
        length, at = _varint(content, at)
        at += length
        if tag & 7 != 2 or tag >> 3 not in _MODEL_FIELDS or at > len(content):
            raise ValueError("is no tokenizer of sentencepiece")
        pieces += tag >> 3 == 1
    if not pieces:
        raise ValueError("is no tokenizer of sentencepiece")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of protobuf, and where the next one begins."""
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(content):
            break
        value |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return value, at
    raise ValueError("is no tokenizer of sentencepiece")
