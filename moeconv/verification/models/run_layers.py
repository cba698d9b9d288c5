"""Running a model from its embedding to its last layer, and where its parameters come from."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moeconv.arch.layout import Layout
from moeconv.tensor.axes import Array
from moeconv.verification.adapter import MergedAdapter
from moeconv.verification.measure.rounding import Rounding
from moeconv.verification.models.layerwise import LayerwiseModel
from moeconv.verification.models.maxtext import MaxTextModel
from moeconv.verification.models.maxtext_layers import ReadParameter

# Positions whose logits are computed together: at 128k tokens 30 MB.
BLOCK = 64


@dataclass(frozen=True)
class LayersOutput:
    """A model's last hidden states [B, T, D], before the final norm, and its router logits."""

    hidden: Array
    routers: Mapping[int, Array]


def run_layers(model: LayerwiseModel, tokens: Array) -> LayersOutput:
    """Runs every layer of a model over `tokens` [B, T]."""
    hidden, routers = model.embed(tokens), {}
    for number in range(model.num_layers):
        trace = model.layer(number, hidden)
        hidden = trace.output
        if trace.router is not None:
            routers[number] = trace.router
    return LayersOutput(hidden, routers)


def blocks(hidden: Array) -> list[Array]:
    """Hidden states [B, T, D] as pieces [1, N, D], in C order."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    return [flat[:, i : i + BLOCK] for i in range(0, flat.shape[1], BLOCK)]


def parameters_of(model: MaxTextModel, layout: Layout) -> ReadParameter:
    """Parameters of one layer out of a model that is whole in memory."""

    def read(parameter: str, layer: int | None, experts: slice | None = None) -> Array:
        stored = layout.places[parameter, layer]
        entry: dict[str, int | slice] = {**stored.entry(layer)}
        if experts is not None:
            entry["E"] = experts
        box = tuple(entry.get(axis, slice(None)) for axis in stored.axes)
        return np.asarray(model.parameter(stored.name)[box])

    return read


def moved(read: ReadParameter, layout: Layout, weights: Mapping[str, Rounding]) -> ReadParameter:
    """The same parameters, moved as much as the output rounds them."""

    def read_moved(parameter: str, layer: int | None, experts: slice | None = None) -> Array:
        name = layout.places[parameter, layer].name
        value = read(parameter, layer, experts)
        return weights[name].move(value) if name in weights else value

    return read_moved


def merged(read: ReadParameter, layout: Layout, adapter: MergedAdapter | None) -> ReadParameter:
    """The same parameters with what a LoRA adapter adds to them, in float32."""
    if adapter is None:
        return read
    changes = adapter.changes(layout)

    def read_merged(parameter: str, layer: int | None, experts: slice | None = None) -> Array:
        stored = layout.places[parameter, layer]
        value = read(parameter, layer, experts)
        if (change := changes.get(stored.name)) is None:
            return value
        take: dict[str, int | slice] = {**stored.entry(layer)}
        if experts is not None:
            take["E"] = experts
        return (value + adapter.added(change, take)).astype(np.float32)

    return read_merged
