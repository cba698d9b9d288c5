"""What must hold for every model, not just for those somebody thought of."""

from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import Sample, samples

from moeconv.arch.detection import detect_layout
from moeconv.errors import MoeconvError, TensorError
from moeconv.families import targets_of
from moeconv.mapping.edges import Part, cannot_hold, expand
from moeconv.mapping.reverse import restore, reverse
from moeconv.mapping.rules import Options
from moeconv.tensor.dtypes import DTYPES, round_once
from moeconv.tensor.values import Cast, Fold


def without_value(part: Part) -> Part:
    """The same place, with the values as they are."""
    value = Cast(part.form.value.source, part.form.value.source)
    return replace(part, form=replace(part.form, value=value))


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def convertible(sample: Sample):
    return [f for f in targets_of(sample.model) if cannot_hold(f, sample.model) is None]


def by_name(sample: Sample):
    return lambda name: sample.arrays[tuple(name.split("."))]


def apply_all(edges, sample: Sample) -> dict[str, np.ndarray]:
    return {edge.target: edge.apply(by_name(sample)) for edge in edges}


@settings(max_examples=150, deadline=None)
@given(samples(), st.booleans())
def test_there_and_back_is_the_same_bits(sample, untie):
    """Every parameter arrives somewhere, and can be had back: exactly, or within its bound."""
    assert convertible(sample), "some target holds every supported model"
    for family in convertible(sample):
        options = Options(untie=untie)
        edges = expand(family, sample.model, sample.layout, sample.dtypes, options=options)
        tensors = apply_all(edges, sample)
        back = restore(edges, tensors.__getitem__)
        # A power of two is exact, but for what it makes too small for float16.
        rounded = {
            p.source: p.form.value
            for e in edges
            for p in e.parts
            if e.bound() or (p.form.value.fold and e.dtype == "float16")
        }
        assert set(back) == {".".join(path) for path in sample.arrays}
        for path, array in sample.arrays.items():
            name = ".".join(path)
            if name in rounded:
                exact, got = array.astype(np.float64), back[name].astype(np.float64)
                value = rounded[name]
                allowed = 2.01 * value.bound() * abs(exact)
                if value.target == "float16":
                    allowed = allowed + 2.0**-24 / abs(value.fold.factor if value.fold else 1.0)
                if value.fold and value.fold.offset:  # next to it no relative error holds
                    allowed = value.undo_bound(abs(exact).max())
                assert (abs(got - exact) <= allowed + 1e-7).all()
            else:
                assert np.array_equal(bits(back[name]), bits(array)), name


@settings(max_examples=80, deadline=None)
@given(samples())
def test_edges_turned_round_make_the_same_arrays(sample):
    """The way from Hugging Face: `reverse` does in blocks what `restore` does with whole arrays."""
    for family in convertible(sample):
        edges = expand(family, sample.model, sample.layout, sample.dtypes)
        tensors = apply_all(edges, sample)
        stored = {edge.target: edge.dtype for edge in edges}
        back, origins = reverse(edges, family, sample.layout, stored)

        def read(name, origins=origins, tensors=tensors):
            origin = origins[name]
            flat = tensors[origin.tensor].reshape(-1)[origin.base :]
            return flat[: int(np.prod(origin.shape))].reshape(origin.shape)

        wanted = restore(edges, tensors.__getitem__)
        assert {edge.target for edge in back} == set(wanted)
        for edge in back:
            made = edge.apply(read)
            assert made.dtype == wanted[edge.target].dtype
            assert np.array_equal(bits(made), bits(wanted[edge.target])), edge.target


@settings(max_examples=100, deadline=None)
@given(samples())
def test_shapes_are_predicted(sample):
    for family in convertible(sample):
        for edge in expand(family, sample.model, sample.layout, sample.dtypes):
            made = edge.apply(by_name(sample))
            assert made.shape == edge.shape
            assert made.nbytes == edge.nbytes
            assert made.flags.c_contiguous


