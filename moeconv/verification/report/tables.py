"""Tables of Markdown, for verify.md and the model card."""

import re
from collections.abc import Iterable, Sequence

from moeconv.untrusted.text import printable

# What Markdown or HTML acts on within a line, and what makes links of plain addresses.
_MARKUP = re.compile(r"[\\`*\[\]<>~$&{}@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.(?=\w)")
# What it acts on at the beginning of a line.
_BEGIN = re.compile(r"^(?:[#+=-]|\d+(?=[.)](?:\s|$)))")


def plain(text: str) -> str:
    """Text of others as one line that Markdown shows as it is: no markup, link or control."""
    line = printable(" ".join(str(text).split()))
    return _BEGIN.sub(lambda found: _escaped_begin(found[0]), _MARKUP.sub(r"\\\g<0>", line))


def _escaped_begin(found: str) -> str:
    return f"{found}\\" if found[0].isdigit() else f"\\{found}"


def code(text: str) -> str:
    """Text of others as a span of code."""
    return f"`{printable(' '.join(str(text).split())).replace('`', chr(39)) or ' '}`"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars and line ends in a cell do not break it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
