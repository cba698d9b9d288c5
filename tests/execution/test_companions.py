"""A quantised checkpoint of an installed page: arrays are converted with the scales beside them."""

import importlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from engine_lab import tensors
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from moeconv import families
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import TensorError, UnsupportedError
from moeconv.mapping.reverse import restore
from moeconv.planning.plan_file import load_plan
from moeconv.tensor.dtypes import DTYPES, STORED, bits, round_once
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status, worst
from moeconv.verification.levels.weights import check_weights
from moeconv.verification.models.source_layers import LayerReader

# Mixtral, with experts in blocks of 5 x 7 and a scale for each output channel of one projection.
PAGE = """
from dataclasses import replace
from moeconv.arch.parameters import MOE, Parameter
from moeconv.families.mixtral import BLOCK as _BLOCK, TARGET as _TARGET

SCALES = {
    "MoeBlock_0.wi_0": "E D/5 M/7",
    "MoeBlock_0.wi_1": "E D/5 M/7",
    "MoeBlock_0.wo": "E M/7 D/5",
    "self_attention.out.kernel": "H/* h/* D",
}
BLOCK = replace(
    _BLOCK,
    name="quantised",
    targets=("quantised",),
    layers={
        MOE: (
            *_BLOCK.layers[MOE],
            *(Parameter.of(f"{name}_scale", axes) for name, axes in SCALES.items()),
        )
    },
)
TARGET = replace(
    _TARGET,
    name="quantised",
    rules=tuple(
        replace(rule, scales=(f"{rule.source}_scale",)) if rule.source in SCALES else rule
        for rule in _TARGET.rules
    ),
)
"""
BLOCKS = {"D/5": ("D", 5), "M/7": ("M", 7), "H/*": ("H", 99), "h/*": ("h", 99)}


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory):
    """The page, of a package on the path, and its row in the tests' table."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "quantised_page.py").write_text(PAGE)
    info = folder / "quantised-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quantised\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moeconv.families]\nquantised = quantised_page\n")
    caches = (families.pages, families.blocks, families.targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(
            synthetic, "BLOCKS", {**synthetic.BLOCKS, "quantised": {"decoder_block": "quantised"}}
        )
        importlib.invalidate_caches()
        for cache in caches:
            cache.cache_clear()
        yield
    sys.modules.pop("quantised_page", None)
    for cache in caches:
        cache.cache_clear()


def write(run: Path, *, main: str = "float8_e4m3fn", scale: str = "float32", **more: Any):
    """A checkpoint whose quantised arrays have any values of their dtype."""
    sizes = {**synthetic.SIZES, **more.pop("sizes", {})}
    sizes |= {axis: -(-sizes[of] // block) for axis, (of, block) in BLOCKS.items()}
    damage = more.pop("change", lambda arrays: None)

    def change(arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if f"{name}_scale" in arrays]:
            values = arrays[name] * (300 if main == "int8" else 30)
            arrays[name] = np.clip(values, -127, 127).astype(STORED[main])
            exponents = 10 * arrays[f"{name}_scale"] - 10
            scales = np.exp2(exponents) if scale != "uint8" else 127 + exponents
            arrays[f"{name}_scale"] = scales.astype(STORED[scale])
        damage(arrays)

    return synthetic.write(run, "quantised", sizes=sizes, change=change, **more)


def plan(checkpoint: synthetic.Synthetic, **options: Any):
    config = checkpoint.config_file()
    return plan_conversion(str(checkpoint.step_dir), ConvertOptions(config=config, **options))


def dequantised(checkpoint: synthetic.Synthetic, name: str) -> np.ndarray:
    """float64, by numpy alone."""
    main = checkpoint.arrays[name].astype(np.float64)
    other = checkpoint.arrays[f"{name}_scale"].astype(np.float64)
    if checkpoint.arrays[f"{name}_scale"].dtype == np.uint8:  # exponents
        other = np.exp2(other - 127)
    axes = families.blocks()["quantised"].parameters()
    parameter = next(p for p in axes.values() if name.endswith(p.name))
    scale = next(p for p in axes.values() if p.name == f"{parameter.name}_scale")
    stacked = 1 if main.ndim > len(parameter.axes) else None
    for position, axis in enumerate(scale.axes):
        where = position + (stacked is not None and position >= stacked)
        if axis in BLOCKS:
            other = np.repeat(other, BLOCKS[axis][1], axis=where)
    return main * other[tuple(slice(0, n) for n in main.shape)]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_engine_writes_what_numpy_says(small_units, data) -> None:
    draw = data.draw
    scanned = draw(st.booleans())
    dtype = draw(st.sampled_from(["keep", *DTYPES]))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write(
            Path(folder) / "run",
            main=draw(st.sampled_from(["int8", "float8_e4m3fn", "float8_e5m2"])),
            scale=draw(st.sampled_from(["float32", "bfloat16", "uint8"])),
            sizes={
                "L": 2,
                "E": 2,
                "D": draw(st.integers(4, 17)),
                "M": draw(st.integers(4, 17)),
            },
            scanned=scanned,
            split={axis: draw(st.integers(1, 3)) for axis in [*"DMELHh", "D/5", "M/7"]},
            ocdbt=draw(st.booleans()),
            seed=draw(st.integers(0, 99)),
        )
        prepared = plan(checkpoint, dtype=dtype, jobs=draw(st.integers(1, 3)))
        event(f"spilled: {bool(prepared.plan.assemblies)}")
        manifest = convert(prepared, Path(folder) / "out")
        assert manifest.source.arrays.keys() == checkpoint.arrays.keys()
        made = tensors(Path(folder) / "out")
        for name, edge in prepared.plan.edges.items():
            assert made[name] == edge.apply(checkpoint.arrays.__getitem__).tobytes(), name
        _compare_experts(checkpoint, prepared.plan, made, scanned)
        found = check_weights(Candidate.open(Path(folder) / "out"), jobs=2, memory=2**30)
        assert worst(found) is Status.PASS, found
        if dtype != "float16":  # of which some products are no normal numbers
            _go_back(checkpoint, prepared.plan, made)


def _compare_experts(checkpoint, plan, made, scanned: bool) -> None:
    for layer in range(2):
        module = "layers" if scanned else f"layers_{layer}"
        for wi, w in (("wi_0", "w1"), ("wi_1", "w3"), ("wo", "w2")):
            numbers = dequantised(checkpoint, f"decoder.{module}.MoeBlock_0.{wi}")
            for expert in range(2):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight"
                own = numbers[expert, layer] if scanned else numbers[expert]
                assert made[name] == round_once(own.T, plan.edges[name].dtype).tobytes()


def _go_back(checkpoint, plan, made) -> None:
    def read(name: str) -> np.ndarray:
        edge = plan.edges[name]
        return np.frombuffer(made[name], DTYPES[edge.dtype]).reshape(edge.shape)

    back = restore(plan.edges.values(), read, checkpoint.arrays.__getitem__)
    for name in (name for name in checkpoint.arrays if f"{name}_scale" in checkpoint.arrays):
        assert np.array_equal(bits(back[name]), bits(checkpoint.arrays[name])), name
    with pytest.raises(TensorError, match="no converted tensor holds decoder"):
        restore(plan.edges.values(), read)


def test_a_plan_names_the_scales_and_is_executed_from_its_file(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "run")
    prepared = plan(checkpoint, dtype="bfloat16")
    prepared.plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again.edges == prepared.plan.edges and again.units == prepared.plan.units
    content = json.loads((tmp_path / "plan.json").read_text())
    of = {tensor["name"]: tensor for tensor in content["tensors"]}
    found = of["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    name = "decoder.layers.MoeBlock_0.wi_0"
    assert found["sources"] == [name, f"{name}_scale"]
    assert f"× {name}_scale [D/5 M/7], float8_e4m3fn -> bfloat16" in found["ops"]
    assert found["error_bound"] == 2.0**-8
    assert content["read_bytes"] == sum(a.nbytes for a in checkpoint.arrays.values())
    unit = next(u for u in again.units if u.array.name == name)
    assert [other.array.name for other in unit.beside] == [f"{name}_scale"]
    assert unit.held_bytes > unit.decoded_bytes


def test_a_wrong_scale_is_found_by_verify(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "run")
    convert(plan(checkpoint), tmp_path / "out")

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["decoder.layers.MoeBlock_0.wo_scale"][1, 2, 0, 0] *= 1.25

    write(tmp_path / "other", change=change)
    (tmp_path / "run").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "run")
    found = check_weights(Candidate.open(tmp_path / "out"), jobs=1, memory=2**30)
    source, values = found
    assert list(source.tensors) == ["decoder.layers.MoeBlock_0.wo_scale"]
    assert list(values.tensors) == ["model.layers.2.block_sparse_moe.experts.1.w2.weight"]


def _no_scales(arrays: dict[str, np.ndarray]) -> None:
    arrays["decoder.layers.self_attention.out.kernel"] = arrays[
        "decoder.layers.self_attention.out.kernel"
    ].astype(np.float32)


def _nan(arrays: dict[str, np.ndarray]) -> None:
    arrays["decoder.layers.MoeBlock_0.wo_scale"][0, 0, 0, 0] = np.nan


def _misfit(arrays: dict[str, np.ndarray]) -> None:
    for name in ("wi_0", "wi_1"):
        scales = arrays[f"decoder.layers.MoeBlock_0.{name}_scale"]
        arrays[f"decoder.layers.MoeBlock_0.{name}_scale"] = scales[..., :-1]
    scales = arrays["decoder.layers.MoeBlock_0.wo_scale"]
    arrays["decoder.layers.MoeBlock_0.wo_scale"] = scales[:, :, :-1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_no_scales, UnsupportedError, "out.kernel cannot be dequantised: no number is float32"),
        (_nan, TensorError, "wo_scale holds NaN or Inf"),
        (_misfit, TensorError, r"scales of .*wi_0 .*: it has 3 entries on axis M/7 instead of 4"),
    ],
)
def test_scales_that_are_none_are_refused(tmp_path: Path, change, error, words: str) -> None:
    checkpoint = write(tmp_path / "run", change=change)
    with pytest.raises(error, match=words):
        convert(plan(checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_scales_are_copied_when_asked_for(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "run", change=_nan)
    prepared = plan(checkpoint, allow_nonfinite=True)
    convert(prepared, tmp_path / "out")
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    values = np.frombuffer(tensors(tmp_path / "out")[name], np.float32)
    assert np.isnan(values).sum() == 5 * 7


@pytest.mark.parametrize("used", ["consumed by no rule", "a tensor of its own"])
def test_scales_are_consumed_exactly_once(tmp_path: Path, monkeypatch, used: str) -> None:
    checkpoint = write(tmp_path / "run", main="int8")
    target = families.targets()["quantised"]
    name = "MoeBlock_0.wo"
    rule = next(rule for rule in target.rules if rule.source == name)
    rules = [rule for rule in target.rules if rule.source != name]
    if used == "a tensor of its own":
        scale = replace(rule, source=f"{name}_scale", scales=(), place="M/7 D/5 -> M/7 D/5")
        rules += [rule, replace(scale, target=f"{rule.target}_scale")]
    monkeypatch.setitem(families.targets(), "quantised", replace(target, rules=tuple(rules)))
    with pytest.raises(TensorError, match=r"exactly once:[^$]*wo_scale"):
        plan(checkpoint)


def test_layers_are_not_run_on_stored_values(tmp_path: Path) -> None:
    convert(plan(write(tmp_path / "run")), tmp_path / "out")
    candidate = Candidate.open(tmp_path / "out")
    with pytest.raises(UnsupportedError, match="stored as float8_e4m3fn, on which level layers"):
        LayerReader(candidate.arrays, candidate.layout)


def test_a_quantised_array_of_a_page_without_scales_is_refused(tmp_path: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        name = "decoder.layers.MoeBlock_0.wo"
        arrays[name] = arrays[name].astype(np.int8)

    checkpoint = synthetic.write(tmp_path / "run", change=change)
    with pytest.raises(UnsupportedError, match="wo is stored as int8; moeconv converts float32"):
        plan(checkpoint)
