"""The way back: a checkpoint's arrays from the converted tensors, by undoing the same forms.

The mapping is not written a second time: `restore` walks the very edges that `expand` made, and
`reverse` turns them round, for a conversion from Hugging Face to MaxText: a released tensor that is
quantised becomes numbers on the way, with its scales as a companion. It is exact wherever the
edges are; where a factor rounds, the way back is within one unit of the last place. Companions,
such as scales, are not in the tensors: they are given, and what was stored with them comes back
exactly.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moeconv.arch.layout import Layout
from moeconv.errors import TensorError, UnsupportedError
from moeconv.mapping.edges import Edge, Part, is_covered
from moeconv.mapping.rules import Target
from moeconv.tensor.axes import Array
from moeconv.tensor.companion import Companion
from moeconv.tensor.dtypes import bits
from moeconv.tensor.form import Form
from moeconv.tensor.quantised import Dequantise, Scales
from moeconv.tensor.values import ValueOp
from moeconv.untrusted.text import listing


@dataclass(frozen=True)
class Origin:
    """The values of a tensor that a reversed part reads, as an array of its own.

    Attributes:
        tensor: The tensor's name.
        base: Values of the tensor before the first.
        shape: Their shape, with the axes of the part's form.
    """

    tensor: str
    base: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The tensor's; of several in one tensor each has its range behind it."""
        stop = self.base + math.prod(self.shape)
        return f"{self.tensor}[{self.base}:{stop}]" if self.base else self.tensor


def reverse(
    edges: Iterable[Edge],
    family: Target,
    layout: Layout,
    stored: Mapping[str, str],
    scales: Mapping[str, Scales] | None = None,
) -> tuple[tuple[Edge, ...], dict[str, Origin]]:
    """The edges back: one for each array of a checkpoint, made of the tensors that it becomes.

    A tensor that another rule makes of the same array (an untied head that is the embedding, the
    copies of a dense MLP) is not read for it.

    Args:
        edges: From `expand`, for the layout, with the dtypes that its arrays are to have.
        family: The page that they are of.
        layout: The checkpoint's.
        stored: Dtype of every tensor.
        scales: Of those that are quantised; they are read beside the tensor, as its companion.

    Returns:
        The edges, in the order of the layout, and what their parts read, by name.

    Raises:
        TensorError: An array would not be made of them, or not wholly, or scales do not fit.
        UnsupportedError: A quantised tensor is scaled, or joined within a block.
        ValueError: A value op has no way back.
    """
    parts: dict[str, list[Part]] = {}
    rules: dict[str, int] = {}
    origins: dict[str, Origin] = {}
    for edge in edges:
        if family.rules[edge.rule].shared or not edge.is_first_copy:
            continue
        for part in edge.parts:
            form = part.form.inverse(stored[edge.target])
            if (beside := (scales or {}).get(edge.target)) is not None:
                value, other = _dequantised(edge, part.form, form, stored[edge.target], beside)
                form = replace(form, value=value)
                origins[other.name] = other
            origin = Origin(edge.target, part.form.base, part.form.target_shape)
            origins[origin.name] = origin
            parts.setdefault(part.source, []).append(Part(origin.name, form))
            rules.setdefault(part.source, edge.rule)
    back = [
        Edge(
            array.name,
            array.shape,
            parts[array.name][0].form.value.target,
            tuple(parts[array.name]),
            rules[array.name],
            array.layers[0] if len(array.layers) == 1 else None,
        )
        for array in layout.arrays
        if array.name in parts
    ]
    made = {edge.target for edge in back if is_covered(edge)}
    if lost := [array.name for array in layout.arrays if array.name not in made]:
        raise TensorError(f"no tensor becomes all of these parameters:{listing(lost)}")
    return tuple(back), origins


