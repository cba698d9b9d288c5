"""Ways to keep layers, as MaxText itself keeps them: trees of MaxText 0.2.5 at toy sizes.

tests/fixtures/maxtext_trees.json has for every array its shape, its shape in one layer, where its
stacked axes are, and the layers it holds. All axes but those of layers have lengths of their own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import synthetic

from moeconv.arch.blocks import Block
from moeconv.arch.config_sources import ResolvedConfig, from_mapping
from moeconv.arch.description import Origin, Provenance
from moeconv.arch.detection import detect_layout
from moeconv.arch.layout import build_layout
from moeconv.arch.parameters import DENSE, EMBEDDING, FINAL_NORM, OUTPUT_HEAD, LayerKind, Parameter
from moeconv.arch.resolve import resolve
from moeconv.arch.stacks import (
    CYCLED,
    SCANNED,
    UNSCANNED,
    Module,
    Segment,
    Stacking,
    nested,
)
from moeconv.errors import TensorError
from moeconv.families._shared import ATTENTION_PARAMETERS, MLP_PARAMETERS

TREES = json.loads((Path(__file__).parents[1] / "fixtures" / "maxtext_trees.json").read_text())


def segment(*modules: Module) -> Segment:
    return Segment(modules)


def scanned(pattern: str, **more) -> Module:
    return Module(pattern, stacked=True, **more)


REMAINDER = segment(Module("layers_remainder.layers_{}"))
WAYS = {
    "gemma2 unscanned": Stacking(
        "unscanned",
        (segment(Module("layers_{}", suffix="_local"), Module("layers_{}", suffix="_global")),),
    ),
    "gemma2": Stacking(
        "pairs", (segment(scanned("layers", suffix="_local"), scanned("layers", suffix="_global")),)
    ),
    "gemma3": Stacking("remainder", (segment(scanned("layers.layers_{}")), REMAINDER)),
    "gemma4": nested("scanned_blocks"),
    "qwen3_next": nested("layers"),
    "gpt_oss": CYCLED,
    "deepseek": Stacking(
        "prefixed", (segment(scanned("dense_layers")), segment(scanned("moe_layers")))
    ),
    "deepseek unscanned": Stacking(
        "unscanned",
        (segment(Module("dense_layers_{}")), segment(Module("moe_layers_{}"))),
    ),
    "qwen3_5": Stacking("cycled", (segment(scanned("layers.layer_{}")),)),
}
OUTER = (EMBEDDING, FINAL_NORM, OUTPUT_HEAD)


def way_of(case: str) -> Stacking:
    family, way, *_ = case.split()
    return WAYS.get(f"{family} {way}", WAYS[family])


def block_of(case: str) -> Block:
    """A block with the parameters of a tree; an axis is named by its length, the width's is D."""
    way, kinds = way_of(case), {}
    outer = {p.name for p in OUTER}
    for path, (_, shape, *_) in TREES[case].items():
        if path in outer:
            continue
        place = way.place(tuple(path.split(".")))
        assert place is not None, path
        axes = tuple("D" if n == 24 else f"n{n}" for n in shape)
        module = (place.segment, place.module, place.number)
        kinds.setdefault(module, set()).add(Parameter(place.name, axes))
    layers: dict[LayerKind, tuple[Parameter, ...]] = {}
    for parameters in kinds.values():
        group = tuple(sorted(parameters, key=lambda p: p.name))
        if group not in layers.values():
            layers[LayerKind(f"k{len(layers)} dense")] = group
    return Block("toy", "", layers, (), stackings=(way,))


def layers_of(case: str, path: str, told: list[int] | None) -> tuple[int, ...]:
    """The layers of an array, counted as Hugging Face does: both of a pair."""
    if path in {p.name for p in OUTER}:
        return ()
    family = case.split()[0]
    if told is None:  # unscanned: the number in the name, after the first segment's
        name = path.split(".")[1]
        number = int(name.rsplit("_", 1)[1])
        told = [number + (2 if name.startswith("moe_layers_") else 0)]
    if family == "gemma2":
        return tuple(2 * n + ("_global." in path) for n in told)
    return tuple(told)


@pytest.mark.parametrize("case", TREES)
def test_layers_are_where_maxtext_keeps_them(case: str) -> None:
    shapes = {tuple(path.split(".")): tuple(shape) for path, (shape, *_) in TREES[case].items()}
    axis = int(case.split("axis ")[1].split()[0]) if "axis" in case else None
    found = detect_layout(shapes, [block_of(case)], scan_axis=axis)
    assert found.scan_axis == axis
    for array in found.arrays:
        _, plain, stacked, told = TREES[case][array.name]
        assert array.layers == layers_of(case, array.name, told), array.name
        assert [array.axes.index(a) for a in array.stacked] == stacked, array.name
        assert [n for n, a in zip(array.shape, array.axes, strict=True) if a not in "Ll"] == plain
        for layer in array.layers:
            entry = array.entry(layer)
            assert len(entry) == len(stacked)
            flat = 0
            for a in array.stacked:
                flat = flat * array.shape[array.axes.index(a)] + entry[a]
            assert array.layers[flat if stacked else 0] == layer
    count = 1 + max(layer for array in found.arrays for layer in array.layers)
    assert len(found.kinds) == count
    assert len({(p, n) for p, n in found.places if n is not None}) == sum(
        len(found.block.layers[kind]) for kind in found.kinds
    )


