"""Hypothesis strategies: models of every supported shape, as checkpoint arrays and what is told."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.arch.layout import Layout, detect_layout
from moeconv.arch.parameters import PARAMETERS, LayerKind
from moeconv.arch.resolve import resolve
from moeconv.arch.told import ToldConfig, from_flags, from_mapping
from moeconv.tensor.dtypes import DTYPES

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A model: its stored arrays, its layout, its description."""

    arrays: dict[KeyPath, np.ndarray]
    layout: Layout
    model: ModelDescription
    dtypes: dict[str, str]
    told: dict[str, Any]
    stacking: str


@st.composite
def samples(
    draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
) -> Sample:
    """Any block, layout, scan axis, sharing of heads, widths, rotary order and dtype."""
    block = draw(st.sampled_from(["mixtral", "envy", "llama2"]))
    stacking = draw(st.sampled_from(["unscanned", "scanned"]))
    axis = draw(st.sampled_from([0, 1, 2]))
    cycle = draw(st.integers(1, 3)) if block == "envy" else 1
    depth = draw(st.integers(1, 3))
    kinds = {
        "mixtral": [LayerKind.MOE],
        "llama2": [LayerKind.DENSE],
        "envy": draw(st.lists(st.sampled_from(list(LayerKind)), min_size=cycle, max_size=cycle)),
    }[block]
    kv = draw(st.sampled_from([1, 2, 3]))
    width = draw(st.sampled_from([5, 8, 11]))
    same = block != "envy" or draw(st.booleans())
    sizes = {
        "V": draw(st.sampled_from([13, 17])),
        "D": draw(st.sampled_from([7, 16, 23])),
        "K": kv,
        "H": kv * draw(st.sampled_from([1, 2])),
        "h": draw(st.sampled_from([4, 6])),
        "E": draw(st.sampled_from([2, 4])),
    }
    widths = {LayerKind.MOE: width, LayerKind.DENSE: width if same else width + 3}
    tied = draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    arrays: dict[KeyPath, np.ndarray] = {}

    def add(path: KeyPath, shape: list[int]) -> None:
        arrays[path] = rng.standard_normal(shape).astype(DTYPES[dtype])

    for parameter in PARAMETERS.values():
        name = tuple(parameter.name.split("."))
        if parameter.layers is None:
            if parameter.name != "decoder.logits_dense.kernel" or not tied:
                add(name, [sizes[a] for a in parameter.axes])
            continue
        for slot, kind in enumerate(kinds):
            if kind not in parameter.layers:
                continue
            shape = [sizes.get(a, widths[kind]) for a in parameter.axes]
            if stacking == "unscanned":
                for i in range(depth):
                    add(("decoder", f"layers_{i * len(kinds) + slot}", *name), shape)
            else:
                at = axis if len(shape) + 1 > axis else 0
                inner = (f"layers_{slot}",) if block == "envy" else ()
                add(("decoder", "layers", *inner, *name), [*shape[:at], depth, *shape[at:]])
    told = {
        "decoder_block": block,
        "num_experts_per_tok": draw(st.sampled_from([1, 2])),
        "rope_type": draw(st.sampled_from(["default", "llama3.1"])),
        "rope_use_scale": draw(st.booleans()),
        "normalize_embedding_logits": draw(st.booleans()),
        "param_scan_axis": axis,
    }
    layout = detect_layout(
        {p: a.shape for p, a in arrays.items()},
        scan_axis=axis if stacking == "scanned" else None,
    )
    config = ToldConfig(from_mapping(told, Provenance(Origin.CONFIG, "sample.yml")), from_flags([]))
    return Sample(
        arrays,
        layout,
        resolve(layout, config).model(),
        {".".join(p): dtype for p in arrays},
        told,
        stacking,
    )
