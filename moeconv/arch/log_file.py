"""MaxText's own log as a config: it holds every resolved setting.

At its start MaxText logs them, sorted, as `Config param KEY: VALUE` (configs/pyconfig.py
`initialize`; 0.1.0: pyconfig.py `HyperParameters`), and Python writes the values. Between MaxText
and the file there may be others: each line gets a time or the name of a host before it, or becomes
a text in a record of JSON (Cloud Logging, Docker, logfmt), or two come on one line.
"""

import ast
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moeconv.errors import ConfigError
from moeconv.untrusted.text_files import lines

_MARK = "Config param "
_SETTING = re.compile(r"Config param ([A-Za-z_]\w{0,99}):(?: |$)", re.ASCII)
# A terminal's: colours, modes, titles.
_COLOUR = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9A-Z])")
_QUOTE = re.compile(r'\\.|"', re.DOTALL)
# Behind a message: the line of code that logged it, as rich's handler writes; the end of a text of
# Python (`b'…\n'`).
_BEHIND = re.compile(r"(?:\s{2,}[\w/.-]+\.py:\d+|(?:\\[nr])+['\"]?)$", re.ASCII)
_DEEPEST = 3  # records of JSON in a text of JSON
_LONGEST_LINE = 4 * 2**20  # a whole log as one line of JSON has some 150 KB
# MaxText logs its settings before the first step (configs/pyconfig.py): what follows is not read.
_READ = 2**28
_READ_PACKED = 2**25
_LONGEST_NUMBER = 100
_LONGEST_VALUE = 64 * 1024
_LONGEST_LIST = 50  # lines
_MOST_KEYS = 5000

Value = tuple[Any, str]


class Logged(NamedTuple):
    """What a log says.

    Attributes:
        values: By MaxText key, the last that is logged.
        where: The file and line of each.
        twice: Settings that were logged with two values: both, and where.
        cut: Settings whose value is cut off, or may be, as the file ends there, with the place of
            each; they are not among the values.
    """

    values: dict[str, Any]
    where: dict[str, str]
    twice: dict[str, tuple[Value, Value]]
    cut: dict[str, str]


def read_log(file: BinaryIO, path: Path) -> Logged | None:
    """The settings that a log has; None where it has none.

    Args:
        file: The log, open; gzip and UTF-16 are read.
        path: What it is called in messages.

    Raises:
        ConfigError: A line with settings is too long, or there are too many settings.
        ValueError: It is packed in another way, or damaged.
    """
    found = Logged({}, {}, {}, {})
    widths: dict[str, int] = {}
    longest = opened = 0  # the longest line, and the longest with a list that is not closed
    for number, key, text, whole, width in _settings(file, path):
        place, value = f"{path}:{number}", parse(text)
        known = found.values.get(key)
        may_go_on = isinstance(value, str | int | float) and not isinstance(value, bool)
        longest = max(longest, width)
        if _is_open(text):
            opened = max(opened, width)
        if _is_open(text) or (not whole and may_go_on and value != known):
            found.cut[key] = place
            continue
        widths[key] = width + 2 * (text == "") if may_go_on else 0  # a colon and a space
        if key in found.values and found.values[key] != value:
            found.twice.setdefault(key, ((found.values[key], found.where[key]), (value, place)))
        found.values[key], found.where[key] = value, place
        if len(found.values) > _MOST_KEYS:
            raise ConfigError(f"--config {path} logs more than {_MOST_KEYS} settings")
    if opened and opened == longest:  # all lines were cut off at this width
        found.cut.update({k: found.where[k] for k, width in widths.items() if width >= longest})
    for key in found.cut:  # also what an earlier run had
        found.values.pop(key, None)
    return found if found.values or found.cut else None


def parse(text: str) -> Any:
    """A value as Python printed it."""
    plain = {"True": True, "False": False, "None": None}
    if text in plain:
        return plain[text]
    for kind in (int, float) if len(text) <= _LONGEST_NUMBER else ():
        try:
            return kind(text)
        except ValueError:
            pass
    if text[:1] in ("[", "(", "{", "'", '"') and len(text) <= _LONGEST_VALUE:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
    return text


class _Setting(NamedTuple):
    """One line's.

    Attributes:
        line: Its number.
        key: MaxText's.
        text: Its value.
        whole: False where the value may go on behind the end of the file.
        width: Of the line.
    """

    line: int
    key: str
    text: str
    whole: bool
    width: int


def _settings(file: BinaryIO, path: Path) -> Iterator[_Setting]:
    """Every setting in a log."""
    open_: list[_Setting] = []  # the last one, where its value may go on in the next line
    joined = 0
    for number, line in lines(file, longest=_LONGEST_LINE, limit=_READ, packed_limit=_READ_PACKED):
        if _MARK not in line:
            if open_:
                last, joined = open_.pop(), joined + 1
                text = f"{last.text} {line.strip()}".strip()
                goes_on = last.text != "" or (line[:1].isspace() and text != "")
                last = last._replace(text=text, whole=line.endswith("\n")) if goes_on else last
                if goes_on and joined < _LONGEST_LIST and _is_open(text):
                    open_ = [last]
                else:
                    yield last
            continue
        yield from open_
        open_, joined = [], 0
        if len(line) == _LONGEST_LINE:
            raise ConfigError(
                f"--config {path}: line {number} has settings and is longer than "
                f"{_LONGEST_LINE // 2**20} MiB; give a log with a line for each record"
            )
        ended = line.endswith(("\n", "\r"))
        for part in _COLOUR.sub("", line).strip("\r\n").split("\r"):
            for key, text, closed in _of_line(part):
                yield from open_
                found = _Setting(number, key, text, closed or ended, len(line))
                open_ = [found] if not closed and (text == "" or _is_open(text)) else []
                if not open_:
                    yield found
    yield from open_


def _is_open(text: str) -> bool:
    """True of a list that is not closed."""
    return text[:1] in ("[", "(", "{") and isinstance(parse(text), str)


def _of_line(line: str, depth: int = 0) -> Iterator[tuple[str, str, bool]]:
    """Key, text, and whether it ends before the line does, of the settings in a line."""
    if line.lstrip().startswith("#"):
        return
    texts = list(_texts(line)) if depth < _DEEPEST else []
    for each in itertools.chain.from_iterable(text.splitlines() for text in texts):
        for key, text, _ in _of_line(each, depth + 1):
            yield key, text, True
    if texts:
        return
    marks = list(_SETTING.finditer(line))
    # What comes before the first may come before the others too, with another time in it.
    before = re.sub(r"\d+", r"\\d+", re.escape(line[: marks[0].start()])) if marks else ""
    for mark, after in itertools.zip_longest(marks, marks[1:]):
        text = line[mark.end() : after.start() if after else None]
        if after and before:
            text = re.sub(before + r"\Z", "", text)
        yield mark[1], _BEHIND.sub("", text.rstrip()).strip(), after is not None


def _texts(line: str) -> Iterator[str]:
    """The quoted texts with settings that are values in a line: of JSON, logfmt or CSV."""
    begun = None
    for quote in _QUOTE.finditer(line):
        if quote[0] != '"':
            continue
        if begun is None:
            begun = quote.start()
            continue
        start, end, begun = begun, quote.end(), None
        left, right = line[max(0, start - 9) : start].rstrip()[-1:], line[end : end + 1]
        value = (not left or left in ":=[,{") and (not right or right in ",}]" or right.isspace())
        if value and _MARK in line[start:end]:
            with suppress(ValueError):
                yield str(json.loads(line[start:end], strict=False))
