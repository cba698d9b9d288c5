"""What a worker holds while it moves a block is counted: zeros, uncut axes and companions too."""

import tracemalloc

import numpy as np
import pytest

from moeconv.mapping.edges import Edge, Part
from moeconv.planning.estimate import WORKER_BYTES, unit_cost
from moeconv.planning.units import blocks, cut_into_units, pieces, routes_of, source_box
from moeconv.tensor.axes import Rearrangement
from moeconv.tensor.companion import Companion
from moeconv.tensor.dtypes import STORED
from moeconv.tensor.form import Form
from moeconv.tensor.quantised import Dequantise
from moeconv.tensor.stored import ArrayInfo
from moeconv.tensor.values import Affine, Cast, Fold

SIZES = {"D": 1024, "F": 2048, "rotary": 2, "pair": 512, "H": 2, "h": 1024}
SCALES = Companion("scales", ("D/128", "F/128"), SIZES)
SAME, SCALED = Cast("float32", "float32"), Affine(Fold(3.0, "3"), "float32", "float32")
FP8 = Dequantise("float8_e4m3fn", "float32", ("D", "F"), SCALES, "float32")
# The value op, the rearrangement, extents, and whether a block takes more than usual.
FORMS = {
    "plain": (SAME, "D F -> F D", {}, False),
    "scaled": (SCALED, "D F -> F D", {}, False),
    "dequantised": (FP8, "D F -> F D", {}, False),
    "wider": (SAME, "D F -> F D", {"F": 20_000}, True),
    "wider inside": (SAME, "D F -> D F", {"F": 20_000}, True),
    "wider and dequantised": (FP8, "D F -> F D", {"F": 20_000}, True),
    "taken apart": (SCALED, "(rotary pair) F -> (pair rotary) F", {}, True),
    "taken apart inside": (SCALED, "D (H h) -> H D h", {}, True),
}


def info(name: str, dtype: str, shape: tuple[int, ...]) -> ArrayInfo:
    size = STORED[dtype].itemsize * int(np.prod(shape))
    return ArrayInfo((name,), shape, dtype, shape, "none", size)


@pytest.mark.parametrize("name", FORMS)
def test_no_block_takes_more_than_is_counted(name: str) -> None:
    value, place, extent, more = FORMS[name]
    form = Form(("D", "F"), SIZES, {}, value, Rearrangement.parse(place), extent=extent)
    edge = Edge("t", form.shape, "float32", (Part("array", form),), 0, None)
    arrays = {
        "array": info("array", value.source, (1024, 2048)),
        "scales": info("scales", "float32", (8, 16)),
    }
    routes = routes_of([edge])
    unit = next(unit for unit in cut_into_units(routes, arrays) if unit.array.name == "array")
    stored = np.ones((1024, 2048), STORED[value.source])
    scales = np.ones((8, 16), np.float32)
    ((_, ranges),) = pieces(unit, routes["array"])
    peak = 0
    for part in blocks(form, ranges):
        tracemalloc.start()
        block = np.array(stored[source_box(unit, form, part)])
        form.run(block, part, form.others(part, lambda name, box: scales[box]))
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    room = unit_cost(unit) - 2 * unit.held_bytes
    assert 0.1 * room < peak <= room
    assert (room > WORKER_BYTES) == more
    assert unit.held_bytes - unit.decoded_bytes == (8 * 16 * 4 if value is FP8 else 0)
