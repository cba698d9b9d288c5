"""Rules expanded for one model: an edge for every target tensor.

`expand` is where totality is held: every array of the checkpoint is consumed exactly once (or again
where a rule says so), every target tensor is produced exactly once.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from moeconv.arch.description import ModelDescription
from moeconv.arch.layout import Layout, StoredParameter
from moeconv.errors import TensorError, UnsupportedError
from moeconv.mapping.rules import JOINED, Options, Rule, Target
from moeconv.tensor.axes import ROTARY_LAYOUTS, Array, Rearrangement, flatten, parse_side
from moeconv.tensor.companion import Companion
from moeconv.tensor.dtypes import DTYPES, not_converted
from moeconv.tensor.form import Form
from moeconv.tensor.quantised import Dequantise
from moeconv.tensor.values import Affine, Cast, Fold, ValueOp
from moeconv.untrusted.text import listing

# Parts from which on a line names none of them alone: no rule joins so many.
_MANY = 4


@dataclass(frozen=True)
class Part:
    """One array's share in a tensor.

    Attributes:
        source: Name of the array.
        form: What becomes of it.
    """

    source: str
    form: Form

    @property
    def sources(self) -> tuple[str, ...]:
        """The array, and those that are read beside it."""
        return (self.source, *(other.source for other in self.form.value.companions))


@dataclass(frozen=True)
class Edge:
    """One target tensor and how it is made.

    Attributes:
        target: Tensor name in the output.
        shape: Its shape.
        dtype: Its dtype, a key of `DTYPES`.
        parts: The arrays it comes from: none when it is filled with one value.
        rule: Number of the rule it was expanded from, in the family's table.
        layer: Target layer, None for a tensor outside the layers.
        fill: Value of a tensor without parts.
        copy: Which of how many equal tensors this is, and the axis they stand for.
    """

    target: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]
    rule: int
    layer: int | None
    fill: float = 0.0
    copy: tuple[int, int, str] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the target tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def is_first_copy(self) -> bool:
        """False for the second and any later one of several equal tensors."""
        return self.copy is None or self.copy[0] == 0

    @property
    def sources(self) -> tuple[str, ...]:
        """The arrays it is made from, part by part."""
        return tuple(name for part in self.parts for name in part.sources)

    @property
    def values(self) -> tuple[ValueOp, ...]:
        """What is done to the values of each part."""
        return tuple(part.form.value for part in self.parts)

    def bound(self) -> float:
        """Largest relative error of one value, 0.0 when the edge is exact."""
        return max((value.bound() for value in self.values), default=0.0)

    def apply(self, read: Callable[[str], Array]) -> Array:
        """Makes the tensor from whole arrays: what the engine does block by block.

        Args:
            read: Gives an array by its name.
        """
        if not self.parts:
            return np.full(self.shape, self.fill, DTYPES[self.dtype])
        flat = np.zeros(math.prod(self.shape), DTYPES[self.dtype])
        for part in self.parts:
            form = part.form
            held = {axis: slice(*ends) for axis, ends in form.whole.items()}
            index = tuple(form.take.get(a, held.get(a, slice(None))) for a in form.axes)
            others = form.others(form.whole, lambda name, box: read(name)[box])
            piece = form.run(np.ascontiguousarray(read(part.source)[index]), form.whole, others)
            span = flat[form.base : form.base + math.prod(form.target_shape)]
            start = [form.whole[axis][0] for axis in form.target_axes]
            box = tuple(slice(s, s + n) for s, n in zip(start, piece.shape, strict=True))
            span.reshape(form.target_shape)[box] = piece
        return flat.reshape(self.shape)

    def part_of(self, tensor: Array, part: Part) -> Array:
        """A part of the tensor, with its axes apart, padding and other parts included: a view."""
        form = part.form
        flat = tensor.reshape(-1)[form.base : form.base + math.prod(form.target_shape)]
        return flat.reshape(form.target_shape)

    def steps(self) -> list[str]:
        """What is done, in order."""
        if not self.parts:
            return [f"all {self.fill:g}"]
        found = [step for part in self.parts for step in part.form.steps()]
        return found + ([f"copy to each of {self.copy[1]} {self.copy[2]}"] if self.copy else [])

    def describe(self) -> str:
        """The steps as a line for plans, without the entries that are taken.

        Of an array that many tensors fill, each at its entry, without these entries too.
        """
        left_out = ("[",) if len(self.parts) < _MANY else ("[", "at ")
        steps = [step for step in self.steps() if not step.startswith(left_out)]
        return "; ".join(steps if len(self.parts) < _MANY else dict.fromkeys(steps))


def expand(
    family: Target,
    model: ModelDescription,
    layout: Layout,
    dtypes: Mapping[str, str],
    *,
    dtype: str | None = None,
    narrowed: Mapping[str, str] | None = None,
    options: Options | None = None,
) -> tuple[Edge, ...]:
    """Expands a family's rules to edges.

    Args:
        family: The target.
        model: What the model is.
        layout: Where the checkpoint keeps its parameters.
        dtypes: Dtype of every stored array, by its dotted name.
        dtype: Dtype of the output; None keeps each array's own.
        narrowed: Dtype of what some arrays become, by name, where it is kept.
        options: The user's choices.

    Returns:
        Edges in the order of the rule table: globals, then rule by rule, layer by layer.

    Raises:
        UnsupportedError: The family cannot hold this model.
        TensorError: A parameter is missing, or one would be dropped (all are listed).
    """
    options = options or Options()
    if reason := cannot_hold(family, model):
        raise UnsupportedError(f"--target {family.name} cannot hold this model: {reason}")
    expander = _Expander(family, model, layout, dtypes, dtype, narrowed or {})
    edges = [
        edge
        for number, rule in enumerate(family.rules)
        if rule.when.holds(model, options)
        for edge in expander.edges(number, rule)
    ]
    _check_totality(edges, family, layout)
    return tuple(edges)


def cannot_hold(family: Target, model: ModelDescription) -> str | None:
    """Why a family cannot hold a model; None when it can."""
    foreign = sorted(kind for kind in set(model.layer_kinds) if kind not in family.kinds)
    if foreign:
        return f"{family.architecture} has no {' or '.join(foreign)} layers"
    return family.requires(model)


class _Expander:
    """Expands rules for one model on one checkpoint."""

    def __init__(
        self,
        family: Target,
        model: ModelDescription,
        layout: Layout,
        dtypes: Mapping[str, str],
        dtype: str | None,
        narrowed: Mapping[str, str],
    ) -> None:
        self._family = family
        self._model = model
        self._dtypes = dtypes
        self._dtype = dtype
        self._narrowed = narrowed
        self._held = layout.places

    def edges(self, number: int, rule: Rule) -> Iterator[Edge]:
        """One edge for every layer and expert that the rule writes."""
        model = self._model
        layers: list[int | None] = [None]
        if rule.layers is not None:
            layers = [n for n, kind in enumerate(model.layer_kinds) if kind in rule.layers]
        for layer in layers:
            for expert in range(model.num_experts or 0) if "{E}" in rule.target else [None]:
                target = rule.target.format(L=layer, E=expert)
                if rule.sources:
                    yield replace(self._moved(rule, target, layer, expert), rule=number)
                else:
                    yield replace(self._filled(rule, target, layer), rule=number)

    def _find(self, source: str, layer: int | None) -> StoredParameter:
        """The array that holds a parameter of a layer."""
        try:
            return self._held[source, layer]
        except KeyError:
            where = f" of layer {layer}" if layer is not None else ""
            raise TensorError(f"the checkpoint lacks {source}{where}") from None

    def _filled(self, rule: Rule, target: str, layer: int | None) -> Edge:
        """A tensor without a source; its dtype is that of the layer's norms."""
        model = self._model
        sizes = {"1": 1, "D": model.hidden_size, "E": model.num_experts or 0}
        place = Rearrangement.parse(rule.places[0])
        shape = tuple(sizes[axis] for axis in flatten(place.right))
        norms = (a for (_, n), a in self._held.items() if n == layer and a.parameter.axes == ("D",))
        dtype = self._dtype or self._dtypes[next(norms).name]
        return Edge(target, shape, dtype, (), 0, layer, fill=rule.fill)

    def _moved(self, rule: Rule, target: str, layer: int | None, expert: int | None) -> Edge:
        """A tensor made from one entry of each of a rule's source arrays."""
        parts: list[Part] = []
        for number, name in enumerate(rule.sources):
            source = self._find(name, layer)
            form = self._form(rule, number, source, layer, expert)
            parts.append(Part(source.name, form))
        copy = None
        if expert is not None and "E" not in parts[0].form.axes:
            copy = (expert, self._model.num_experts or 1, "E")
        shape = list(parts[0].form.shape)
        if not parts[0].form.place:  # the parts follow each other
            for number, part in enumerate(parts[1:], 1):
                base = math.prod(shape)
                parts[number] = replace(part, form=replace(part.form, base=base))
                shape[0] += part.form.shape[0]
        dtype = parts[0].form.value.target
        return Edge(target, tuple(shape), dtype, tuple(parts), 0, layer, copy=copy)

    def _form(
        self,
        rule: Rule,
        number: int,
        source: StoredParameter,
        layer: int | None,
        expert: int | None,
    ) -> Form:
        """What becomes of the entry of one of a rule's arrays."""
        sizes = dict(zip(source.axes, source.shape, strict=True))
        if "h" in sizes:
            sizes |= {"rotary": 2, "pair": sizes["h"] // 2}
        text = rule.places[number]
        joined = JOINED in flatten(parse_side(text.partition("->")[2]))
        return Form(
            axes=source.axes,
            sizes=sizes,
            take=_taken(source, layer, expert),
            value=self._value(rule, number, source, layer, expert),
            rearrange=self._rearrangement(rule, f"{JOINED} {text}" if joined else text),
            place={JOINED: (number, len(rule.sources))} if joined else {},
            extent=self._padded(sizes),
        )

    def _value(
        self,
        rule: Rule,
        number: int,
        source: StoredParameter,
        layer: int | None,
        expert: int | None,
    ) -> ValueOp:
        """The value op of one of a rule's arrays: one, so that values are rounded at most once."""
        stored = self._dtypes[source.name]
        factor = rule.scale.value(self._model) if rule.scale is not None else None
        fold = None
        if rule.scale is not None and factor is not None:
            offset = rule.scale.offset
            added = offset(self._model) if callable(offset) else offset
            fold = Fold(factor, rule.scale.text, added, rule.scale.reason)
        if rule.scales:
            scales = self._find(rule.scales[number], layer)
            return self._dequantised(source, scales, fold, layer, expert)
        if stored not in DTYPES:
            raise UnsupportedError(not_converted(source.name, stored))
        dtype = self._dtype or self._narrowed.get(source.name, stored)
        return Affine(fold, stored, dtype) if fold is not None else Cast(stored, dtype)

    def _dequantised(
        self,
        source: StoredParameter,
        scales: StoredParameter,
        fold: Fold | None,
        layer: int | None,
        expert: int | None,
    ) -> ValueOp:
        """A quantised array and its scales as numbers: of the scales' dtype unless one is given."""
        stored, beside = self._dtypes[source.name], self._dtypes[scales.name]
        sizes = dict(zip(source.axes, source.shape, strict=True))
        other = Companion(scales.name, scales.axes, sizes, _taken(scales, layer, expert))
        if misfit := other.misfit(scales.shape):
            raise TensorError(
                f"{scales.name} {list(scales.shape)} does not hold the scales of {source.name} "
                f"{list(source.shape)}: it has {misfit}"
            )
        dtype = self._dtype or (beside if beside in DTYPES else "bfloat16")
        taken = _taken(source, layer, expert)
        free = tuple(axis for axis in source.axes if axis not in taken)
        try:
            return Dequantise(stored, dtype, free, other, beside, fold)
        except ValueError as error:
            raise UnsupportedError(f"{source.name} cannot be dequantised: {error}") from None

    def _rearrangement(self, rule: Rule, place: str) -> Rearrangement:
        """A rule's rearrangement, between rotary orders where source and target differ."""
        source, target = self._model.rotary, self._family.rotary
        if rule.rotary and source != target:
            left, right = place.split("->")
            halves = ROTARY_LAYOUTS[target]
            halves = halves.strip("()") if "(" in right else halves  # within a group of its own
            place = f"{left.replace('h', ROTARY_LAYOUTS[source])}->{right.replace('h', halves)}"
        return Rearrangement.parse(place)

    def _padded(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The MLP width of the target, where that of this array is another."""
        if not self._family.pads_width:
            return {}
        width = max(self._model.intermediate_size or 0, self._model.moe_intermediate_size or 0)
        return {axis: width for axis in ("F", "M") if sizes.get(axis, width) != width}


def _taken(array: StoredParameter, layer: int | None, expert: int | None) -> dict[str, int]:
    """The entry of each axis of an array that one tensor takes."""
    experts = {"E": expert} if expert is not None and "E" in array.axes else {}
    return {**array.entry(layer), **experts}


def _check_totality(edges: list[Edge], family: Target, layout: Layout) -> None:
    twice = [name for name, n in Counter(e.target for e in edges).items() if n > 1]
    if twice:
        raise TensorError(f"the rules would write these tensors twice:{listing(twice)}")
    consumed: dict[tuple[Any, ...], list[int | None]] = {}
    beside: dict[tuple[Any, ...], set[int | None]] = {}
    stacked = {array.name: array.stacked for array in layout.arrays}
    for edge in edges:
        for part in edge.parts:
            if edge.is_first_copy and not family.rules[edge.rule].shared:
                entry = tuple(part.form.take[axis] for axis in stacked[part.source])
                found = consumed.setdefault((part.source, *entry), [])
                found.append(part.form.take.get("E"))
                for other in part.form.value.companions:
                    entry = tuple(other.take[axis] for axis in stacked[other.source])
                    beside.setdefault((other.source, *entry), set()).add(other.take.get("E"))
    holes = [edge.target for edge in edges if edge.parts and not is_covered(edge)]
    if holes:
        raise TensorError(f"the rules do not write all of these tensors:{listing(holes)}")
    wrong = []
    for array in layout.arrays:
        sizes = dict(zip(array.axes, array.shape, strict=True))
        experts = sizes.get("E", 0)
        for entry in product(*(range(sizes[axis]) for axis in array.stacked)):
            taken = consumed.get((array.name, *entry), [])
            # Several tensors may read the same companion; no tensor may be made of it as well.
            taken = taken + sorted(beside.get((array.name, *entry), ()), key=lambda e: e or 0)
            if taken != [None] and taken != list(range(experts)):
                places = [f" [{a}={i}]" for a, i in zip(array.stacked, entry, strict=True)]
                wrong.append(array.name + "".join(places))
    if wrong:
        raise TensorError(
            f"the rules do not consume these parameters exactly once:{listing(wrong)}"
        )


def is_covered(edge: Edge) -> bool:
    """True if the parts of a tensor, each at its own place, make up all of it."""
    places = {(part.form.base, *part.form.place.values()) for part in edge.parts}
    written = sum(math.prod(p.form.piece_shape(p.form.whole)) for p in edge.parts)
    return len(places) == len(edge.parts) and written == math.prod(edge.shape)
