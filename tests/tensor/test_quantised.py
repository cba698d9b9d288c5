"""A quantised array with the scales of its blocks: any blocks, any box, there and back."""

from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.tensor.axes import Rearrangement
from moeconv.tensor.companion import Companion
from moeconv.tensor.dtypes import DTYPES, STORED, bits, round_once
from moeconv.tensor.form import Form
from moeconv.tensor.quantised import MAIN_BITS, SCALE_BITS, Dequantise
from moeconv.tensor.values import Fold

# What becomes of an array [L, E, D, F] of which one layer is taken.
PLACES = {
    "as it is": ("E D F -> E D F", {}, {}, {}),
    "transposed": ("E D F -> E F D", {}, {}, {}),
    "split": ("E (H h) F -> F E H h", {"D": 2}, {}, {}),
    "in turn": ("g E D F -> E D (F g)", {}, {"g": (1, 2)}, {}),
    "wider": ("E D F -> E F D", {}, {}, {"F": 4}),
    "narrower": ("E D F -> E F D", {}, {}, {"F": -1}),
}


@st.composite
def quantised(draw: st.DrawFn) -> tuple[Form, np.ndarray, np.ndarray]:
    """A form, its array, and the scales of its blocks."""
    text, multiple, place, extent = PLACES[draw(st.sampled_from(sorted(PLACES)))]
    sizes = {axis: draw(st.integers(2, 7)) for axis in "LEDF"}
    sizes |= {axis: size * multiple.get(axis, 1) for axis, size in sizes.items()}
    sizes |= {"H": 2, "h": sizes["D"] // 2}
    axes = []
    for axis in "LEDF":
        block = draw(st.sampled_from(["", "/*", *(f"/{n}" for n in range(1, 9)), None]))
        if block is not None and (axis != "L" or not block):
            axes.append(f"{axis}{block}")
    take = {"L": draw(st.integers(0, sizes["L"] - 1))}
    source = draw(st.sampled_from(sorted(set(MAIN_BITS) - {"uint8"})))
    scale_dtype = draw(st.sampled_from(sorted(SCALE_BITS)))
    fold = draw(st.sampled_from([None, Fold(3**-0.5, "1/sqrt(3)"), Fold(0.25, "1/4")]))
    other = Companion("scales", tuple(axes), sizes, {a: take[a] for a in axes if a in take})
    value = Dequantise(
        source,
        draw(st.sampled_from(sorted(DTYPES))),
        ("E", "D", "F"),
        other,
        scale_dtype,
        fold,
    )
    wider = {axis: sizes[axis] + more for axis, more in extent.items()}
    form = Form(tuple("LEDF"), sizes, take, value, Rearrangement.parse(text), place, wider)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    array = rng.integers(-127, 128, [sizes[a] for a in "LEDF"]).astype(STORED[source])
    if source != "int8":
        array = (rng.standard_normal(array.shape) * 3).astype(STORED[source])
    shape = [-(-sizes[a[0]] // other.step(a)) for a in axes]
    assert other.misfit(tuple(shape)) == ""
    scales = scales_of(rng, shape, scale_dtype)
    return form, array, scales


def scales_of(rng: np.random.Generator, shape: list[int], dtype: str) -> np.ndarray:
    """Such that no product leaves the normal numbers of float16."""
    if dtype == "uint8":
        return rng.integers(120, 132, shape).astype(np.uint8)
    return np.exp2(rng.uniform(-3, 3, shape)).astype(STORED[dtype])


def number_of(scales: np.ndarray) -> np.ndarray:
    return np.exp2(scales - 127.0) if scales.dtype == np.uint8 else scales.astype(np.float64)


def reference(form: Form, array: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers of the whole array, value by value: nothing of the code under test but ops."""
    exact, numbers = np.empty(array.shape), number_of(scales)
    axes = form.value.scales.axes
    for index in np.ndindex(*array.shape):
        at: Mapping[str, int] = dict(zip("LEDF", index, strict=True))
        blocks = [a.partition("/")[2] for a in axes]
        entry = [
            0 if block == "*" else at[axis[0]] // int(block or 1)
            for axis, block in zip(axes, blocks, strict=True)
        ]
        exact[index] = float(array[index]) * numbers[tuple(entry)]
    if form.value.fold is not None:
        exact *= form.value.fold.factor
    return round_once(exact, form.value.target)


@settings(max_examples=200, deadline=None)
@given(quantised(), st.data())
def test_a_box_is_that_of_the_whole_and_goes_back(made, data) -> None:
    form, array, scales = made
    held, index = {}, []
    for axis in form.axes:
        start = data.draw(st.integers(0, form.sizes[axis] - 1))
        stop = data.draw(st.integers(start + 1, form.sizes[axis]))
        if axis in form.take:
            start, stop = form.take[axis], form.take[axis] + 1
        elif axis in form.split:
            start, stop = 0, form.sizes[axis]
        held[axis] = (start, min(stop, form.extent.get(axis, stop)))
        index.append(form.take[axis] if axis in form.take else slice(*held[axis]))
    ranges = form.ranges(held)
    if any(start >= stop for start, stop in ranges.values()):
        return
    block = np.ascontiguousarray(array[tuple(index)])
    asked = []

    def read(name: str, box) -> np.ndarray:
        asked.append(name)
        return scales[box]

    others = form.others(ranges, read)
    assert asked == ["scales"]
    piece = form.run(block, ranges, others)
    assert piece.shape == form.piece_shape(ranges)
    own = np.ascontiguousarray(
        piece[tuple(slice(0, b - a) for a, b in (ranges[x] for x in form.target_axes))]
    )
    assert piece.astype(np.float64).sum() == own.astype(np.float64).sum()  # zeros behind
    expected = reference(form, array, scales)[tuple(index)]
    apart = [n for a, b in form.split.items() for n in (form.sizes[x] for x in b)]
    whole = expected if not apart else expected.reshape(expected.shape[0], *apart, -1)
    whole = whole.reshape(*[1] * len(form.place), *whole.shape)
    whole = whole.transpose(form.rearrange.permutation)
    assert np.array_equal(bits(own), bits(np.ascontiguousarray(whole)))
    assert not form.wrong(block, own, others).any()
    back = form.undo(own, others)
    assert back.dtype == array.dtype
    assert np.array_equal(back.astype(np.float64), block.astype(np.float64))
    at = data.draw(st.integers(0, own.size - 1))
    flipped = own.copy()
    flipped.reshape(-1).view(f"u{own.itemsize}")[at] ^= 1
    assert list(np.flatnonzero(form.wrong(block, flipped, others))) == [at]


@settings(max_examples=100, deadline=None)
@given(quantised(), st.data())
def test_nothing_is_further_off_than_the_bound(made, data) -> None:
    form, array, scales = made
    value, take = form.value, form.take
    exact = replace(value, target="float32")
    others = form.others(form.whole, lambda name, box: scales[box])
    block = np.ascontiguousarray(array[tuple(take.get(a, slice(None)) for a in form.axes)])
    if "F" in form.extent:
        block = np.ascontiguousarray(block[..., : form.extent["F"]])
    wide, got = (v.run(block, others).astype(np.float64) for v in (exact, value))
    limit = (value.bound() + exact.bound()) * (1 + 1e-6)  # of the exact product, not of `wide`
    assert (np.abs(got - wide) <= limit * np.abs(wide)).all()
    if value.bound() == 0.0:
        assert np.array_equal(got, wide)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    """Every byte under every exponent that leaves normal numbers, nibbles in their order."""
    blocks = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)
    exponents = np.random.default_rng(0).integers(20, 230, (2, 8)).astype(np.uint8)
    sizes = {"O": 2, "G": 8, "B": 16, "byte": 16, "half": 2}
    other = Companion("scales", ("O", "G"), sizes)
    value = Dequantise("uint8", "bfloat16", ("O", "G", "B"), other, "uint8")
    place = Rearrangement.parse("O G (byte half) -> (G byte half) O")
    form = Form(("O", "G", "B"), sizes, {}, value, place)
    others = form.others(form.whole, lambda name, box: exponents[box])
    made = form.run(blocks, form.whole, others)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # transformers' FP4_VALUES
    table = np.concatenate([table, -table])
    expected = np.empty((2, 8, 32))
    expected[..., 0::2], expected[..., 1::2] = table[blocks & 15], table[blocks >> 4]
    expected = np.ldexp(expected, exponents.astype(int)[..., None] - 127)
    expected = expected.reshape(2, 256).T.astype(ml_dtypes.bfloat16)
    assert value.bound() == 0.0 and form.shape == (256, 2)
    assert np.array_equal(bits(made.reshape(256, 2)), bits(expected))
    assert not form.wrong(blocks, made, others).any()
    assert np.array_equal(form.undo(made, others), blocks)


def test_a_zero_scale_makes_zeros_and_no_nan() -> None:
    other = Companion("scales", ("D/2",), {"D": 3})
    value = Dequantise("int8", "float32", ("D",), other, "float32")
    made = value.run(np.array([5, -7, 3], np.int8), [np.array([0, 0, 2.0], np.float32)])
    assert made.tolist() == [0.0, -0.0, 6.0]
    assert value.undo(made, [np.array([0, 0, 2.0], np.float32)]).tolist() == [0, 0, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "float32"}, "no number is float32 times"),
        ({"scale_dtype": "int8"}, "times a scale in int8"),
        ({"fold": Fold(1.0, "x - 1", -1.0)}, "an offset"),
        ({"axes": ("F", "D")}, "not in this order"),
        ({"axes": ("D",)}, "not in this order"),
    ],
)
def test_what_no_op_can_be(change, words: str) -> None:
    other = Companion("scales", ("D", "F/2"), {"D": 3, "F": 4})
    value = Dequantise("int8", "float32", ("D", "F"), other, "float32")
    with pytest.raises(ValueError, match=words):
        replace(value, **change)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3,), "1 axes instead"), ((3, 3), "3 entries on axis F/2 instead of 2"), ((3, 2), "^$")],
)
def test_a_companion_of_another_size_does_not_fit(shape, words: str) -> None:
    other = Companion("scales", ("D", "F/2"), {"D": 3, "F": 4})
    found = other.misfit(shape)
    assert (words == "^$") == (found == "") and words.strip("^$") in found
