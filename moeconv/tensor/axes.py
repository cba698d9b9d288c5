"""Rearrangements of named axes, written as `D H h -> (H h) D`.

Each side lists axes in memory order, outermost first; parentheses fuse axes into one. Both sides
name the same axes, so a rearrangement only places values: it is exact for every dtype and has an
inverse, which is the same text read backwards.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Groups = tuple[tuple[str, ...], ...]
Sizes = Mapping[str, int]
Range = tuple[int, int]
Ranges = Mapping[str, Range]
Box = tuple[slice | int, ...]

_TOKEN = re.compile(r"\(([^()]*)\)|(\S+)")

# The two halves that rotary embedding rotates against each other, and the pairs of them.
# Half rotation (Hugging Face's `rotate_half`) stores [a0 … an b0 … bn]: rotary half outermost.
# Interleaved (pairwise) stores [a0 b0 a1 b1 …]: rotary half innermost.
ROTARY_LAYOUTS = {"half": "(rotary pair)", "interleaved": "(pair rotary)"}


def blocked(axis: str) -> tuple[str, int]:
    """The axis, or the fused axes, that an axis like `D/128` counts the blocks of, and their size.

    Returns:
        `("D", 128)`; of `D/*`, one block as long as the axis, `("D", 0)`; of `D` itself
        `("D", 1)`.

    Raises:
        ValueError: The size is no positive number.
    """
    name, slash, size = axis.partition("/")
    if not slash:
        return axis, 1
    if size != "*" and int(size) < 1:
        raise ValueError(f"axis {axis!r} has blocks without values")
    return name, 0 if size == "*" else int(size)


def parse_side(text: str) -> Groups:
    """Parses one side of a rearrangement into groups of axes."""
    groups = []
    for fused, single in _TOKEN.findall(text):
        groups.append(tuple(fused.split()) if fused else (single,))
    return tuple(groups)


def flatten(groups: Groups) -> tuple[str, ...]:
    """All axes of a side, outermost first."""
    return tuple(axis for group in groups for axis in group)


@dataclass(frozen=True)
class Rearrangement:
    """A placement of named axes; `apply` maps an array of the left side to the right side.

    Raises:
        ValueError: The sides do not name the same axes once each.
    """

    left: Groups
    right: Groups

    @classmethod
    def parse(cls, text: str) -> "Rearrangement":
        """Parses `D H h -> (H h) D`."""
        left, arrow, right = text.partition("->")
        if not arrow:
            raise ValueError(f"rearrangement {text!r} has no '->'")
        return cls(parse_side(left), parse_side(right))

    def __post_init__(self) -> None:
        left, right = flatten(self.left), flatten(self.right)
        if sorted(left) != sorted(right) or len(set(left)) != len(left):
            raise ValueError(f"the sides of {self} do not name the same axes once each")

    def __str__(self) -> str:
        def side(groups: Groups) -> str:
            return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)

        return f"{side(self.left)} -> {side(self.right)}"

    @cached_property
    def permutation(self) -> tuple[int, ...]:
        """Positions of the right side's axes among the left side's, both unfused."""
        left = flatten(self.left)
        return tuple(left.index(axis) for axis in flatten(self.right))

    @property
    def is_identity(self) -> bool:
        """Returns True if memory order is unchanged (fusing and splitting alone move nothing)."""
        return flatten(self.left) == flatten(self.right)

    @property
    def inverse(self) -> "Rearrangement":
        """The rearrangement back."""
        return Rearrangement(self.right, self.left)

    def split_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The left side's shape with every axis apart."""
        return tuple(sizes[axis] for axis in flatten(self.left))

    def left_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape `apply` takes."""
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.left)

    def right_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """The shape `apply` gives."""
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.right)

    def apply(self, array: Array, sizes: Sizes) -> Array:
        """Rearranges an array of shape `left_shape(sizes)`; the result is C-contiguous."""
        apart = array.reshape(self.split_shape(sizes)).transpose(self.permutation)
        return np.ascontiguousarray(apart).reshape(self.right_shape(sizes))
