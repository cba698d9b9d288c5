"""Rules expanded for one model: an edge for every target tensor.

`expand` is where totality is held: every array of the checkpoint is consumed exactly once (or again
where a rule says so), every target tensor is produced exactly once.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from moeconv.arch.description import ModelDescription
from moeconv.arch.layout import Layout, StoredParameter, listing
from moeconv.errors import TensorError, UnsupportedError
from moeconv.mapping.axes import ROTARY_LAYOUTS, Array, Rearrangement, flatten
from moeconv.mapping.ops import Cast, Fill, Op, Pad, Rearrange, Replicate, Scale, Slice
from moeconv.mapping.rules import Family, Options, Rule


@dataclass(frozen=True)
class Edge:
    """One target tensor and how it is made.

    Attributes:
        target: Tensor name in the output.
        shape: Its shape.
        dtype: Its dtype, a key of `ops.DTYPES`.
        source: The array it comes from, None when filled.
        ops: What is done, in order; the `Slice`s first.
        sizes: Size of every axis name that the ops use.
        rule: The rule it was expanded from.
        layer: Target layer, None for a tensor outside the layers.
    """

    target: str
    shape: tuple[int, ...]
    dtype: str
    source: StoredParameter | None
    ops: tuple[Op, ...]
    sizes: Mapping[str, int]
    rule: Rule
    layer: int | None

    @cached_property
    def index(self) -> dict[str, int]:
        """Entries taken of stacked axes, e.g. `{"E": 3, "L": 0}`."""
        return {op.axis: op.index for op in self.ops if isinstance(op, Slice)}

    @property
    def nbytes(self) -> int:
        """Bytes of the target tensor."""
        return math.prod(self.shape) * {"float32": 4}.get(self.dtype, 2)

    def bound(self) -> float:
        """Largest relative error of one value, 0.0 when the edge is exact."""
        return sum(op.bound(self.dtype) for op in self.ops)

    def apply(self, array: Array) -> Array:
        """Makes the target tensor from the whole source array, by the ops' own definitions.

        The engine does the same block by block; tests and `verify` hold it against this.
        """
        for op in self.ops:
            array = op.apply(array, self.sizes)
        return array

    def describe(self) -> str:
        """The ops as a line for plans."""
        return "; ".join(op.describe() for op in self.ops if not isinstance(op, Slice)) or "as is"


def expand(
    family: Family,
    model: ModelDescription,
    layout: Layout,
    dtypes: Mapping[str, str],
    *,
    dtype: str | None = None,
    options: Options | None = None,
) -> tuple[Edge, ...]:
    """Expands a family's rules to edges.

    Args:
        family: The target.
        model: What the model is.
        layout: Where the checkpoint keeps its parameters.
        dtypes: Dtype of every stored array, by its dotted name.
        dtype: Dtype of the output; None keeps each array's own.
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
    expander = _Expander(family, model, layout, dtypes, dtype)
    rules = [rule for rule in family.rules if rule.when.holds(model, options)]
    edges = [edge for rule in rules for edge in expander.edges(rule)]
    _check_totality(edges, layout)
    return tuple(edges)


def cannot_hold(family: Family, model: ModelDescription) -> str | None:
    """Why a family cannot hold a model; None when it can."""
    foreign = sorted(set(model.layer_kinds) - family.kinds)
    if foreign:
        return f"{family.architecture} has no {' or '.join(foreign)} layers"
    return family.requires(model)


