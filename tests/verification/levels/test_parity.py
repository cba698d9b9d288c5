"""Levels logits and layers: a right conversion passes, and each mistake fails where it is."""

import json
import shutil

import numpy as np
import pytest
from checkpoints.llama import LLAMA2
from checkpoints.mixtral import MIXTRAL
from checkpoints.row import TIED
from helpers import config_file, run
from parity_lab import Compiled, check, edit

from moeconv.errors import UnsupportedError, UsageError
from moeconv.hf.safetensors import read_header
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status, worst
from moeconv.verification.run import verify
from moeconv.verification.settings import ParityOptions, VerifyOptions, parse_against

PROOF = pytest.mark.proof("parity")
MISTAKES = pytest.mark.proof("parity of mistakes")


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    for module in ("layers", "reference"):
        monkeypatch.setattr(f"moeconv.verification.levels.{module}.MaxTextLayers", Compiled)


@pytest.mark.parametrize("name", ["fp32", pytest.param("bf16", marks=PROOF), "compact"])
@pytest.mark.parametrize("level", ["logits", "layers"])
def test_a_right_conversion_passes(envy, name, level):
    found = check(level, envy / name)
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}
    assert found["reference"].metrics["independent"]
    assert "description" in found
    assert {"parity", "stock", "router"} <= set(found)
    assert ("rounding" in found["parity"].metrics) == (name == "bf16")
    kl = found["parity"].metrics["all"]["kl_max"]
    assert kl < 1e-9 if name != "bf16" else kl > 1e-7
    stock = found["stock"].metrics
    assert stock["head_rounding"]["kl_mean"] > 1e-8, "the tied head does round"
    if level == "layers":
        parts = [(p["layer"], p["part"]) for p in found["hidden"].metrics["places"]]
        assert parts[0] == (None, "embedding") and parts[-1] == (None, "final norm")
        assert (1, "router") in parts and (0, "router") not in parts
    else:
        assert found["greedy"].status is Status.PASS


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((MIXTRAL, TIED, {"scan_layers": False}), marks=PROOF),
        pytest.param((MIXTRAL,), marks=PROOF),
        pytest.param((LLAMA2,), marks=PROOF),
    ],
)
def test_other_blocks_pass_too(maxtext_lab, tmp_path, parts):
    made = maxtext_lab.checkpoint(*parts)
    run(made, tmp_path / "out", untie=True)
    for level in ("logits", "layers"):
        found = check(level, tmp_path / "out")
        reference = found.pop("reference")
        assert reference.status is Status.WARN and "--config" in reference.summary
        assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}
    found = check(
        "layers", tmp_path / "out", ParityOptions(config=config_file(tmp_path, made.config))
    )
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}
    assert "description" in found


@pytest.mark.parametrize("name", ["compact", pytest.param("bf16", marks=PROOF)])
@pytest.mark.parametrize("level", ["logits", "layers"])
def test_against_another_hugging_face_model(envy, name, level):
    found = check(level, envy / name, ParityOptions(against=envy / "fp32"))
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}


@PROOF
def test_computed_in_bfloat16(envy):
    found = check("layers", envy / "fp32", ParityOptions(dtype="bfloat16"))
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}
    assert found["parity"].metrics["all"]["kl_max"] > 1e-7


ATTENTION = "model.layers.2.self_attn."

MOE = "model.layers.3.block_sparse_moe."


def tensor(out, name):
    spec, offset = read_header(out / "model.safetensors")[name]
    return np.memmap(out / "model.safetensors", np.float32, "r+", offset=offset, shape=spec.shape)


def scale(name, factor):
    def change(out):
        tensor(out, name)[:] *= np.float32(factor)

    return change


def swap(one, other):
    def change(out):
        a, b = tensor(out, one), tensor(out, other)
        a[:], b[:] = b.copy(), a.copy()

    return change


def apply(name, function):
    def change(out):
        values = tensor(out, name)
        values[:] = function(values.copy())

    return change


def theta(value):
    def change(out):
        config = json.loads((out / "config.json").read_text())
        rope = {**config["rope_parameters"], "rope_theta": value}
        (out / "config.json").write_text(
            json.dumps(config | {"rope_theta": value, "rope_parameters": rope})
        )

    return change


