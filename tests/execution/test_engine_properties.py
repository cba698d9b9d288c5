"""However a checkpoint is cut into chunks, the engine writes what the ops say, byte for byte."""

import math
import tempfile
from pathlib import Path

import numpy as np
import orbax_writer
import pytest
import synthetic
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from models import samples
from safetensors import safe_open

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.families import targets_of
from moeconv.mapping.edges import cannot_hold
from moeconv.planning import units as work
from moeconv.tensor import form
from moeconv.tensor.dtypes import DTYPES
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status, worst
from moeconv.verification.levels.weights import check_weights


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and units of a few hundred bytes, so that small arrays take every path."""
    monkeypatch.setattr("moeconv.planning.slabs.BLOCK_BYTES", 256)
    monkeypatch.setattr(form, "_STRIP", 3)
    monkeypatch.setattr("moeconv.planning.units.UNIT_BYTES", 300)


def chunk_of(draw, shape):
    return tuple(draw(st.integers(1, n)) for n in shape)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(samples(), st.data())
def test_engine_writes_what_the_ops_say(small_blocks, sample, data):
    chunks = {p: chunk_of(data.draw, a.shape) for p, a in sample.arrays.items()}
    dtype = data.draw(st.sampled_from(["keep", *DTYPES]))
    family = data.draw(
        st.sampled_from([f for f in targets_of(sample.model) if not cannot_hold(f, sample.model)])
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        step = orbax_writer.write(root / "5", sample.arrays, chunks, ocdbt=data.draw(st.booleans()))
        (root / "config.yml").write_text(yaml.safe_dump(sample.told))
        options = ConvertOptions(
            config=root / "config.yml",
            sets=(f"param_scan_axis={sample.told['param_scan_axis']}",),
            target=family.name,
            dtype=dtype,
            jobs=data.draw(st.integers(1, 3)),
            untie=data.draw(st.booleans()),
            max_shard_bytes=data.draw(st.sampled_from([3000, 10**9])),
        )
        prepared = plan_conversion(str(step), options)
        event(f"spilled arrays: {bool(prepared.plan.assemblies)}")
        event(f"files: {min(2, len(prepared.plan.output.files))}")
        manifest = convert(prepared, root / "out")
        seen = set()
        for file in manifest.files:
            if not file.endswith(".safetensors"):
                continue
            with safe_open(root / "out" / file, framework="np") as opened:
                names = opened.keys()
                for name in names:
                    edge = prepared.plan.edges[name]
                    expected = edge.apply(lambda source: sample.arrays[tuple(source.split("."))])
                    got = opened.get_tensor(name)
                    assert got.shape == expected.shape
                    assert got.dtype == expected.dtype
                    assert got.tobytes() == expected.tobytes(), name
                    seen.add(name)
        assert seen == set(prepared.plan.edges)


@settings(max_examples=100, deadline=None)
@given(samples(), st.data(), st.integers(1, 2000))
def test_units_tile_every_array(sample, data, limit):
    """Units cover every value once, and hold whole chunks."""
    from moeconv.mapping.edges import expand
    from moeconv.tensor.stored import ArrayInfo

    for family in targets_of(sample.model):
        if cannot_hold(family, sample.model):
            continue
        routes = work.routes_of(expand(family, sample.model, sample.layout, sample.dtypes))
        for array in sample.layout.arrays:
            chunk = chunk_of(data.draw, array.shape)
            dtype = sample.dtypes[array.name]
            decoded = math.prod(chunk) * DTYPES[dtype].itemsize
            info = ArrayInfo(array.path, array.shape, dtype, chunk, "none", decoded)
            boxes = work.unit_boxes(info, routes[array.name], limit)
            count = np.zeros(array.shape, int)
            chunks = set()
            for box in boxes:
                count[tuple(slice(*r) for r in box)] += 1
                unit = work.Unit(info, box, 0)
                own = {position for position, _ in unit.chunks()}
                assert not own & chunks
                chunks |= own
            assert (count == 1).all()
            assert len(chunks) == math.prod(info.grid)


def test_bfloat16_of_a_scaled_kernel_is_the_nearest(tmp_path):
    """Just beyond the middle of two bfloat16 numbers, which float32 cannot tell from the middle."""
    sizes = {"h": 32}
    factor = np.sqrt(sizes["h"])
    middles = 1 + (2 * np.arange(128) + 1) / 256
    near = (middles / factor).astype(np.float32)
    off = near.astype(np.float64) * factor / middles - 1
    values = near[(off > 0) & (off < 2**-26)]
    assert len(values) > 3

    def change(arrays):
        kernel = arrays["decoder.layers.self_attention.query.kernel"]
        kernel[...] = np.resize(values, kernel.shape)

    checkpoint = synthetic.write(tmp_path / "run", sizes=sizes, change=change)
    options = ConvertOptions(config=checkpoint.config_file(), dtype="bfloat16")
    convert(plan_conversion(str(checkpoint.run), options), tmp_path / "out")
    found = check_weights(Candidate.open(tmp_path / "out"), jobs=1, memory=2**30)
    assert worst(found) is Status.PASS, found
