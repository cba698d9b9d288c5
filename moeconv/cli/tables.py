"""Tables of tensors for people: ranges of layers and experts folded into one line."""

import math
import re
from collections.abc import Hashable, Iterable

_NUMBER = re.compile(r"(?<![^._])(\d+)(?![^.])")


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
