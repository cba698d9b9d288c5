"""JSON as the standard has it, both ways: no NaN or Infinity, no text that is not Unicode."""

import json
from typing import Any, NoReturn


def loads(raw: bytes | str) -> Any:
    """Parses JSON that somebody else wrote.

    Raises:
        ValueError: It is not JSON in UTF-8, is nested too deeply, holds NaN or Infinity (also as a
            number too large for a double), or an escape of half a character.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        _encode(text)
        if "\\u" in text:
            _encode(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def dumps(content: Any, *, indent: int | None = 2) -> bytes:
    """JSON in UTF-8 with a line's end; the same content gives the same bytes.

    Raises:
        ValueError: The content holds NaN, Infinity, or half a character.
    """
    return _encode(json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a character ({error.object[error.start]!r})") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"it holds {text}, which no double can hold")
    return value
