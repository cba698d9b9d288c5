"""Every form: what it makes of a box is that box of the whole, goes back, and no other passes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.tensor.axes import Rearrangement
from moeconv.tensor.dtypes import DTYPES, bits
from moeconv.tensor.form import Form
from moeconv.tensor.values import Affine, Cast, Fold, Unfold

SIZES = {"L": 3, "E": 2, "D": 5, "F": 7, "h": 4, "rotary": 2, "pair": 2, "g": 2}
# Axes of the array, what is taken, the rearrangement, places, extents, and the same in numpy.
FORMS = {
    "a layer": ("D L F", {"L": 1}, "D F -> F D", {}, {}, lambda a: a[:, 1].T),
    "half to interleaved": (
        "D h", {}, "D (rotary pair) -> (pair rotary) D", {}, {},
        lambda a: a.reshape(5, 2, 2).transpose(2, 1, 0).reshape(4, 5),
    ),
    "wider": ("D F", {}, "D F -> F D", {}, {"F": 9}, lambda a: np.pad(a.T, ((0, 2), (0, 0)))),
    "wider inside": ("F D", {}, "F D -> D F", {}, {"F": 9},
                     lambda a: np.pad(a.T, ((0, 0), (0, 2)))),
    "narrower": ("F D", {}, "F D -> F D", {}, {"F": 4}, lambda a: a[:4]),
    "in turn": ("E D F", {}, "g E D F -> E D (F g)", {"g": (1, 2)}, {},
                lambda a: np.stack([np.zeros_like(a), a], -1).reshape(2, 5, 14)),
    "one behind the other": ("E D F", {"E": 1}, "g D F -> D (g F)", {"g": (1, 2)}, {},
                             lambda a: np.concatenate([np.zeros_like(a[1]), a[1]], -1)),
    "stacked": ("D F", {}, "g D F -> g F D", {"g": (0, 3)}, {},
                lambda a: np.stack([a.T, np.zeros_like(a.T), np.zeros_like(a.T)])),
}  # fmt: skip
VALUES = {
    "same": lambda stored: Cast(stored, stored),
    "wide": lambda stored: Cast(stored, "float32"),
    "narrow": lambda stored: Cast(stored, "bfloat16"),
    "scaled": lambda stored: Affine(Fold(3**0.5, "sqrt(3)"), stored, "float32"),
    "divided": lambda stored: Unfold(Fold(3**0.5, "sqrt(3)"), stored, "float32"),
    "shifted back": lambda stored: Unfold(Fold(0.5, "x / 2 - 1", -1.0), stored, stored),
    "shifted": lambda stored: Affine(Fold(0.5, "x / 2 - 1", -1.0), stored, stored),
}


def form_of(name: str, value) -> Form:
    axes, take, place, places, extent, _ = FORMS[name]
    return Form(tuple(axes.split()), SIZES, take, value, Rearrangement.parse(place), places, extent)


def array_of(form: Form, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal([SIZES[a] for a in form.axes])
    return values.astype(DTYPES[form.value.source])


def whole(form: Form, array: np.ndarray) -> np.ndarray:
    """The tensor with axes apart, zeros where other parts lie."""
    taken = array[tuple(form.take.get(axis, slice(None)) for axis in form.axes)]
    box = tuple(slice(0, stop) for _, stop in (form.whole[a] for a in form.free if a in form.whole))
    out = np.zeros(form.target_shape, form.dtype)
    cut = np.ascontiguousarray(taken[box] if form.extent else taken)
    piece = form.run(cut, form.whole)
    start = [form.whole[axis][0] for axis in form.target_axes]
    out[tuple(slice(s, s + n) for s, n in zip(start, piece.shape, strict=True))] = piece
    return out


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_is_what_numpy_says(name: str, dtype: str) -> None:
    form = form_of(name, Cast(dtype, dtype))
    array = array_of(form)
    made, expected = whole(form, array).reshape(form.shape), FORMS[name][-1](array)
    assert made.shape == expected.shape
    assert np.array_equal(bits(made), bits(np.ascontiguousarray(expected)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.sampled_from(sorted(VALUES)), st.data())
def test_a_box_is_the_box_of_the_whole_and_goes_back(name, value, data) -> None:
    form = form_of(name, VALUES[value](data.draw(st.sampled_from(sorted(DTYPES)))))
    array = array_of(form, data.draw(st.integers(0, 99)))
    held, index = {}, []
    for axis in form.axes:
        size = SIZES[axis]
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        if axis in form.take:
            start, stop = form.take[axis], form.take[axis] + 1
        elif axis in form.split:
            start, stop = 0, size
        held[axis] = (start, min(stop, form.extent.get(axis, stop)))
        index.append(form.take[axis] if axis in form.take else slice(*held[axis]))
    ranges = form.ranges(held)
    if any(start >= stop for start, stop in ranges.values()):
        return  # a part of the array that the tensor has no room for
    block = np.ascontiguousarray(array[tuple(index)])
    piece, full = form.run(block, ranges), whole(form, array)
    assert piece.flags.c_contiguous
    assert piece.shape == form.piece_shape(ranges)
    assert piece.nbytes == form.piece_bytes(ranges)
    start = [ranges[axis][0] for axis in form.target_axes]
    box = tuple(slice(s, s + n) for s, n in zip(start, piece.shape, strict=True))
    assert np.array_equal(bits(piece), bits(np.ascontiguousarray(full[box])))
    if form.is_contiguous(ranges):
        offset = form.offset(ranges) // form.dtype.itemsize
        assert np.array_equal(bits(full.reshape(-1)[offset : offset + piece.size]),
                              bits(piece.reshape(-1)))  # fmt: skip
    own = np.ascontiguousarray(full[form.box(ranges)])
    back, exact = form.undo(own).astype(np.float64), block.astype(np.float64)
    limit = form.value.undo_bound(float(np.abs(exact).max())) + 1e-7
    assert back.shape == block.shape
    assert (np.abs(back - exact) <= limit).all()
    assert not form.wrong(block, own).any()
    bit = data.draw(st.integers(0, own.size - 1))
    flipped = own.copy()
    flipped.reshape(-1).view(f"u{own.itemsize}")[bit] ^= 1
    assert list(np.flatnonzero(form.wrong(block, flipped))) == [bit]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", ["narrow", "scaled", "shifted"])
def test_a_zero_is_nothing_else(value: str, dtype: str) -> None:
    """However small: around zero the numbers of a dtype lie closest."""
    op = VALUES[value](dtype)
    zero = 2.0 if value == "shifted" else 0.0
    right = op.run(np.full(1, zero, DTYPES[dtype]))
    assert float(right[0]) == 0.0
    least = right.copy()
    least.view(f"u{least.itemsize}")[0] = 1
    for other in (least, np.full(1, 1e-3, right.dtype)):
        assert op.wrong(np.full(1, zero, DTYPES[dtype]), other).all()
    assert not op.wrong(np.full(1, zero, DTYPES[dtype]), right).any()


def test_an_offset_near_the_value_has_no_relative_error_and_an_absolute_bound() -> None:
    """`x - 1` of values around 1, as of a norm that is stored less one."""
    shift = Affine(Fold(1.0, "x - 1", -1.0), "float32", "bfloat16")
    exact = 1 + np.random.default_rng(0).standard_normal(1000).astype(np.float32) / 100
    back = shift.undo(shift.run(exact))
    off = np.abs(back.astype(np.float64) - exact)
    assert 0 < off.max() <= shift.undo_bound(float(np.abs(exact).max()))
    assert not shift.wrong(exact, shift.run(exact)).any()
    assert replace(shift, target="float32").bound() > 0  # a sum rounds, whatever its factor
