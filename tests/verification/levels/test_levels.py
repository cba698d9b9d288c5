"""Levels structure and weights: what is right passes, and every way of being wrong is found."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import orbax_writer
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import samples
from outputs_lab import admit, change, edit, scale, tensor
from safetensors.numpy import save_file

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.families import targets_of
from moeconv.hf.safetensors import read_header
from moeconv.mapping.edges import cannot_hold
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status, worst
from moeconv.verification.levels.structure import check_structure
from moeconv.verification.levels.weights import check_weights

GIB = 2**30


def weights(out: Path):
    return check_weights(Candidate.open(out), jobs=2, memory=GIB)


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(samples(), st.data())
def test_every_conversion_passes_and_every_flipped_bit_is_named(sample, data):
    family = data.draw(
        st.sampled_from([f for f in targets_of(sample.model) if not cannot_hold(f, sample.model)])
    )
    chunks = {
        p: tuple(data.draw(st.integers(1, n)) for n in a.shape) for p, a in sample.arrays.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        step = orbax_writer.write(root / "1", sample.arrays, chunks)
        (root / "config.yml").write_text(yaml.safe_dump(sample.told))
        options = ConvertOptions(
            config=root / "config.yml",
            sets=(f"param_scan_axis={sample.told['param_scan_axis']}",),
            target=family.name,
            dtype=data.draw(st.sampled_from(["keep", "float32", "bfloat16"])),
            untie=data.draw(st.booleans()),
        )
        convert(plan_conversion(str(step), options), root / "out")
        assert worst(weights(root / "out")) is Status.PASS
        header = read_header(root / "out" / "model.safetensors")
        name = data.draw(st.sampled_from(sorted(header)))
        spec, offset = header[name]
        bit = data.draw(st.integers(0, spec.nbytes * 8 - 1))
        with (root / "out" / "model.safetensors").open("r+b") as file:
            file.seek(offset + bit // 8)
            byte = file.read(1)[0]
            file.seek(offset + bit // 8)
            file.write(bytes([byte ^ (1 << bit % 8)]))
        values = weights(root / "out")[-1]
        assert values.status is Status.FAIL
        assert values.tensors == [name]
        assert sum(values.metrics["differing"].values()) == 1


def swap(out: Path, one: str, other: str) -> None:
    a, b = tensor(out, one), tensor(out, other)
    a[:], b[:] = b.copy(), a.copy()


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def minus_zero(values: np.ndarray) -> np.ndarray:
    """The first 0.0 becomes -0.0, which compares equal."""
    values[tuple(np.argwhere(values == 0)[0])] = -0.0
    return values


LAYER = "model.layers.{}."

MOE = LAYER.format(3) + "block_sparse_moe."

ATTENTION = LAYER.format(2) + "self_attn."

# What is broken; how; the check that must fail; the layer it must name.
MUTATIONS = {
    "query scale doubled": (lambda o: scale(o, ATTENTION + "q_proj.weight", 2), "values", 2),
    "query scale missing": (
        lambda o: scale(o, ATTENTION + "q_proj.weight", 8**-0.5), "values", 2),
    "logit scale missing": (lambda o: scale(o, "model.norm.weight", 4), "values", None),
    "w1 and w3 swapped": (
        lambda o: swap(o, MOE + "experts.1.w1.weight", MOE + "experts.1.w3.weight"), "values", 3),
    "two experts swapped": (
        lambda o: swap(o, MOE + "experts.0.w2.weight", MOE + "experts.2.w2.weight"), "values", 3),
    "router columns permuted": (
        lambda o: change(o, MOE + "gate.weight", lambda v: v[::-1]), "values", 3),
    "one layer off": (
        lambda o: swap(o, LAYER.format(0) + "input_layernorm.weight",
                       LAYER.format(2) + "input_layernorm.weight"), "values", 0),
    "interleave shifted": (
        lambda o: swap(o, LAYER.format(0) + "self_attn.o_proj.weight",
                       LAYER.format(1) + "self_attn.o_proj.weight"), "values", 0),
    "transpose of a square matrix missing": (
        lambda o: change(o, ATTENTION + "o_proj.weight", np.transpose), "values", 2),
    "query rows permuted within heads": (
        lambda o: change(o, ATTENTION + "q_proj.weight",
                         lambda v: v.reshape(2, 2, 4, 16).swapaxes(1, 2).reshape(v.shape)),
        "values", 2),
    "key and value swapped": (
        lambda o: swap(o, ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"), "values", 2),
    "heads misordered": (
        lambda o: change(o, ATTENTION + "k_proj.weight",
                         lambda v: v.reshape(2, 8, 16)[::-1].reshape(v.shape)), "values", 2),
    "final norm of another layer": (
        lambda o: change(o, "model.norm.weight",
                         lambda v: tensor(o, LAYER.format(5) + "input_layernorm.weight")),
        "values", None),
    "one expert zeroed": (
        lambda o: scale(o, MOE + "experts.2.w1.weight", 0), "values", 3),
    "copies of a dense MLP differ": (
        lambda o: scale(o, LAYER.format(4) + "block_sparse_moe.experts.3.w1.weight", 2),
        "values", 4),
    "router of a dense layer not zero": (
        lambda o: change(o, LAYER.format(4) + "block_sparse_moe.gate.weight", lambda v: v + 1),
        "values", 4),
    "bf16-rounded weights claimed as fp32": (
        lambda o: change(o, "model.embed_tokens.weight", bfloat16), "values", None),
    "wrong theta": (lambda o: edit(o, rope_theta=1e6), "config", None),
    "theta in one place only": (lambda o: edit(o, rope_parameters=None), "readers", None),
    "theta of transformers 4 only": (lambda o: edit(o, rope_theta=1e6), "readers", None),
    "RoPE scaled for transformers 4 only": (
        lambda o: edit(o, rope_scaling={"rope_type": "linear", "factor": 2.0}), "readers", None),
    "dtype of transformers 4 only": (lambda o: edit(o, torch_dtype="float16"), "readers", None),
    "wrong epsilon": (lambda o: edit(o, rms_norm_eps=1e-6), "config", None),
    "wrong top-k": (lambda o: edit(o, num_experts_per_tok=1), "config", None),
    "tie flag wrong": (lambda o: edit(o, tie_word_embeddings=False), "tying", None),
    "an expert more": (lambda o: edit(o, num_local_experts=5), "config", None),
    "wider MLP": (lambda o: edit(o, intermediate_size=32), "config", None),
    "a NaN": (lambda o: change(o, MOE + "gate.weight", lambda v: v * np.nan), "finite", None),
    "a file cut": (
        lambda o: (o / "model.safetensors").write_bytes(
            (o / "model.safetensors").read_bytes()[:-4]), "tensors", None),
    "a file gone": (lambda o: (o / "generation_config.json").unlink(), "files", None),
    "the sign of a zero": (
        lambda o: change(o, ATTENTION + "q_proj.weight", minus_zero), "values", 2),
    "another dtype claimed": (lambda o: edit(o, dtype="bfloat16"), "dtypes", None),
    "a dtype that is none": (lambda o: edit(o, dtype=["float32"]), "dtypes", None),
}  # fmt: skip


def test_the_right_one_passes(right):
    checks = check_structure(Candidate.open(right)) + weights(right)
    assert worst(checks) is Status.PASS
    assert {c.name for c in checks if c.status is Status.SKIP} == {"tokenizer"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mistake_is_found(right, tmp_path, name):
    break_it, check, layer = MUTATIONS[name]
    out = tmp_path / "out"
    shutil.copytree(right, out)
    break_it(out)
    candidate = Candidate.open(out)
    found = {c.name: c for c in check_structure(candidate)}
    assert found["files"].status is Status.FAIL, "the manifest's sha256 sees any change"
    if check == "values":
        found |= {c.name: c for c in weights(out)}
        assert found["source"].status is Status.PASS
    assert found[check].status is Status.FAIL
    assert found[check].layer == layer


def test_a_tensor_too_many_is_found_without_transformers(right, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    save_file({"model.more.weight": np.ones(4, np.float32)}, out / "model-more.safetensors")
    admit(out, "model-more.safetensors")
    (found,) = weights(out)
    assert found.status is Status.FAIL and found.tensors == ["model.more.weight"]


def test_rounded_weights_that_everything_calls_fp32_are_found(right, tmp_path):
    options = ConvertOptions(config=right.parent / "config.yml", dtype="bfloat16")
    out = tmp_path / "out"
    convert(plan_conversion(str(right.parent / "run"), options), out)
    assert worst(check_structure(Candidate.open(out))) is Status.PASS
    edit(out, dtype="float32", torch_dtype="float32")
    admit(out, "config.json", dtype="float32")
    found = {c.name: c for c in check_structure(Candidate.open(out))}
    assert {n for n, c in found.items() if c.status is Status.FAIL} == {"dtypes"}
    assert "config.json says float32" in found["dtypes"].summary
    assert weights(out)[0].status is Status.FAIL
