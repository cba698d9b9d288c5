"""How decoders keep their layers: one value that detects a layout, describes it and builds it.

MaxText keeps a layer in a module of its own (`layers_3`), or those of several layers stacked in
the arrays of one module. A `Stacking` is a list of segments, in the order of the layers; a segment
is a block of modules, repeated along the stacked axis of their arrays where they have one:

    unscanned   layers_{}             one array a layer (scan_layers=false)
    scanned     layers                entry i is layer i (scan_layers=true)
    cycled      layers.layers_{}      C modules: entry i of module j is layer C·i + j
    prefixed    dense_layers, moe_layers         one segment after the other
    remainder   layers.layers_{}, layers_remainder.layers_{}     what does not fill a block
    nested      layers.local_layers, layers.global_layer         a block of several layers in one
                module, on a second stacked axis, and one layer in another
    paired      layers, names with _local and _global            two layers in one module

In the stacked layouts the layer axis stands at `param_scan_axis` (MaxText's default 1) of every
parameter that has so many axes, and at 0 of the others (layers/nnx_decoders.py
`_create_scanned_layers`, `_init_scanned_generic`, `_init_sequential_generic`; layers/nnx_scan.py).
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from moeconv.arch.parameters import LayerKind, Layers

KeyPath = tuple[str, ...]

# The axis of repeated blocks, and that of a block's layers in one module.
STACKED, NESTED = "L", "l"

EVERY = Layers()

# One way to write each number, so that no two names mean the same layer.
_NUMBER = "(0|[1-9][0-9]{0,8})"


@dataclass(frozen=True)
class Module:
    """Modules below `decoder` that hold layers.

    Attributes:
        pattern: Their dotted name; `{}` is a number from 0 on.
        stacked: True if their arrays have a layer axis.
        nested: True if they have another one inside of it, for the block's layers in this module.
        suffix: Behind the first word of every name in them, where one module holds two layers
            (`self_attention_local`).
        kinds: Of all its layers, where that is what distinguishes segments.
        attentions: The kinds of attention that its layers may have, by their number in turn, where
            layers of different sizes have parameters of the same names; empty for any.
    """

    pattern: str
    stacked: bool = False
    nested: bool = False
    suffix: str = ""
    kinds: Layers = EVERY
    attentions: tuple[frozenset[str], ...] = ()

    def may_have(self, kind: LayerKind, number: int) -> bool:
        """True if its layer of that number can be of this kind."""
        turn = self.attentions
        return not turn or kind.attention in turn[number % len(turn)]

    @property
    def numbered(self) -> bool:
        """True if there are several."""
        return "{}" in self.pattern

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.pattern).replace(r"\{\}", _NUMBER) + r"\.(?=.)")

    def place(self, path: KeyPath) -> tuple[int, str] | None:
        """The number of the module that a path leads into, and the name of the parameter there."""
        if path[0] != "decoder":
            return None
        match = self._expression.match(inside := ".".join(path[1:]))
        if match is None:
            return None
        name = inside[match.end() :]
        first, dot, rest = name.partition(".")
        if not first.endswith(self.suffix):
            return None
        name = first.removesuffix(self.suffix) + dot + rest
        return (int(match[1]) if self.numbered else 0), name

    def path(self, number: int, name: str) -> KeyPath:
        """Where a parameter of a module is stored; the inverse of `place`."""
        first, dot, rest = name.partition(".")
        inside = f"{self.pattern.format(number)}.{first}{self.suffix}{dot}{rest}"
        return ("decoder", *inside.split("."))

    def name(self, number: int) -> str:
        """Of one of the modules, for people."""
        return f"decoder.{self.pattern.format(number)}{self.suffix}"


@dataclass(frozen=True)
class Segment:
    """A block of layers, one from each module, and its repetitions along the stacked axis.

    Attributes:
        modules: In the order of the layers.
        optional: True if a model may have no layer in it.
    """

    modules: tuple[Module, ...]
    optional: bool = False

    @property
    def stacked(self) -> bool:
        """True if the block is repeated."""
        return self.modules[0].stacked

    @property
    def paired(self) -> int:
        """The layers that one of its modules holds, told apart by a suffix."""
        return len(self.modules) // len({module.pattern for module in self.modules})

    def order(self, position: int, number: int) -> tuple[int, int, int]:
        """Sorts modules by their layers; those of one name that hold several stay together."""
        together = len({module.pattern for module in self.modules}) == 1
        return (number if together else position, position, number)


@dataclass(frozen=True)
class Stacking:
    """A way to keep layers.

    Attributes:
        name: For people.
        segments: In the order of the layers.
    """

    name: str
    segments: tuple[Segment, ...]

    @property
    def scanned(self) -> bool:
        """MaxText's `scan_layers`."""
        return any(segment.stacked for segment in self.segments)

    @property
    def paired(self) -> int:
        """The layers that one module holds, which MaxText counts as one."""
        return max(segment.paired for segment in self.segments)

    def modules(self, kinds: Sequence[LayerKind]) -> tuple[tuple[int, Module], ...]:
        """The module of each layer and its number, for a way that stacks none."""
        found: list[tuple[int, Module]] = []
        for segment in self.segments:
            first, modules = len(found), segment.modules
            while len(found) < len(kinds) and kinds[len(found)] in modules[0].kinds:
                number, position = divmod(len(found) - first, len(modules))
                found.append((number, modules[position]))
        return tuple(found)

    def place(self, path: KeyPath) -> "Place | None":
        """Where a path's parameter belongs; None if this way keeps nothing there."""
        for number, segment in enumerate(self.segments):
            for position, module in enumerate(segment.modules):
                if (found := module.place(path)) is not None:
                    return Place(number, position, *found)
        return None


