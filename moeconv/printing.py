"""Values that print themselves: lines and tables for people, plain data for machines."""

import io
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from typing import IO, TYPE_CHECKING, Any

from moeconv.untrusted.text import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Into a file or a pipe, tables take the width they need.
_WIDE = 240
_NUMBER = re.compile(r"(?<![^._])(\d+)(?![^.])")


class Printable(ABC):
    """What a command answers with: `print(value)` is its output, `as_dict()` that of `--json`."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """The value as data that JSON can hold."""

    @abstractmethod
    def parts(self) -> "Iterable[RenderableType]":
        """The value for people: lines of text, and rich's tables."""

    def __str__(self) -> str:
        stream = io.StringIO()
        plain = console(stream, color_system=None, force_jupyter=False)
        for part in self.parts():
            show(plain, part)
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def console(stream: IO[str], **options: Any) -> "Console":
    """A console on which control characters in text that is not ours are shown as escapes."""
    from rich.console import Console
    from rich.segment import Segment

    class Harmless(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for text, style, control in super().render(renderable, options):  # rich's own: later
                yield Segment(text if control else printable(text), style, control)

    width = None if stream.isatty() else _WIDE
    return Harmless(file=stream, highlight=False, width=width, **options)


def show(console: "Console", part: "RenderableType") -> None:
    """Prints a line, which is not wrapped, or a table."""
    line = isinstance(part, str)  # of which rich would drop what is escaped here
    console.print(printable(part) if line else part, markup=False, soft_wrap=line)  # type: ignore[arg-type]


def fold[Rest: Hashable](items: Iterable[tuple[str, Rest]]) -> list[tuple[str, Rest, int]]:
    """Folds names that differ only in numbers, and agree in the rest of their line.

    Args:
        items: Name, and what must agree for names to be folded.

    Returns:
        Pattern such as `model.layers.{0...5}.input_layernorm.weight`, the rest, and how many.
    """
    groups: dict[tuple[str, Rest], list[tuple[int, ...]]] = {}
    for name, rest in items:
        numbers = tuple(int(n) for n in _NUMBER.findall(name))
        groups.setdefault((_NUMBER.sub("#", name), rest), []).append(numbers)
    return [
        (_fill(pattern, block), rest, len(block))
        for (pattern, rest), found in groups.items()
        for block in _blocks(found)
    ]


def _blocks(found: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Splits numbers into blocks that are whole products of their columns."""
    columns = [set(column) for column in zip(*found, strict=True)]
    if math.prod(map(len, columns)) == len(found):
        return [found]
    split = next(i for i, column in enumerate(columns) if len(column) > 1)
    parts = [[f for f in found if f[split] == value] for value in sorted(columns[split])]
    return [block for part in parts for block in _blocks(part)]


def _fill(pattern: str, block: list[tuple[int, ...]]) -> str:
    for column in zip(*block, strict=True):
        pattern = pattern.replace("#", _range(sorted(set(column))), 1)
    return pattern


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    step = numbers[1] - numbers[0]
    if numbers == list(range(numbers[0], numbers[-1] + 1, step)) and len(numbers) > 2:
        dots = "..." if step == 1 else f",{numbers[1]}..."
        return f"{{{numbers[0]}{dots}{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