BUILT = {
    "gemma2 scanned on axis 1 7 layers": [(2, 7)],
    "gemma2 unscanned 7 layers": [(14, 1)],
    "gemma3 scanned on axis 1 13 layers": [(6, 2), (1, 1)],
    "gemma4 scanned on axis 1 13 layers": [(6, 2), (1, 1)],
    "gemma4 scanned on axis 0 7 layers": [(6, 1), (1, 1)],
    "gpt_oss scanned on axis 2 8 layers": [(2, 4)],
    "deepseek scanned on axis 1 7 layers": [(1, 2), (1, 5)],
    "deepseek unscanned 7 layers": [(2, 1), (5, 1)],
}


@pytest.mark.parametrize("case", BUILT)
def test_the_same_value_builds_them(case: str) -> None:
    shapes = {tuple(path.split(".")): tuple(shape) for path, (shape, *_) in TREES[case].items()}
    axis = int(case.split("axis ")[1].split()[0]) if "axis" in case else 1
    found = detect_layout(shapes, [block_of(case)], scan_axis=axis if "axis" in case else None)
    sizes = {
        name: n
        for array in found.arrays
        for name, n in zip(array.axes, array.shape, strict=True)
        if name not in "Ll"
    }
    tied = tuple(OUTPUT_HEAD.name.split(".")) not in shapes
    made = build_layout(
        found.block, found.stacking, found.kinds, sizes, blocks=BUILT[case], scan_axis=axis,
        tied=tied,
    )  # fmt: skip
    assert {a.path: (a.axes, a.shape, a.layers) for a in made.arrays} == {
        a.path: (a.axes, a.shape, a.layers) for a in found.arrays
    }


def test_the_common_ways_have_their_names() -> None:
    assert [way.scanned for way in (UNSCANNED, SCANNED, CYCLED)] == [False, True, True]


def test_lengths_of_axes_are_sums_of_products() -> None:
    """An axis gives the one field that no other has given; what does not add up is refused."""
    outer = {"D": 7, "H": 4, "K": 2, "h": 3, "V": 11}
    linear = {"w": 6, "d": 5, "W": 30, "t": 2, "y": 12, "C": 2 * 8 + 30, "Z": 2 * 8 + 60}
    group = (
        Parameter.of("attention.query.kernel", "D H Q"),
        Parameter.of("attention.key.kernel", "D K h"),
        *(Parameter.of(f"attention.{axis}", f"u {axis}") for axis in linear),
    )
    block = Block("toy", "", {DENSE: group}, ())
    sizes = {**outer, **linear, "Q": 6, "u": 1}

    def known(**changes: int) -> Mapping[str, Any]:
        made = build_layout(block, UNSCANNED, [DENSE], {**sizes, **changes}, blocks=[(1, 1)])
        return resolve(made, ResolvedConfig()).known

    found = known()
    assert (found["head_dim"], found["linear_key_size"], found["linear_conv_kernel_dim"]) == (
        3, 8, 2,
    )  # fmt: skip
    for change in ({"Q": 7}, {"u": 2}, {"y": 13}, {"W": 31}, {"C": 45}, {"Z": 77}):
        with pytest.raises(TensorError, match="cannot be of one model"):
            known(**change)


def test_a_model_with_a_nested_stack_is_described() -> None:
    """Its stacked axes are no sizes."""
    inner = (*ATTENTION_PARAMETERS, *MLP_PARAMETERS)
    block = Block("toy", "", {DENSE: inner}, (), stackings=(WAYS["qwen3_next"],))
    sizes = dict(synthetic.SIZES)
    made = build_layout(block, block.stackings[0], [DENSE] * 9, sizes, blocks=[(4, 2), (1, 1)])
    found = detect_layout({array.path: array.shape for array in made.arrays}, [block])
    assert found == made
    told = {"base_num_decoder_layers": 9, "inhomogeneous_layer_cycle_interval": 4}
    config = ResolvedConfig(from_mapping(told, Provenance(Origin.CONFIG, "a.yml")), {})
    resolution = resolve(found, config)
    assert not resolution.warnings  # none of its layers was dropped
    known = resolution.known
    assert (known["hidden_size"], known["intermediate_size"]) == (sizes["D"], sizes["F"])
    assert len(known["layer_kinds"]) == 9
