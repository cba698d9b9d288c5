"""Our writer of the format against safetensors' own reader."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from moeconv.hf.safetensors import TensorSpec, lay_out
from moeconv.tensor.dtypes import DTYPES
from moeconv.tensor.stored import payload


@st.composite
def tensors(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6, unique=True))
    return [
        TensorSpec(
            name,
            draw(st.sampled_from(list(DTYPES))),
            tuple(draw(st.lists(st.integers(0, 5), max_size=3))),
        )
        for name in names
        if name != "__metadata__"
    ]


@given(tensors(), st.randoms())
def test_the_library_reads_what_was_laid_out(tmp_path_factory, specs, random):
    layout = lay_out(specs)
    assert (layout.size - sum(s.nbytes for s in specs)) % 8 == 0
    content = bytearray(layout.size)
    content[: len(layout.header)] = layout.header
    values = {}
    random.shuffle(order := list(specs))
    for spec in order:
        array = np.frombuffer(random.randbytes(spec.nbytes), DTYPES[spec.dtype]).reshape(spec.shape)
        start = layout.offsets[spec.name]
        content[start : start + spec.nbytes] = payload(array)
        values[spec.name] = array
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    path.write_bytes(content)
    with safe_open(path, framework="np") as opened:
        assert set(opened.keys()) == set(values)
        assert opened.metadata() == {"format": "pt"}
        for name, array in values.items():
            got = opened.get_tensor(name)
            assert got.shape == array.shape
            assert got.tobytes() == array.tobytes()


def test_every_tensor_is_aligned():
    specs = [TensorSpec("a", "bfloat16", (3,)), TensorSpec("b", "float32", (5,))]
    layout = lay_out(specs)
    assert layout.offsets["b"] % 4 == 0
    assert layout.offsets["b"] < layout.offsets["a"]


def test_memory_order_is_never_taken_for_logical_order():
    """safetensors#825: a transposed array's memory is not its C order."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    with pytest.raises(ValueError, match="C-contiguous"):
        payload(array.T)
    assert bytes(payload(np.ascontiguousarray(array.T))) == array.T.tobytes()
