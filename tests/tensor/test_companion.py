"""An op that needs rows of one array and columns of another: `W + A B`, any box of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.tensor.axes import Array, Rearrangement, blocked
from moeconv.tensor.companion import Companion
from moeconv.tensor.form import Form

SIZES = {"L": 2, "D": 5, "H": 2, "h": 3}


@dataclass(frozen=True)
class _LowRank:
    """As much of a value op as `Form.run` and `Form.wrong` call."""

    companions: tuple[Companion, ...]
    target: str = "float32"
    scratch: int = 8

    def run(self, values: Array, others: Sequence[Array] = ()) -> Array:
        first, second = others
        return (values + np.tensordot(first, second, 1)).astype(np.float32)

    def wrong(self, source: Array, target: Array, others: Sequence[Array] = ()) -> Array:
        return self.run(source, others) != target


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_box_of_a_low_rank_update(data) -> None:
    rng = np.random.default_rng(0)
    # Small whole numbers, whose sums no order of adding changes.
    stored, first, second = (
        rng.integers(-9, 9, shape).astype(np.float32)
        for shape in ((5, 2, 2, 3), (5, 2, 4), (4, 2, 2, 3))
    )
    layer = data.draw(st.integers(0, 1))
    value = _LowRank(
        (
            Companion("a", ("D", "L", "rank"), SIZES, {"L": layer}),
            Companion("b", ("rank", "L", "H", "h"), SIZES, {"L": layer}),
        )
    )
    assert [c.misfit(a.shape) for c, a in zip(value.companions, (first, second), strict=True)] == [
        "",
        "",
    ]
    place = Rearrangement.parse("D H h -> (H h) D")
    form = Form(("D", "L", "H", "h"), SIZES, {"L": layer}, value, place)
    held = {}
    for axis in form.free:
        start = data.draw(st.integers(0, SIZES[axis] - 1))
        held[axis] = (start, data.draw(st.integers(start + 1, SIZES[axis])))
    arrays = {"a": first, "b": second}
    others = form.others(form.ranges(held), lambda name, box: arrays[name][box])
    d, h, w = (slice(*held[axis]) for axis in "DHh")
    block = np.ascontiguousarray(stored[d, layer, h, w])
    whole = stored[:, layer] + np.einsum("dr,rhw->dhw", first[:, layer], second[:, layer])
    made = form.run(block, form.ranges(held), others)
    assert np.array_equal(made, whole[d, h, w].transpose(1, 2, 0))
    assert not form.wrong(block, made, others).any()


def test_axes_of_blocks() -> None:
    assert [blocked(axis) for axis in ("D", "D/128", "D/*")] == [("D", 1), ("D", 128), ("D", 0)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_a_box_has_the_blocks_that_it_touches_and_no_more(size: int, step: int, data) -> None:
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    other = Companion("scales", (f"D/{step}",), {"D": size})
    scales = np.arange(-(-size // step))
    (box,) = other.box({"D": (start, stop)})
    touched = np.arange(start, stop) // step
    assert (scales[box] == np.unique(touched)).all()
    spread = other.spread(scales[box], {"D": (start, stop)})
    assert np.array_equal(np.broadcast_to(spread, touched.shape), touched)
