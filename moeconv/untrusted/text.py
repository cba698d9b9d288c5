"""Text of others on its way to a terminal."""

import re
from collections.abc import Iterable, Sized
from itertools import islice

_LISTED = 20  # names in a message

# Control characters but line feed and tab (escape sequences begin with one), the marks that turn
# the direction of writing, line and paragraph separators, and halves of characters.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with each character that a terminal would act on written as an escape."""
    return _HARMFUL.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def listing(names: Iterable[str], count: int | None = None) -> str:
    """An indented list of tensor names, cut after the first.

    Args:
        names: The names; no more of them are made than are listed.
        count: How many there are, where that is not `len(names)`.
    """
    first = list(islice(names, _LISTED))
    count = len(names) if count is None and isinstance(names, Sized) else count or len(first)
    more = [f"… and {count - _LISTED} more"] if count > _LISTED else []
    return "".join(f"\n  {name}" for name in [*first, *more])
