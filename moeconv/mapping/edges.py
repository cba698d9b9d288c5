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
    finder = _Finder(layout)
    edges: list[Edge] = []
    for rule in family.rules:
        if rule.when.holds(model, options):
            edges += _expand_rule(rule, family, model, finder, dtypes, dtype)
    _check_totality(edges, layout)
    return tuple(edges)


def cannot_hold(family: Family, model: ModelDescription) -> str | None:
    """Why a family cannot hold a model; None when it can."""
    foreign = sorted(set(model.layer_kinds) - family.kinds)
    if foreign:
        return f"{family.architecture} has no {' or '.join(foreign)} layers"
    return family.requires(model)


class _Finder:
    """Finds the array, and the entry of its layer axis, that holds a parameter of a layer."""

    def __init__(self, layout: Layout) -> None:
        self._held: dict[tuple[str, int | None], tuple[StoredParameter, int | None]] = {}
        for array in layout.arrays:
            for entry, layer in enumerate(array.layers):
                stacked = entry if "L" in array.axes else None
                self._held[array.parameter.name, layer] = (array, stacked)
            if not array.layers:
                self._held[array.parameter.name, None] = (array, None)

    def find(self, source: str, layer: int | None) -> tuple[StoredParameter, int | None]:
        try:
            return self._held[source, layer]
        except KeyError:
            where = f" of layer {layer}" if layer is not None else ""
            raise TensorError(f"the checkpoint lacks {source}{where}") from None


def _place(rule: Rule, family: Family, model: ModelDescription) -> Rearrangement:
    place = rule.place
    if rule.rotary and model.rotary != family.rotary:
        left, right = place.split("->")
        source, target = ROTARY_LAYOUTS[model.rotary], ROTARY_LAYOUTS[family.rotary].strip("()")
        place = f"{left.replace('h', source)}->{right.replace('h', target)}"
    return Rearrangement.parse(place)


def _expand_rule(
    rule: Rule,
    family: Family,
    model: ModelDescription,
    finder: _Finder,
    dtypes: Mapping[str, str],
    dtype: str | None,
) -> Iterator[Edge]:
    layers: list[int | None] = [None]
    if rule.layers is not None:
        layers = [n for n, kind in enumerate(model.layer_kinds) if kind in rule.layers]
    for layer in layers:
        for expert in range(model.num_experts or 0) if "{E}" in rule.target else [None]:
            yield _edge(rule, family, model, finder, dtypes, dtype, layer, expert)


def _edge(
    rule: Rule,
    family: Family,
    model: ModelDescription,
    finder: _Finder,
    dtypes: Mapping[str, str],
    dtype: str | None,
    layer: int | None,
    expert: int | None,
) -> Edge:
    target = rule.target.format(L=layer, E=expert)
    if rule.source is None:
        filled = flatten(Rearrangement.parse(rule.place).right)
        sizes = {"1": 1, **_model_sizes(model)}
        fill = Fill(rule.fill, filled)
        kept = dtypes[_neighbour(finder, layer).name]
        return Edge(target, fill.shape((), sizes), dtype or kept, None, (fill,), sizes, rule, layer)

    source, entry = finder.find(rule.source, layer)
    sizes = dict(zip(source.axes, source.shape, strict=True))
    if "h" in sizes:
        sizes |= {"rotary": 2, "pair": sizes["h"] // 2}
    ops: list[Op] = []
    axes = list(source.axes)
    for axis, index in (("L", entry), ("E", expert)):
        if index is not None and axis in axes and (axis == "L" or "{E}" in rule.target):
            ops.append(Slice(axis, axes.index(axis), index))
            axes.remove(axis)
    ops.append(Rearrange(_place(rule, family, model)))
    stored = dtypes[source.name]
    factor = rule.scale.value(model) if rule.scale is not None else None
    if rule.scale is not None and factor is not None:
        ops.append(Scale(factor, rule.scale.text, stored, dtype or stored))
    if family.pads_width and "F" in sizes:
        width = max(model.intermediate_size or 0, model.moe_intermediate_size or 0)
        if width != sizes["F"]:
            ops.append(Pad(_axis_of("F", ops), sizes["F"], width))
    if expert is not None and "E" not in source.axes:
        ops.append(Replicate("E", expert, model.num_experts or 1))
    if factor is None and dtype is not None and dtype != stored:
        ops.append(Cast(stored, dtype))
    shape = tuple(n for a, n in zip(source.axes, source.shape, strict=True) if a in axes)
    for op in ops:
        if not isinstance(op, Slice):
            shape = op.shape(shape, sizes)
    return Edge(target, shape, dtype or stored, source, tuple(ops), sizes, rule, layer)


def _axis_of(axis: str, ops: list[Op]) -> int:
    """Position of an axis in the arrangement the ops have reached."""
    place = next(op.by for op in ops if isinstance(op, Rearrange))
    return next(i for i, group in enumerate(place.right) if group == (axis,))


def _model_sizes(model: ModelDescription) -> dict[str, int]:
    return {"D": model.hidden_size, "V": model.vocab_size, "E": model.num_experts or 0}


def _neighbour(finder: _Finder, layer: int | None) -> StoredParameter:
    """The array whose dtype a filled tensor takes: the layer's feed-forward norm."""
    return finder.find("post_self_attention_layer_norm.scale", layer)[0]


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
