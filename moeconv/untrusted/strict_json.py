"""JSON as the standard has it, both ways: no NaN or Infinity, no text that is not Unicode."""

import json
from typing import Any, NoReturn


def loads(raw: bytes | str, *, unique: bool = False) -> Any:
    """Parses untrusted JSON.

    Args:
        raw: The text.
        unique: True to refuse an object that has a name twice: readers differ in which of both
            they take.

    Raises:
        ValueError: It is not JSON in UTF-8, is nested too deeply, holds NaN or Infinity (also as a
            number too large for a double), or an escape of half a character.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8-sig")
        pairs = _unique if unique else None
        value = json.loads(
            text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=pairs
        )
        _encode(text)
        if "\\u" in text:
            _encode(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def dumps(content: Any, *, indent: int | None = 2, ascii_only: bool = False) -> bytes:
    """JSON in UTF-8 with a line's end; the same content gives the same bytes.

    Args:
        content: What to write.
        indent: As for `json.dumps`.
        ascii_only: Escape everything else, as for a terminal.

    Raises:
        ValueError: The content holds NaN, Infinity, or half a character.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    raw = _encode(text + "\n")
    return (json.dumps(content, indent=indent) + "\n").encode() if ascii_only else raw


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        text, at = error.object, error.start
        before = text[max(0, at - 40) : at].rsplit("\n")[-1]
        raise ValueError(f"it holds half a character ({text[at]!r} after {before!r})") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {name!r} twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"it holds {text}, which no double can hold")
    return value