def _dequantised(
    edge: Edge, there: Form, back: Form, stored: str, scales: Scales
) -> tuple[Dequantise, Origin]:
    """What makes numbers of a part of a quantised tensor, and the scales that it reads.

    Args:
        edge: How the tensor is made.
        there: The part's form.
        back: Its inverse.
        stored: Dtype of the tensor.
        scales: The tensor's.
    """
    if there.value.fold is not None:
        raise UnsupportedError(
            f"{edge.target} is quantised, and {there.value.fold.why} is folded into its parameter, "
            "which would round its numbers twice; give another --block"
        )
    if len(scales.shape) != len(edge.shape) or len(scales.blocks) != len(edge.shape):
        raise TensorError(
            f"{scales.name} {list(scales.shape)} does not hold the scales of {edge.target} "
            f"{list(edge.shape)}"
        )
    before = there.base // math.prod(edge.shape[1:])
    first, *behind = scales.blocks
    if before % first:
        raise UnsupportedError(
            f"{edge.target} is made of parts that do not end with a block of {first}"
        )
    rows = -(-there.shape[0] // first) if there.shape != edge.shape else scales.shape[0]
    shape = (rows, *scales.shape[1:])
    origin = Origin(scales.name, before // first * math.prod(scales.shape[1:]), shape)
    axes = tuple(
        " ".join(group) + (f"/{block}" if block > 1 else "")
        for group, block in zip(there.rearrange.right, (first, *behind), strict=True)
    )
    sizes = {axis: back.sizes[axis] for axis in back.axes}
    other = Companion(origin.name, axes, sizes, back.take)
    if misfit := other.misfit(shape):
        raise TensorError(
            f"{scales.name} {list(scales.shape)} does not hold the scales of {edge.target} "
            f"{list(edge.shape)}: it has {misfit}"
        )
    try:
        value = Dequantise(
            stored, there.value.source, back.free, other, scales.dtype, through=scales.through
        )
    except ValueError as error:
        raise UnsupportedError(f"{edge.target} cannot be dequantised: {error}") from None
    return value, origin


def _lacking(name: str) -> Array:
    raise TensorError(f"no converted tensor holds {name}, which is read beside another array")


def restore_part(
    edge: Edge, part: Part, tensor: Array, companion: Callable[[str], Array] = _lacking
) -> Array:
    """Undoes one part of an edge.

    Args:
        edge: How the tensor was made.
        part: One of its parts.
        tensor: The tensor, of shape `edge.shape`.
        companion: Gives a companion of the source array by its name.

    Returns:
        The entry of the source array that it came from: the source's axes less the taken ones.

    Raises:
        TensorError: Padding is not zero, or the companions are not given.
    """
    apart = edge.part_of(tensor, part)
    if any(np.any(apart[box]) for box in part.form.padding()):
        raise TensorError(f"{edge.target}: the padding of an MLP is not zero")
    form = part.form
    others = form.others(form.whole, lambda name, box: companion(name)[box])
    return form.undo(apart[form.box(form.whole)], others)


def restore(
    edges: Iterable[Edge],
    read: Callable[[str], Array],
    companion: Callable[[str], Array] = _lacking,
) -> dict[str, Array]:
    """Rebuilds every source array but the companions.

    Args:
        edges: From `expand`.
        read: Gives a target tensor by name.
        companion: Gives a companion by name, where the edges have any.

    Returns:
        Arrays by the checkpoint's dotted names, in the checkpoint's dtypes.

    Raises:
        TensorError: Copies of one tensor differ, or a filled tensor does not hold its value,
            or companions are not given.
    """
    arrays: dict[str, Array] = {}
    seen: dict[tuple[str, tuple[tuple[str, int], ...]], tuple[str, ValueOp]] = {}
    for edge in edges:
        tensor = read(edge.target)
        if not edge.parts and not np.array_equal(tensor, np.full_like(tensor, edge.fill)):
            raise TensorError(f"{edge.target} should be {edge.describe()}")
        for part in edge.parts:
            values, name, take = (
                restore_part(edge, part, tensor, companion),
                part.source,
                part.form.take,
            )
            if name not in arrays:
                shape = [part.form.sizes[axis] for axis in part.form.axes]
                arrays[name] = np.empty(shape, values.dtype)
            place = tuple(take.get(axis, slice(None)) for axis in part.form.axes)
            key = (name, tuple(sorted(take.items())))
            if key in seen:
                first, value = seen[key]
                if not _same(arrays[name][place], values, {value, part.form.value}):
                    raise TensorError(f"{edge.target} should be a copy of {first}, but differs")
                continue
            seen[key] = edge.target, part.form.value
            arrays[name][place] = values
    return arrays


def _same(one: Array, other: Array, values: Collection[ValueOp]) -> bool:
    """True if two copies are one; if their values were changed apart, as near as that rounds."""
    if len(values) == 1:
        return np.array_equal(bits(one), bits(other))
    wide = one.astype(np.float64)
    slack = max(value.undo_bound(float(np.abs(wide).max(initial=0.0))) for value in values)
    return bool((np.abs(wide - other.astype(np.float64)) <= slack).all())
