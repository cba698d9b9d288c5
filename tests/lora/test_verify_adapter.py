"""`verify` of an adapter for PEFT: its files, and every value against the adapter's checkpoint."""

import json
import shutil

import pytest
import synthetic
from cli_runner import moeconv
from lora_model import ALPHA, adapter

from moeconv.errors import NotACheckpointError, UnsupportedError


@pytest.fixture
def made(tmp_path):
    """Base, adapter and the converted one, of a model with folds and a part in other names."""
    base = synthetic.write(tmp_path / "base", "llama2")
    step, _ = adapter(tmp_path / "lora", base)
    convert(base, step, tmp_path / "out", "--base-model", "me/base")
    return base, step, tmp_path / "out"


def convert(base, step, out, *options):
    config = base.config_file(out.parent)
    ran = moeconv("convert", step, out, "--base", base.run, "--config", config, *options)
    assert ran.code == 0, ran.err


def verify(out, *options):
    """The exit code, and the status and sentence of every check."""
    ran = moeconv("verify", out, "--json", *options)
    found = json.loads(ran.out)["checks"] if ran.out else []
    return ran.code, {(c["level"], c["name"]): (c["status"], c["summary"]) for c in found}


def edit(out, name, **changes):
    path = out / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16")], ids=["kept", "bfloat16"])
def test_one_that_is_right(tmp_path, made, options):
    base, step, _ = made
    convert(base, step, tmp_path / "one", *options)
    code, found = verify(tmp_path / "one")
    assert code == 0
    passed = {("structure", n) for n in ("files", "tensors", "dtypes", "finite", "config")}
    passed |= {("weights", "source"), ("weights", "values")}
    assert {name for name, (status, _) in found.items() if status == "pass"} == passed
    for level in ("logits", "layers"):
        status, why = found[level, level]
        assert status == "skipped"
        assert "an adapter of one; convert the base with --merge-lora" in why
    assert verify(tmp_path / "one")[0] == 0  # beside the report of the first


@pytest.mark.parametrize("block", ["envy", "gemma2", "gemma4", "gpt_oss", "llama4", "mixtral"])
def test_a_family(tmp_path, block):
    """Converted and verified, or refused by the names of what PEFT cannot hold."""
    base = synthetic.write(tmp_path / "base", block, scanned=False)
    step, _ = adapter(tmp_path / "lora", base)
    out = tmp_path / "out"
    ran = moeconv("convert", step, out, "--base", base.run, "--config", base.config_file(tmp_path))
    assert ran.code == (UnsupportedError.exit_code if block == "envy" else 0), ran.err
    if ran.code:  # its layers without experts become layers of equal ones
        assert "mlp.wi_0.kernel: experts, which are no linear layers" in ran.error
        return
    code, found = verify(out)
    assert code == 0
    assert found["structure", "config"][0] == found["weights", "values"][0] == "pass"


def test_a_level_that_does_not_apply_is_no_verdict_if_asked_for(made):
    ran = moeconv("verify", made[2], "--level", "logits")
    assert (ran.code, "compares running models" in ran.err) == (2, True), ran.err


def test_one_bit(made):
    path = made[2] / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 1
    path.write_bytes(raw)
    code, found = verify(made[2])
    assert code == 1
    assert found["structure", "files"][0] == found["weights", "values"][0] == "fail"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 4}, "differs from the manifest in: r"),
        ({"lora_alpha": 9}, "lora_alpha"),
        ({"use_rslora": True}, "use_rslora"),
        ({"target_modules": ["q_proj"]}, "leaves out 24 layers that have matrices"),
        ({"target_modules": 3}, "target_modules"),
        ({"base_model_name_or_path": "me/other"}, "base_model_name_or_path"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_another_configuration(made, changes, said):
    edit(made[2], "adapter_config.json", **changes)
    code, found = verify(made[2])
    assert code == 1
    assert found["structure", "config"][0] == "fail"
    assert said in found["structure", "config"][1]
    assert found["weights", "config"][0] == "fail"


def test_another_alpha_in_both(made):
    """The manifest's is the only record of what was given by hand: it is not proven, but bound."""
    manifest = made[2] / "moeconv_manifest.json"
    content = json.loads(manifest.read_text())
    content["adapter"]["alpha"] = 2 * ALPHA
    manifest.write_text(json.dumps(content))
    code, found = verify(made[2])
    assert (code, found["structure", "config"][0]) == (1, "fail")


def test_another_adapter(tmp_path, made):
    base, _, out = made
    other, _ = adapter(tmp_path / "other", base, only=("query",))
    code, found = verify(out, "--source", other)
    assert code == 1
    assert found["weights", "config"][0] == "fail"
    wider = synthetic.write(tmp_path / "wider", "llama2", sizes={"F": 20})
    step, _ = adapter(tmp_path / "wide", wider)
    code, found = verify(out, "--source", step)
    assert "is not that of the base" in found["weights", "tensors"][1]
    code, _ = verify(out, "--source", base.run)
    assert code == 2  # it holds none


def test_a_base_that_is_gone(made):
    base, _, out = made
    shutil.rmtree(base.run)
    code, found = verify(out)
    assert code == 0
    assert found["weights", "weights"][0] == "skipped"
    assert "the base" in found["weights", "weights"][1]


def test_a_manifest_of_another_model(made):
    manifest = made[2] / "moeconv_manifest.json"
    content = json.loads(manifest.read_text())
    kinds = content["model"]["layer_kinds"]
    content["model"]["layer_kinds"] = {**kinds, "value": kinds["value"][:2]}
    manifest.write_text(json.dumps(content))
    code, found = verify(made[2])
    assert "other layers or experts" in found["weights", "tensors"][1]
    assert code == 1
    manifest.write_text(json.dumps({**content, "adapter": None}))
    ran = moeconv("verify", made[2])
    assert (ran.code, "not a manifest" in ran.err) == (2, True), ran.err


def test_what_else_is_said_of_it(made):
    ran = moeconv("inspect", made[2])
    assert (ran.code, "a LoRA adapter for PEFT" in ran.err) == (NotACheckpointError.exit_code, True)
    ran = moeconv("push", made[2], "--dry-run", "--repo-id", "me/x")
    assert ran.code == UnsupportedError.exit_code, ran.err
    assert "send it with hf upload" in ran.err
