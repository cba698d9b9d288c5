"""A parameter that is no `nnx.Param`: among the parameters, in its own collection, or aside."""

from dataclasses import replace

import numpy as np
import pytest
import synthetic
from inputs_lab import converted

from moeconv.arch import detection as layouts
from moeconv.arch.layout import build_layout
from moeconv.arch.parameters import MOE, Parameter
from moeconv.arch.stacks import SCANNED, UNSCANNED
from moeconv.errors import ConfigError, TensorError, UnsupportedError
from moeconv.families import blocks
from moeconv.maxtext.facts import facts_of

BIAS = Parameter.of("MoeBlock_0.gate.bias", "E", variable="MoEBiasVar")
MIXTRAL = blocks()["mixtral"]
BLOCK = replace(MIXTRAL, layers={MOE: (*MIXTRAL.layers[MOE], BIAS)})
SIZES = {"V": 64, "D": 16, "F": 24, "M": 24, "H": 4, "K": 2, "h": 4}
PATH = ("decoder", "layers", *BIAS.name.split("."))


def made(*, experts=8, layers=4, aside=(), scan_axis=1, stacking=SCANNED):
    shape = [(1, layers)] if stacking.scanned else [(layers, 1)]
    return build_layout(
        BLOCK, stacking, [MOE] * layers, {**SIZES, "E": experts},
        blocks=shape, aside=aside, scan_axis=scan_axis,
    )  # fmt: skip


def found(layout, collection=None, **options):
    collections = {}
    if collection is not None:
        collections = {a.path: collection for a in layout.arrays if a.parameter == BIAS}
    shapes = {a.path: a.shape for a in layout.arrays}
    return layouts.detect_layout(shapes, [BLOCK], collections=collections, **options)


@pytest.mark.parametrize("collection", ["MoEBiasVar", "nnx_aux"])
@pytest.mark.parametrize("scan_axis", [0, 1, 2])
@pytest.mark.parametrize("experts", [4, 8])
def test_beside_the_parameters_layers_are_on_axis_0(collection, scan_axis, experts):
    """Also where there are as many experts as layers."""
    layout = made(aside={BIAS.name}, scan_axis=scan_axis, experts=experts)
    assert found(layout, collection).arrays == layout.arrays
    bias = next(a for a in layout.arrays if a.path == PATH)
    assert (bias.axes, bias.shape) == (("L", "E"), (4, experts))


@pytest.mark.parametrize("collection", [None, ""], ids=["params", "NNX state"])
@pytest.mark.parametrize("aside", [(), {BIAS.name}], ids=["parameter", "variable"])
def test_among_the_parameters_shapes_tell(collection, aside):
    layout = made(aside=aside)
    assert found(layout, collection).arrays == layout.arrays


def test_where_shapes_do_not_tell_it_is_said():
    with pytest.raises(ConfigError, match=r"gate.bias \[4, 4\] may have its layers on axis 1 or 0"):
        found(made(experts=4))


def test_unscanned_it_is_the_same_everywhere():
    layout = made(stacking=UNSCANNED, experts=4)
    for collection in ("MoEBiasVar", "nnx_aux", "", None):
        assert found(layout, collection).arrays == layout.arrays


def test_what_has_a_parameter_s_name_elsewhere_is_not_that_parameter():
    """A mask, say, which Flax keeps at the path of what it is for."""
    layout = made()
    collections = {a.path: "sparsity" for a in layout.arrays if a.name.endswith("wi_0")}
    shapes = {a.path: a.shape for a in layout.arrays}
    with pytest.raises(TensorError, match=r"holds decoder.layers.MoeBlock_0.wi_0 in sparsity"):
        layouts.detect_layout(shapes, [BLOCK], collections=collections)


def test_which_blocks_may_have_an_array():
    assert layouts.may_hold(BLOCK, PATH, "nnx_aux")
    assert not layouts.may_hold(MIXTRAL, PATH, "nnx_aux")
    assert not layouts.may_hold(BLOCK, PATH, "sparsity")
    assert not layouts.may_hold(BLOCK, (*PATH[:-1], "kernel"), "nnx_aux")
    assert layouts.may_hold(BLOCK, ("decoder", "layers_3", *PATH[2:]), "MoEBiasVar")


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("place", ["params.MoEBiasVar", "nnx_aux.model", "both"])
def test_a_router_s_bias_is_converted_from_wherever_it_is(tmp_path, place, scanned):
    """`both`: MaxText takes the variable; the copy among the parameters is named."""
    sizes = {"E": 8}
    usual = synthetic.write(tmp_path / "usual", "deepseek", scanned=scanned, sizes=sizes)
    expected, _ = converted(usual, tmp_path / "expected")
    beside = tuple(("params.MoEBiasVar" if place == "both" else place).split("."))
    biases = {name: value for name, value in usual.arrays.items() if name.endswith("gate.bias")}
    assert biases
    moved = {
        (*beside, *name.split(".")): np.ascontiguousarray(np.moveaxis(value, -1, 0))
        for name, value in biases.items()
    }

    def change(arrays):
        for name in biases:
            if place == "both":
                arrays[name] = np.zeros_like(arrays[name])
            else:
                del arrays[name]

    made = synthetic.write(
        tmp_path / "run", "deepseek", scanned=scanned, sizes=sizes, change=change, beside=moved
    )
    found, opened = converted(made, tmp_path / "out")
    assert found == expected
    assert opened.layout.arrays == converted(made, tmp_path / "again")[1].layout.arrays
    left_out = [name for name in opened.dropped if name.endswith("gate.bias")]
    assert len(left_out) == (len(biases) if place == "both" else 0)
    assert facts_of(opened).beside == {beside[-1].replace("model", "nnx_aux"): len(biases)}


def test_parameters_only_have_lost_a_variable(tmp_path):
    """As MaxText's export of parameters alone leaves it behind."""

    def change(arrays):
        for name in [name for name in arrays if name.endswith("gate.bias")]:
            del arrays[name]

    made = synthetic.write(tmp_path / "run", "deepseek", change=change)
    with pytest.raises((TensorError, ConfigError, UnsupportedError), match="bias"):
        converted(made, tmp_path / "out")