# What is broken, how, and the first place that level layers must name: (layer, words).
MUTATIONS = {
    "query scale missing": (scale(ATTENTION + "q_proj.weight", 0.25), 2, "layer 2 attention"),
    "query scale doubled": (scale(ATTENTION + "q_proj.weight", 4), 2, "layer 2 attention"),
    "logit scale missing": (scale("model.norm.weight", 48**0.5), None, "final norm"),
    "wrong theta": (theta(10_000.0), 0, "layer 0 attention"),
    "wrong epsilon": (edit(rms_norm_eps=1e-2), 0, "layer 0 attention"),
    "w1 and w3 swapped": (
        swap(MOE + "experts.1.w1.weight", MOE + "experts.1.w3.weight"), 3, "layer 3 experts"),
    "two experts swapped": (
        swap(MOE + "experts.0.w2.weight", MOE + "experts.2.w2.weight"), 3, "layer 3 experts"),
    "router columns permuted": (
        apply(MOE + "gate.weight", lambda v: v[::-1]), 3, "layer 3 router"),
    "one layer off": (
        swap("model.layers.0.input_layernorm.weight", "model.layers.2.input_layernorm.weight"),
        0, "layer 0 attention"),
    "interleave shifted": (
        swap("model.layers.1.self_attn.o_proj.weight", "model.layers.2.self_attn.o_proj.weight"),
        1, "layer 1 attention"),
    "query rows permuted within heads": (
        apply(ATTENTION + "q_proj.weight",
              lambda v: v.reshape(4, 2, 8, 48).swapaxes(1, 2).reshape(v.shape)),
        2, "layer 2 attention"),
    "key and value swapped": (
        swap(ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight"), 2, "layer 2 attention"),
    "GQA heads misordered": (
        apply(ATTENTION + "k_proj.weight", lambda v: v.reshape(2, 16, 48)[::-1].reshape(v.shape)),
        2, "layer 2 attention"),
    "final norm of another layer": (
        swap("model.norm.weight", "model.layers.3.input_layernorm.weight"), 3, "layer 3 attention"),
    "one expert zeroed": (scale(MOE + "experts.2.w1.weight", 0), 3, "layer 3 experts"),
    "embedding rows shifted": (
        apply("model.embed_tokens.weight", lambda v: np.roll(v, 1, axis=0)), None, "embedding"),
    "top-k wrong": (edit(num_experts_per_tok=1), 1, "layer 1 experts"),
}  # fmt: skip


@MISTAKES
@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mistake_is_found_and_placed(envy, tmp_path, name):
    break_it, layer, words = MUTATIONS[name]
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    break_it(out)
    found = check("layers", out)
    assert found["hidden"].status is Status.FAIL, found["hidden"].summary
    assert found["hidden"].layer == layer
    assert words in found["hidden"].summary
    assert found["parity"].status is Status.FAIL, found["parity"].summary


# Whole models take longer: those that move no weight, and one that does.
@MISTAKES
@pytest.mark.parametrize(
    "name", ["wrong theta", "top-k wrong", "logit scale missing", "one expert zeroed"]
)
def test_level_logits_fails_too(envy, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    MUTATIONS[name][0](out)
    found = check("logits", out)
    assert found["parity"].status is Status.FAIL, found["parity"].summary


def test_a_mistake_is_found_and_placed(envy, tmp_path):
    """One of those below, in every run of the suite."""
    test_every_mistake_is_found_and_placed(envy, tmp_path, "two experts swapped")


@MISTAKES
def test_a_mistake_in_a_rounded_output_is_found(envy, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(envy / "bf16", out)
    theta(10_000.0)(out)
    found = check("layers", out)
    assert (found["hidden"].status, found["hidden"].layer) == (Status.FAIL, 0)
    assert found["parity"].status is Status.FAIL


def test_models_that_cannot_be_compared_do_not_hide_what_has_failed(envy, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    apply("model.embed_tokens.weight", lambda v: v * np.nan)(out)
    report = verify(out, source=None, options=VerifyOptions(levels=("structure", "logits")))
    assert report.verdict is Status.FAIL
    assert report.levels == {"structure": Status.FAIL, "logits": Status.FAIL}
    assert "not all finite" in report.checks[-1].summary


def test_logits_of_zeros_are_compared(envy, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(envy / "fp32", out)
    apply("model.norm.weight", lambda v: v * 0)(out)
    found = check("layers", out, ParityOptions(against=out))
    assert worst(found.values()) is Status.PASS, {n: c.summary for n, c in found.items()}


def test_what_cannot_run_says_why(envy, monkeypatch):
    with pytest.raises(UsageError, match="neither"):
        parse_against("pytorch")
    assert parse_against("maxtext") is None and str(parse_against("hf:x")) == "x"
    monkeypatch.setattr(Candidate, "items", None)
    with pytest.raises(UnsupportedError, match="local disk"):
        check("logits", envy / "fp32")
