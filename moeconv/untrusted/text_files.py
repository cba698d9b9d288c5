"""Text files as people have them: in UTF-8, UTF-16 or UTF-32, and packed by gzip.

PowerShell's `>` writes UTF-16, rotated logs are packed.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_PACKED = {
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7-Zip",
}
_GZIP = b"\x1f\x8b"


@contextmanager
def unpacked(file: BinaryIO) -> Iterator[tuple[BinaryIO, str]]:
    """What a file holds, unpacked as it is read.

    Args:
        file: Open at its beginning, and seekable.

    Yields:
        The bytes, and the name of their encoding for Python, with a byte order mark or without.

    Raises:
        ValueError: It is packed in another way, or a packed file that is damaged or cut off; also
            in the `with` block.
    """
    try:
        head = file.read(8)
        file.seek(0)
        if packer := next((name for mark, name in _PACKED.items() if head.startswith(mark)), None):
            raise ValueError(f"it is packed by {packer}; unpack it first")
        content: BinaryIO = file
        if head.startswith(_GZIP):
            content = io.BufferedReader(gzip.GzipFile(fileobj=file))
            head = content.peek(8)[:8]
        yield content, json.detect_encoding(head) if head else "utf-8"
    except EOFError:
        raise ValueError("it is packed by gzip, and cut off; copy or unpack it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"it is packed by gzip, and damaged ({error})") from None


def decoded(file: BinaryIO, limit: int) -> str:
    """The whole text of an open file.

    Args:
        file: As for `unpacked`.
        limit: In bytes, unpacked.

    Raises:
        ValueError: As `unpacked`; it has more bytes, or is no text.
    """
    with unpacked(file) as (content, encoding):
        raw = content.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"it is larger than {limit // 1024} KiB")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is no text in UTF-8, UTF-16 or UTF-32 (byte {error.start} is none of {encoding})"
        ) from None


def lines(
    file: BinaryIO, *, longest: int, limit: int, packed_limit: int
) -> Iterator[tuple[int, str]]:
    """The lines of an open file with their numbers from 1; what is no text is replaced.

    Args:
        file: As for `unpacked`.
        longest: Of a line, in characters; a longer one comes in parts of this length.
        limit: Characters after which no more are read.
        packed_limit: The same of a packed file, which may be small and hold as many as one likes.

    Raises:
        ValueError: As `unpacked`.
    """
    with unpacked(file) as (content, encoding):
        text = io.TextIOWrapper(content, encoding, errors="replace", newline="\n")
        number = read = 0
        most = limit if content is file else packed_limit
        try:
            while read < most and (line := text.readline(longest)):
                yield number + 1, line
                number, read = number + line.endswith("\n"), read + len(line)
        finally:
            text.detach()  # else `file` is closed with it