@settings(max_examples=100, deadline=None)
@given(samples(), st.sampled_from(list(DTYPES)))
def test_errors_stay_within_the_declared_bound(sample, dtype):
    for family in convertible(sample):
        plain = expand(family, sample.model, sample.layout, sample.dtypes)
        cast = expand(family, sample.model, sample.layout, sample.dtypes, dtype=dtype)
        for one, other in zip(plain, cast, strict=True):
            fold = next((value.fold for value in one.values if value.fold), Fold(1.0, ""))
            placed = replace(one, parts=tuple(map(without_value, one.parts)))
            exact = placed.apply(by_name(sample)).astype(np.float64)
            exact = exact * fold.factor + fold.offset
            got = other.apply(by_name(sample))
            assert got.dtype == DTYPES[dtype]
            # Below the smallest normal number rounding is absolute.
            tiny = {"float16": 2.0**-24, "bfloat16": 1e-38, "float32": 1e-38}[dtype]
            bound = other.bound() * (1 + 1e-6)
            assert (abs(got.astype(np.float64) - exact) <= bound * abs(exact) + tiny).all()


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0x0000, 0x7F7E),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    st.integers(-(2**30), 2**30),
    st.booleans(),
)
def test_bfloat16_is_rounded_once(number, part, nudge, negative):
    """Also a hair's breadth from the middle of two values, where float32 has no room for it."""
    low, high = np.array([number, number + 1], np.uint16).view(ml_dtypes.bfloat16)
    low, high = Fraction(float(low)), Fraction(float(high))
    value = float(low + (high - low) * Fraction(part))
    value += nudge * np.spacing(value)
    rounded = round_once(np.array([-value if negative else value]), "bfloat16")
    exact, off = Fraction(value), abs(abs(Fraction(float(rounded[0]))) - Fraction(value))
    assert off <= min(abs(high - exact), abs(exact - low))
    if off == high - exact == exact - low:
        assert rounded.view(np.uint16)[0] % 2 == 0


def test_what_is_no_number_stays_one():
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e300, -1e300, 1e-300, -1e-300])
    for dtype, limit in (("bfloat16", 1e39), ("float16", 1e5), ("float32", 1e39)):
        got = round_once(values, dtype).astype(np.float64)
        want = np.where(abs(values) > limit, np.copysign(np.inf, values), values)
        want = np.where(abs(values) < 1e-200, np.copysign(0.0, values), want)
        assert np.array_equal(got, want, equal_nan=True)
        assert np.array_equal(np.signbit(got)[1:], np.signbit(want)[1:])


@settings(max_examples=60, deadline=None)
@given(samples(), st.data())
def test_nothing_missing_goes_unnoticed(sample, data):
    """Without any one of its arrays a checkpoint is refused, or is visibly another model."""
    gone = data.draw(st.sampled_from(sorted(sample.arrays)))
    if gone[-2] == "logits_dense":
        return  # without it the model is a tied one
    shapes = {p: a.shape for p, a in sample.arrays.items() if p != gone}
    axis = sample.told["param_scan_axis"] if sample.stacking == "scanned" else None
    try:
        layout = detect_layout(shapes, [sample.layout.block], scan_axis=axis)
    except MoeconvError as error:
        assert gone[-1] in str(error) or gone[0] in str(error) or "layers" in str(error)
        return
    assert layout.kinds != sample.layout.kinds


@settings(max_examples=60, deadline=None)
@given(samples(), st.data())
def test_nothing_extra_goes_unnoticed(sample, data):
    near = data.draw(st.sampled_from(sorted(sample.arrays)))
    extra = (*near[:-1], data.draw(st.sampled_from(["bias", "scale_2", "lora_a"])))
    assume(extra not in sample.arrays)
    shapes = {p: a.shape for p, a in sample.arrays.items()} | {extra: (3,)}
    with pytest.raises(TensorError, match=extra[-1]):
        detect_layout(shapes, [sample.layout.block], scan_axis=sample.told["param_scan_axis"])


@settings(max_examples=60, deadline=None)
@given(samples())
def test_scanned_and_unscanned_are_one_model(sample):
    """The layout of the checkpoint does not show in the output."""
    if sample.stacking != "scanned":
        return
    apart = {}
    way = next(way for way in sample.layout.block.stackings if not way.scanned)
    modules = way.modules(sample.layout.kinds)
    for array in sample.layout.arrays:
        values = sample.arrays[array.path]
        if not array.layers:
            apart[array.path] = values
            continue
        for layer in array.layers:
            number, module = modules[layer]
            path, entry = module.path(number, array.parameter.name), array.entry(layer)
            apart[path] = values[tuple(entry.get(axis, slice(None)) for axis in array.axes)]
    layout = detect_layout({p: a.shape for p, a in apart.items()}, [sample.layout.block])
    assert layout.kinds == sample.layout.kinds
    dtypes = {".".join(p): str(a.dtype) for p, a in apart.items()}
    for family in convertible(sample):
        one = expand(family, sample.model, sample.layout, sample.dtypes)
        other = expand(family, sample.model, layout, dtypes)
        made = apply_all(one, sample)
        for edge in other:
            again = edge.apply(lambda source: apart[tuple(source.split("."))])
            assert np.array_equal(bits(again), bits(made[edge.target]))
