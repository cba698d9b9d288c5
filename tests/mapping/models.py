"""Hypothesis strategies: models of every supported shape, as checkpoint arrays and what is told."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import synthetic
from hypothesis import strategies as st

from moeconv.arch.config_sources import ResolvedConfig, from_flags, from_mapping
from moeconv.arch.description import ModelDescription, Origin, Provenance
from moeconv.arch.detection import detect_layout
from moeconv.arch.layout import Layout
from moeconv.arch.parameters import LayerKind
from moeconv.arch.resolve import resolve
from moeconv.arch.stacks import CYCLED
from moeconv.families import blocks
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
    block = draw(st.sampled_from(sorted(synthetic.BLOCKS)))
    page = blocks()[block]
    scanned = draw(st.booleans()) and synthetic.can_scan(block)
    axis = draw(st.sampled_from([0, 1, 2]))
    cycled = CYCLED in page.stackings
    cycle = draw(st.integers(1, 3)) if cycled else 1
    depth = draw(st.integers(1, 3))
    first = draw(st.sampled_from(list(page.layers)))
    alike = [kind for kind in page.layers if kind.attention == first.attention]
    kinds = draw(st.lists(st.sampled_from(alike), min_size=cycle, max_size=cycle))
    if block in synthetic.FOLLOWING:  # dense layers, then such with experts, more or less of both
        moe = draw(st.sampled_from([kind for kind in page.layers if kind.mlp == "moe"]))
        dense = next(k for k in page.layers if k.mlp == "dense" and k.attention == moe.attention)
        kinds = [dense] * draw(st.integers(0, 2)) + [moe] * draw(st.sampled_from([1, 3]))
        cycle, depth = len(kinds), 1
    if block in synthetic.PATTERNS:
        halves = {kind.mlp for kind in page.layers}
        half = draw(st.sampled_from(sorted(halves)))
        kinds = [LayerKind(kind.replace("moe", half)) for kind in synthetic.PATTERNS[block]]
        cycle, depth = len(kinds), draw(st.integers(1, 2)) if synthetic.can_scan(block) else 1
    rest = 0
    if block in synthetic.LAST:  # layers of one kind, the last of another, and some of the first
        local = draw(st.sampled_from([kind for kind in page.layers if kind.attention == "linear"]))
        last = next(k for k in page.layers if k.variant == local.variant and k != local)
        kinds = [local] * draw(st.integers(1, 3)) + [last]
        cycle = len(kinds)
        rest = draw(st.integers(0, cycle - 1)) if synthetic.keeps_rest(block) else 0
    if block in synthetic.ONE_WIDTH:  # their targets are for models with experts
        kinds[-1] = next(kind for kind in page.layers if kind.mlp == "moe")
    kv = draw(st.sampled_from([1, 2, 3]))
    width = draw(st.sampled_from([5, 8, 11]))
    same = not cycled or draw(st.booleans())
    sizes = {
        "V": draw(st.sampled_from([13, 17])),
        "D": draw(st.sampled_from([7, 16, 23])),
        "K": kv,
        "H": kv * draw(st.sampled_from([1, 2])),
        "h": draw(st.sampled_from([4, 6])),
        "E": draw(st.sampled_from([2, 4])),
        "M": width,
        "F": width if same else width + 3,
        "S": width if block in synthetic.ONE_WIDTH else 2 * width,
        **{axis: synthetic.SIZES[axis] for axis in "qcvrkbuwdWtyCZJjPxfpAUIi"},
    }
    sizes |= {"n": sizes["H"] * sizes["h"], "m": kv * sizes["h"]}
    sizes |= {"O": sizes["n"], "Q": 2 * sizes["h"]}
    if block in synthetic.WHOLE_SHARES:
        sizes["D"] = sizes["H"] * draw(st.sampled_from([3, 8]))
    if block in synthetic.ONE_KV:
        sizes["J"] = sizes["K"]
    if block in synthetic.FULL_HEADS:
        sizes["D"] = sizes["n"]
    tied = draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    made = synthetic.layout_of(
        block,
        layers=(cycle * depth + rest) * page.stackings[0].paired,
        tied=tied,
        scanned=scanned,
        axis=axis,
        sizes=sizes,
        kinds=kinds,
    )
    arrays = {
        array.path: rng.standard_normal(array.shape).astype(DTYPES[dtype]) for array in made.arrays
    }
    told = {
        "num_experts_per_tok": draw(st.sampled_from([1, 2])),
        "rope_type": draw(
            st.sampled_from([rope for rope in page.ropes if rope != "yarn"] or ["yarn"])
        ),
        "rope_use_scale": draw(st.booleans()),
        "normalize_embedding_logits": draw(st.booleans()),
        "param_scan_axis": axis,
        "max_target_length": 64,  # of which there may be learned positions
        **{
            k: v for k, v in synthetic.BLOCKS[block].items() if k not in {*page.shown, *page.shapes}
        },
    }
    if "routed_bias" in told:
        told["routed_bias"] = any(kind.variant == "bias" for kind in kinds)
    if "emb_dim" in told:
        told["emb_dim"] = sizes["D"]
    layout = detect_layout(
        {p: a.shape for p, a in arrays.items()},
        [page],
        scan_axis=axis if scanned else None,
    )
    config = ResolvedConfig(
        from_mapping(told, Provenance(Origin.CONFIG, "sample.yml")), from_flags([])
    )
    return Sample(
        arrays,
        layout,
        resolve(layout, config).model(),
        {".".join(p): dtype for p in arrays},
        told,
        "scanned" if scanned else "unscanned",
    )
