"""Which arrays of a checkpoint hold which layers: one value that describes it and builds it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeconv.arch.blocks import Block
from moeconv.arch.parameters import LayerKind, Parameter
from moeconv.arch.stacks import (
    NESTED,
    STACKED,
    KeyPath,
    Stacking,
    axes_in,
    layers_of,
)
from moeconv.errors import TensorError


@dataclass(frozen=True)
class StoredParameter:
    """One array of the checkpoint and what it holds.

    Attributes:
        path: Key path below `params.params`, e.g. `("decoder", "layers", "mlp", "wo", "kernel")`.
        parameter: The logical parameter.
        axes: Names of the array's axes, `"L"` among them when layers are stacked, and `"l"` when
            those of a repeated block are stacked too.
        shape: The array's shape, in the same order.
        layers: Layers it holds, in the order of its stacked axes; one layer when unscanned; empty
            for a global parameter.
    """

    path: KeyPath
    parameter: Parameter
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Dotted key path."""
        return ".".join(self.path)

    @property
    def stacked(self) -> tuple[str, ...]:
        """Its stacked axes, the outer one first."""
        return tuple(axis for axis in (STACKED, NESTED) if axis in self.axes)

    def entry(self, layer: int | None) -> dict[str, int]:
        """The entry of each stacked axis at which a layer is stored."""
        if layer is None or not self.stacked:
            return {}
        sizes = [self.shape[self.axes.index(axis)] for axis in self.stacked]
        index = np.unravel_index(self.layers.index(layer), sizes)
        return dict(zip(self.stacked, map(int, index), strict=True))


@dataclass(frozen=True)
class Layout:
    """What the structure of a checkpoint says about its layers.

    Attributes:
        block: The decoder block that has these parameters.
        stacking: The way in which it keeps its layers.
        scan_axis: Position of the layer axis, None when no layers are stacked.
        cycle: Layers of the block that is repeated along it; 1 when unscanned.
        kinds: The kind of every layer, first to last.
        arrays: Every array, in key-path order.
    """

    block: Block
    stacking: Stacking
    scan_axis: int | None
    cycle: int
    kinds: tuple[LayerKind, ...]
    arrays: tuple[StoredParameter, ...]

    @cached_property
    def places(self) -> Mapping[tuple[str, int | None], StoredParameter]:
        """The array that holds a parameter of a layer (None: of the model)."""
        return {
            (array.parameter.name, layer): array
            for array in self.arrays
            for layer in array.layers or (None,)
        }

    def describe(self) -> str:
        """One line for people."""
        if self.scan_axis is None:
            return "unscanned (one array a layer)"
        text = f"scanned (layers stacked on axis {self.scan_axis})"
        if self.cycle > 1 or self.stacking.name == "cycled":
            text += f", interleaved in blocks of {self.cycle}"
        return text


def build_layout(
    block: Block,
    stacking: Stacking,
    kinds: Sequence[LayerKind],
    sizes: Mapping[str, int],
    *,
    blocks: Sequence[tuple[int, int]],
    scan_axis: int = 1,
    tied: bool = False,
    aside: Collection[str] = (),
) -> Layout:
    """The layout that MaxText gives a model: the inverse of `detect_layout`.

    Args:
        block: The decoder block.
        stacking: One of its ways to keep layers.
        kinds: Of every layer.
        sizes: Length of every axis but `L`.
        blocks: For each segment of the stacking, the layers in its block, and how often the block
            is repeated.
        scan_axis: `param_scan_axis`.
        tied: Without an output head of its own.
        aside: Names of parameters that are stored in another collection than `params`.
    """
    head = block.outer[-1].name
    arrays = [
        stored_parameter(tuple(p.name.split(".")), tuple(sizes[a] for a in p.axes), p, p.axes, ())
        for p in block.outer
        if not (tied and p.name == head)
    ]
    first, cycle = 0, 1
    for segment, (size, depth) in zip(stacking.segments, blocks, strict=True):
        if not size * depth:
            continue
        each = size // len(segment.modules)
        places = [
            (position, number)
            for position, module in enumerate(segment.modules)
            for number in range(each if module.numbered else 1)
        ]
        places.sort(key=lambda place: segment.order(*place))
        modules = [(segment.modules[position], number) for position, number in places]
        cycle = max(cycle, size) if segment.stacked else cycle
        alone = sum(not module.nested for module, _ in modules)
        widths = [size - alone if module.nested else 1 for module, _ in modules]
        held = layers_of(widths, depth, first)
        for (module, number), width, layers in zip(modules, widths, held, strict=True):
            stacks = {STACKED: depth, NESTED: width}
            for parameter in block.layers[kinds[layers[0]]]:
                at = 0 if parameter.name in aside else scan_axis
                axes = axes_in(module, parameter.axes, at)
                shape = tuple({**sizes, **stacks}[axis] for axis in axes)
                path = module.path(number, parameter.name)
                arrays.append(stored_parameter(path, shape, parameter, axes, layers))
        first += size * depth
    axis = scan_axis if any(array.stacked for array in arrays) else None
    return Layout(block, stacking, axis, cycle, tuple(kinds), ordered(arrays))


def stored_parameter(
    path: KeyPath,
    shape: tuple[int, ...],
    parameter: Parameter,
    axes: tuple[str, ...],
    layers: tuple[int, ...],
) -> StoredParameter:
    """An array that holds a parameter.

    Raises:
        TensorError: It has another number of axes.
    """
    if len(shape) != len(axes):
        raise TensorError(
            f"{'.'.join(path)} has shape {list(shape)}, but {len(axes)} axes [{' '.join(axes)}] "
            "were expected; it is not a parameter of a supported decoder block"
        )
    return StoredParameter(path, parameter, axes, shape, layers)


def ordered(arrays: Iterable[StoredParameter]) -> tuple[StoredParameter, ...]:
    """Arrays in the order of their key paths."""
    return tuple(sorted(arrays, key=lambda array: array.path))
