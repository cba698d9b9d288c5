"""LoRA: which parameter two factors change, and the tensors of PEFT that they become.

MaxText trains `W + alpha / rank · A·B` with W frozen (qwix `_src/providers/lora.py`
`LoraProvider.dot_general`, `einsum`). A kernel's axes are those that are contracted, then the
others (layers/linears.py `DenseGeneral`), so its factors are

    A   contracted axes, rank        as one axis (`dot_general`) or each apart (`einsum`)
    B   rank, the other axes         likewise

and an expert's axis is the first of either. Stacked layers are at the same axis as in any other
parameter (layers/nnx_scan.py). MaxText's decode server keeps `lora_a.kernel` and `lora_b.kernel`,
each axis apart (utils/lora_utils.py `get_lora_abstract_state_nnx`).

PEFT adds `lora_alpha / r · lora_B·lora_A` to a linear layer's weight [out, in]. So the mapping of a
factor is that of its parameter's own rule: what the rule does to the axes of `in` is done to A,
what it does to those of `out`, and its factor, to B.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from moeconv.arch.layout import Layout, StoredParameter
from moeconv.arch.stacks import NESTED, STACKED, stacked_axes
from moeconv.errors import TensorError, UnsupportedError
from moeconv.mapping.edges import Edge, Part
from moeconv.mapping.rules import Target
from moeconv.tensor.axes import Array, Groups, Rearrangement, flatten
from moeconv.tensor.companion import Companion
from moeconv.tensor.form import Form
from moeconv.tensor.low_rank import LowRankUpdate
from moeconv.tensor.stored import ArrayInfo
from moeconv.tensor.values import Affine, Cast, ValueOp
from moeconv.untrusted.text import listing

RANK, EXPERT = "rank", "E"


@dataclass(frozen=True)
class Side:
    """One factor as it is stored.

    Attributes:
        array: How.
        axes: For each of its axes those of the parameter that it holds; `rank` and the stacked ones
            are axes of their own.
    """

    array: ArrayInfo
    axes: Groups

    @property
    def inner(self) -> tuple[str, ...]:
        """The axes of the parameter in one layer that it has."""
        own = (RANK, STACKED, NESTED)
        return tuple(axis for axis in flatten(self.axes) if axis not in own)


@dataclass(frozen=True)
class LowRank:
    """The change of one parameter.

    Attributes:
        parameter: The array that is changed.
        a: The factor of the contracted axes.
        b: That of the others.
        rank: Size of the axis that they share.
    """

    parameter: StoredParameter
    a: Side
    b: Side
    rank: int


def low_rank(parameter: StoredParameter, scan_axis: int, a: ArrayInfo, b: ArrayInfo) -> LowRank:
    """Finds out which axes of a parameter its two factors have.

    Args:
        parameter: What is changed.
        scan_axis: `param_scan_axis`.
        a: The first factor.
        b: The second.

    Raises:
        TensorError: Their shapes are none that MaxText gives factors of this parameter.
    """
    sizes = dict(zip(parameter.axes, parameter.shape, strict=True))
    for one, other in _ways(parameter.parameter.axes):
        sides = _stacked(one, parameter, scan_axis), _stacked(other, parameter, scan_axis)
        if len(a.shape) != len(sides[0]):
            continue
        rank = a.shape[sides[0].index((RANK,))]
        shapes = [tuple(_size(group, {**sizes, RANK: rank}) for group in side) for side in sides]
        if shapes == [a.shape, b.shape]:
            return LowRank(parameter, Side(a, sides[0]), Side(b, sides[1]), rank)
    raise TensorError(
        f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} are no low-rank factors of "
        f"{parameter.name} {list(parameter.shape)}"
    )


def _ways(axes: tuple[str, ...]) -> Iterator[tuple[Groups, Groups]]:
    """The axes that the factors of a parameter may have in one layer."""
    expert = ((EXPERT,),) if axes[0] == EXPERT and len(axes) > 1 else ()
    plain = axes[len(expert) :]
    for count in range(1, len(plain) + 1):
        inner, outer = plain[:count], plain[count:]
        if expert:
            one, other = _apart(inner), _apart(outer)
            yield (*one, (RANK,)), ((RANK,), *expert, *other)
            yield (*expert, *one, (RANK,)), ((RANK,), *other)
            continue
        for one, other in product(_groupings(inner), _groupings(outer)):
            yield (*one, (RANK,)), ((RANK,), *other)


def _apart(axes: tuple[str, ...]) -> Groups:
    return tuple((axis,) for axis in axes)


def _groupings(axes: tuple[str, ...]) -> list[Groups]:
    return [_apart(axes), (axes,)] if len(axes) > 1 else [_apart(axes)]


def _stacked(groups: Groups, parameter: StoredParameter, scan_axis: int) -> Groups:
    """With the stacked axes where MaxText puts those of any parameter with so many axes."""
    names = [" ".join(group) for group in groups]
    for axis in reversed(parameter.stacked):  # the inner stack is made before the outer
        names = list(stacked_axes(tuple(names), scan_axis, axis))
    return tuple(tuple(name.split()) for name in names)


def _size(group: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in group)


def low_ranks(
    layout: Layout, factors: Mapping[tuple[str, ...], tuple[ArrayInfo, ArrayInfo]]
) -> dict[str, LowRank]:
    """The changes of a model's parameters, by the names of their arrays.

    Args:
        layout: The model's.
        factors: The two factors, by the key path of what they change.

    Raises:
        TensorError: The model has no such parameter, or as `low_rank`.
    """
    arrays = {array.path: array for array in layout.arrays}
    if strange := sorted(".".join(path) for path in factors if path not in arrays):
        raise TensorError(
            "the adapter changes parameters that the base model has not; give the checkpoint that "
            f"it was trained on, in its layout ({layout.describe()}):{listing(strange)}"
        )
    return {
        arrays[path].name: low_rank(arrays[path], layout.scan_axis or 0, a, b)
        for path, (a, b) in factors.items()
    }


def peft_edges(
    edges: Sequence[Edge],
    target: Target,
    changes: Mapping[str, LowRank],
    *,
    dtype: str | None = None,
) -> tuple[Edge, ...]:
    """The tensors of a PEFT adapter: two for each linear layer that is changed.

    Args:
        edges: Of the base model, from `expand`.
        target: What it becomes.
        changes: From `low_ranks`.
        dtype: Of the output; None keeps each array's own.

    Raises:
        UnsupportedError: PEFT has no such adapter; names every parameter, and why.
    """
    found: list[Edge] = []
    refused: dict[str, str] = {}
    for edge in edges:
        for part in edge.parts:
            if (change := changes.get(part.source)) is None:
                continue
            if reason := _unlike_linear(edge, part, change, target):
                refused[part.source] = reason
                continue
            module = edge.target.removesuffix(".weight")
            for letter, side in (("A", change.a), ("B", change.b)):
                form = _form(part.form, side, change.rank, letter, dtype)
                name = f"base_model.model.{module}.lora_{letter}.weight"
                own = Part(side.array.name, form)
                target_dtype = form.value.target
                found.append(Edge(name, form.shape, target_dtype, (own,), edge.rule, edge.layer))
    if refused:
        lines = [f"{name}: {reason}" for name, reason in sorted(refused.items())]
        raise UnsupportedError(
            "a PEFT adapter adds low-rank matrices to linear layers, and cannot hold these changes "
            f"exactly; convert the base with --merge-lora for the merged model:{listing(lines)}"
        )
    return tuple(found)


def _unlike_linear(edge: Edge, part: Part, change: LowRank, target: Target) -> str:
    """Why the change of a part is not one of a linear layer; empty if it is."""
    form = part.form
    if edge.target.endswith(f".{target.probe.router}.weight"):
        return "a router, which is no linear layer in transformers 5"
    if "{E}" in target.rules[edge.rule].target or EXPERT in form.axes:
        return "experts, which are no linear layers in transformers 5"
    if len(edge.parts) > 1:
        return f"it is one of {len(edge.parts)} parts of {edge.target}"
    if len(form.rearrange.right) != 2 or not edge.target.endswith(".weight"):
        return f"{edge.target} is no matrix of a linear layer"
    if form.value.fold is not None and form.value.fold.offset:
        return f"{edge.target} is {form.value.fold.why} of it"
    out, inner = form.rearrange.right
    sides = set(change.a.inner), set(change.b.inner)
    whole = {part: axis for axis, parts in form.split.items() for part in parts}
    if ({whole.get(a, a) for a in inner}, {whole.get(a, a) for a in out}) != sides:
        return f"its factors are not of the two sides of {edge.target}"
    return ""


def _form(base: Form, side: Side, rank: int, letter: str, dtype: str | None) -> Form:
    """What becomes of one layer's factor: the part of its parameter's form that is of its axes."""
    names = tuple(" ".join(group) for group in side.axes)
    taken = {axis: entry for axis, entry in base.take.items() if axis in names}
    sizes = {**base.sizes, RANK: rank}
    sizes |= {name: _size(group, sizes) for name, group in zip(names, side.axes, strict=True)}
    left = tuple(
        tuple(part for axis in group for part in base.split.get(axis, (axis,)))
        for name, group in zip(names, side.axes, strict=True)
        if name not in taken
    )
    out, inner = base.rearrange.right
    right = ((RANK,), inner) if letter == "A" else (out, (RANK,))
    stored = side.array.dtype
    value: ValueOp = Cast(stored, dtype or stored)
    if letter == "B" and base.value.fold is not None:
        value = Affine(base.value.fold, stored, dtype or stored)
    extent = {axis: size for axis, size in base.extent.items() if axis in side.inner}
    return Form(names, sizes, taken, value, Rearrangement(left, right), extent=extent)


def merged_edges(
    edges: Sequence[Edge], changes: Mapping[str, LowRank], scale: float
) -> tuple[Edge, ...]:
    """The tensors of the model with its changes added: `W + scale · A·B`, rounded once.

    Args:
        edges: Of the base model, from `expand`.
        changes: From `low_ranks`.
        scale: alpha / rank.

    Raises:
        UnsupportedError: A parameter that is changed is stored quantised, or a rule adds to it.
    """
    return tuple(
        replace(edge, parts=tuple(_merged(edge, part, changes, scale) for part in edge.parts))
        if any(part.source in changes for part in edge.parts)
        else edge
        for edge in edges
    )


def _merged(edge: Edge, part: Part, changes: Mapping[str, LowRank], scale: float) -> Part:
    if (change := changes.get(part.source)) is None:
        return part
    form, value = part.form, part.form.value
    if value.companions or (value.fold is not None and value.fold.offset):
        raise UnsupportedError(
            f"{edge.target}: {part.source} is {value.describe()}, to which no LoRA adapter can be "
            "merged with one rounding"
        )
    sizes = {axis: form.sizes[axis] for axis in form.axes}
    first, second = (
        Companion(
            side.array.name,
            names := tuple(" ".join(group) for group in side.axes),
            sizes,
            {axis: entry for axis, entry in form.take.items() if axis in names},
        )
        for side in (change.a, change.b)
    )
    update = LowRankUpdate(
        value.source, value.target, form.free, first, second, change.rank, scale, value.fold
    )
    return Part(part.source, replace(form, value=update))


def update(
    change: LowRank, scale: float, read: Callable[[str], Array], take: Mapping[str, int | slice]
) -> Array:
    """What is added to a parameter, in float64: another way than that of `merged_edges`.

    Args:
        change: Its two factors.
        scale: alpha / rank.
        read: Gives an array by its name.
        take: The entry, or the entries, taken of its axes; empty for all of it.

    Returns:
        On the parameter's axes, less those of which one entry is taken.
    """
    alone = {axis for axis, entry in take.items() if isinstance(entry, int)}
    parameter = change.parameter
    sizes = {**dict(zip(parameter.axes, parameter.shape, strict=True)), RANK: change.rank}
    sides, names = [], []
    for side in (change.a, change.b):
        axes = flatten(side.axes)
        apart = read(side.array.name).astype(np.float64).reshape([sizes[axis] for axis in axes])
        sides.append(apart[tuple(take.get(axis, slice(None)) for axis in axes)])
        names.append([axis for axis in axes if axis not in alone])
    left = [axis for axis in parameter.axes if axis not in alone]
    letters = {axis: chr(97 + n) for n, axis in enumerate(dict.fromkeys([*names[0], *names[1]]))}
    inner, outer, whole = ("".join(letters[axis] for axis in each) for each in (*names, left))
    return np.asarray(scale * np.einsum(f"{inner},{outer}->{whole}", *sides))


@dataclass(frozen=True)
class Targeted:
    """What PEFT is asked to change.

    Attributes:
        modules: `target_modules`: the shortest names that mean the adapted modules and no other.
            PEFT takes each for a module's whole name, or for its end behind a dot
            (tuners/tuners_utils.py `check_target_module_exists`).
        parameters: `target_parameters`: weights of modules that are called as a projection of an
            expert is. For such a name PEFT takes the experts, of which transformers 5 makes one
            parameter (peft utils/transformers_weight_conversion.py `_convert_peft_config_moe`).
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def targeted(edges: Sequence[Edge], adapted: Sequence[Edge], target: Target) -> Targeted:
    """What an adapter changes, as PEFT names it.

    Args:
        edges: Of the base model.
        adapted: From `peft_edges`.
        target: What the model becomes.
    """
    start, end = "base_model.model.", ".lora_A.weight"
    own = {e.target[len(start) : -len(end)] for e in adapted if e.target.endswith(end)}
    experts = {_last(rule.target) for rule in target.rules if "{E}" in rule.target}
    hidden = {name for name in own if name.rpartition(".")[2] in experts}
    last = {name.rpartition(".")[2] for name in own - hidden}
    modules = {edge.target.removesuffix(".weight") for edge in edges}
    meant = {name for name in modules if name.rpartition(".")[2] in last}
    short = last if meant == own - hidden else own - hidden
    return Targeted(tuple(sorted(short)), tuple(sorted(f"{name}.weight" for name in hidden)))


def _last(pattern: str) -> str:
    """The last name of a module, of a rule's tensor."""
    return pattern.removesuffix(".weight").rpartition(".")[2]