class _Expander:
    """Expands rules for one model on one checkpoint."""

    def __init__(
        self,
        family: Family,
        model: ModelDescription,
        layout: Layout,
        dtypes: Mapping[str, str],
        dtype: str | None,
    ) -> None:
        self._family = family
        self._model = model
        self._dtypes = dtypes
        self._dtype = dtype
        self._held = layout.places

    def edges(self, rule: Rule) -> Iterator[Edge]:
        """One edge for every layer and expert that the rule writes."""
        model = self._model
        layers: list[int | None] = [None]
        if rule.layers is not None:
            layers = [n for n, kind in enumerate(model.layer_kinds) if kind in rule.layers]
        for layer in layers:
            for expert in range(model.num_experts or 0) if "{E}" in rule.target else [None]:
                target = rule.target.format(L=layer, E=expert)
                if rule.source is None:
                    yield self._filled(rule, target, layer)
                else:
                    yield self._moved(rule, rule.source, target, layer, expert)

    def _find(self, source: str, layer: int | None) -> tuple[StoredParameter, int | None]:
        """The array that holds a parameter of a layer, and the entry of its layer axis."""
        try:
            return self._held[source, layer]
        except KeyError:
            where = f" of layer {layer}" if layer is not None else ""
            raise TensorError(f"the checkpoint lacks {source}{where}") from None

    def _filled(self, rule: Rule, target: str, layer: int | None) -> Edge:
        """A tensor without a source; its dtype is that of the layer's feed-forward norm."""
        model = self._model
        sizes = {"1": 1, "D": model.hidden_size, "E": model.num_experts or 0}
        fill = Fill(rule.fill, flatten(Rearrangement.parse(rule.place).right))
        beside, _ = self._find("post_self_attention_layer_norm.scale", layer)
        dtype = self._dtype or self._dtypes[beside.name]
        return Edge(target, fill.shape((), sizes), dtype, None, (fill,), sizes, rule, layer)

    def _moved(
        self, rule: Rule, name: str, target: str, layer: int | None, expert: int | None
    ) -> Edge:
        """A tensor made from one entry of a source array."""
        source, entry = self._find(name, layer)
        sizes = dict(zip(source.axes, source.shape, strict=True))
        if "h" in sizes:
            sizes |= {"rotary": 2, "pair": sizes["h"] // 2}
        ops: list[Op] = []
        axes = list(source.axes)
        for axis, index in (("L", entry), ("E", expert)):
            if index is not None and axis in axes:
                ops.append(Slice(axis, axes.index(axis), index))
                axes.remove(axis)
        place = self._place(rule)
        ops.append(Rearrange(place))
        ops += self._values(rule, self._dtypes[source.name])
        if (width := self._width()) is not None and sizes.get("F", width) != width:
            ops.append(Pad(place.right.index(("F",)), sizes["F"], width))
        if expert is not None and "E" not in source.axes:
            ops.append(Replicate("E", expert, self._model.num_experts or 1))
        shape = tuple(sizes[axis] for axis in axes)
        for op in ops:
            if not isinstance(op, Slice):
                shape = op.shape(shape, sizes)
        dtype = self._dtype or self._dtypes[source.name]
        return Edge(target, shape, dtype, source, tuple(ops), sizes, rule, layer)

    def _values(self, rule: Rule, stored: str) -> list[Op]:
        """The value op of a rule, if any: at most one, so that values are rounded at most once."""
        dtype = self._dtype or stored
        factor = rule.scale.value(self._model) if rule.scale is not None else None
        if rule.scale is not None and factor is not None:
            return [Scale(factor, rule.scale.text, stored, dtype)]
        return [Cast(stored, dtype)] if dtype != stored else []

    def _place(self, rule: Rule) -> Rearrangement:
        """The rule's rearrangement, between rotary orders where source and target differ."""
        place, source, target = rule.place, self._model.rotary, self._family.rotary
        if rule.rotary and source != target:
            left, right = place.split("->")
            inner = ROTARY_LAYOUTS[target].strip("()")
            place = f"{left.replace('h', ROTARY_LAYOUTS[source])}->{right.replace('h', inner)}"
        return Rearrangement.parse(place)

    def _width(self) -> int | None:
        """The MLP width that every layer of the target has, None where they may differ."""
        if not self._family.pads_width:
            return None
        return max(self._model.intermediate_size or 0, self._model.moe_intermediate_size or 0)


def _check_totality(edges: list[Edge], layout: Layout) -> None:
    twice = [name for name, n in Counter(e.target for e in edges).items() if n > 1]
    if twice:
        raise TensorError(f"the rules would write these tensors twice:{listing(twice)}")
    consumed: dict[tuple[str, int | None], list[int | None]] = {}
    for edge in edges:
        copy = any(isinstance(op, Replicate) and op.index > 0 for op in edge.ops)
        if edge.source is not None and not copy and not edge.rule.again:
            key = edge.source.name, edge.index.get("L")
            consumed.setdefault(key, []).append(edge.index.get("E"))
    wrong = []
    for array in layout.arrays:
        depth = array.shape[array.axes.index("L")] if "L" in array.axes else None
        experts = array.shape[array.axes.index("E")] if "E" in array.axes else 0
        for entry in [None] if depth is None else range(depth):
            taken = consumed.get((array.name, entry), [])
            if taken != [None] and taken != list(range(experts)):
                wrong.append(array.name if entry is None else f"{array.name} [L={entry}]")
    if wrong:
        raise TensorError(
            f"the rules do not consume these parameters exactly once:{listing(wrong)}"
        )