@dataclass(frozen=True, order=True)
class Place:
    """A module of a stacking, and a parameter in it.

    Attributes:
        segment: Position of the segment.
        module: Position of the module in it.
        number: Of the module, where there are several.
        name: The parameter's, as every layer has it.
    """

    segment: int
    module: int
    number: int
    name: str


UNSCANNED = Stacking("unscanned", (Segment((Module("layers_{}"),)),))
SCANNED = Stacking("scanned", (Segment((Module("layers", stacked=True),)),))
CYCLED = Stacking("cycled", (Segment((Module("layers.layers_{}", stacked=True),)),))


def nested(blocks: str, local: Collection[str] = (), last: Collection[str] = ()) -> Stacking:
    """Blocks of some layers in one module and a last one in another; then what fills no block.

    Source: layers/nnx_decoders.py `_init_scanned_qwen3_next`, `_init_scanned_gemma4`.

    Args:
        blocks: The module of the blocks.
        local: The attention that all layers but the last of a block may have, if that must be said
            (`Module.attentions`).
        last: The same of the last.
    """
    first, other = (((frozenset(each),) if each else ()) for each in (local, last))
    stack = Module(f"{blocks}.local_layers", stacked=True, nested=True, attentions=first)
    one = Module(f"{blocks}.global_layer", stacked=True, attentions=other)
    rest = Module("layers_remainder.local_layers", stacked=True, attentions=first)
    return Stacking("nested", (Segment((stack, one)), Segment((rest,), optional=True)))


def stacked_axes(axes: tuple[str, ...], scan_axis: int, axis: str) -> tuple[str, ...]:
    """Axes of a stacked parameter: those with too few axes for `scan_axis` are stacked first.

    Source: MaxText layers/nnx_scan.py, which moves the layer axis only where the rank allows it.
    """
    at = scan_axis if len(axes) + 1 > scan_axis else 0
    return (*axes[:at], axis, *axes[at:])


def axes_in(module: Module, axes: tuple[str, ...], scan_axis: int) -> tuple[str, ...]:
    """Axes of a parameter as a module keeps it: the inner stack is made before the outer."""
    if module.nested:
        axes = stacked_axes(axes, scan_axis, NESTED)
    return stacked_axes(axes, scan_axis, STACKED) if module.stacked else axes


def layers_of(widths: Sequence[int], depth: int, first: int) -> Iterator[tuple[int, ...]]:
    """The layers of each module of a segment, in the order of its stacked axes.

    Args:
        widths: Layers of the block in each of its modules, one but for nested ones.
        depth: Repetitions.
        first: Number of the segment's first layer.
    """
    offset = first
    for width in widths:
        yield tuple(
            offset + sum(widths) * entry + inner for entry in range(depth) for inner in range(width)
        )
        offset += width
