"""`--merge-lora`: the merged model, every value the exact sum rounded once, and verify's proof."""

import json

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
import pytest
import synthetic
from cli_runner import moeconv
from engine_lab import contents, tensors
from inputs_lab import converted
from lora_model import ALPHA, RANK, adapter, product

import moeconv as api
from moeconv.errors import TensorError
from moeconv.tensor.dtypes import round_once
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status, worst
from moeconv.verification.levels.weights import check_weights


def merge(base, step, out, *options):
    config = base.config_file(out.parent)
    return moeconv("convert", base.run, out, "--merge-lora", step, "--config", config, *options)


def weights(out):
    return worst(check_weights(Candidate.open(out), jobs=1, memory=2**30))


@pytest.mark.parametrize(
    ("block", "options"),
    [("mixtral", {}), ("mixtral", {"split": {"D": 2, "H": 2, "h": 2, "M": 3, "E": 2}}),
     ("llama2", {"scanned": False, "dtype": "bfloat16"})],
    ids=["experts and norms", "in chunks", "bfloat16"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["fused", "apart"])
def test_each_value_is_the_sum_rounded_once(tmp_path, block, options, form):
    base = synthetic.write(tmp_path / "base", block, **options)
    step, factors = adapter(tmp_path / "lora", base, form=form, everything=True)
    out = tmp_path / "out"
    assert (ran := merge(base, step, out, "--jobs", "2")).code == 0, ran.err
    assert "factors added" in ran.err
    added = product(base, factors)

    def change(arrays):
        for name, value in added.items():
            wide = arrays[name].astype(np.float64) + value
            arrays[name] = round_once(wide, arrays[name].dtype.name)

    summed = synthetic.write(tmp_path / "summed", block, change=change, **options)
    wanted, _ = converted(summed, tmp_path / "wanted")
    found = tensors(out)
    assert found.keys() == wanted.keys()
    folded = {name for name in found if "q_proj" in name}  # rounded once here, and twice there
    for name in found.keys() - folded:
        assert found[name] == wanted[name], name
    assert weights(out) is Status.PASS
    manifest = json.loads((out / "moeconv_manifest.json").read_text())
    assert manifest["adapter"]["merged"]
    assert manifest["adapter"]["scale"] == ALPHA / RANK
    assert any("kernel_lora_a" in name for name in manifest["source"]["arrays"])
    assert "lora_a" in " ".join(manifest["rules"])


def test_a_wrong_value_or_another_adapter_fails(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, _ = adapter(tmp_path / "lora", base)
    assert merge(base, step, tmp_path / "out").code == 0
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 1  # the last bit of a weight's significand
    path.write_bytes(raw)
    assert weights(tmp_path / "out") is Status.FAIL
    raw[-4] ^= 1
    path.write_bytes(raw)
    assert weights(tmp_path / "out") is Status.PASS
    manifest = tmp_path / "out" / "moeconv_manifest.json"
    content = json.loads(manifest.read_text())
    content["adapter"]["alpha"] *= 1.001
    manifest.write_text(json.dumps(content))
    assert weights(tmp_path / "out") is Status.FAIL


def test_one_checkpoint_with_both_and_a_plan(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, factors = adapter(tmp_path / "lora", base)
    beside = {("params", "params", *path): value for path, value in factors.items()}
    both = synthetic.write(tmp_path / "both", "llama2", beside=beside)
    alpha = ["--set", f"lora_alpha={ALPHA}"]
    assert merge(base, step, tmp_path / "one").code == 0
    assert (ran := merge(both, both.run, tmp_path / "two", *alpha)).code == 0, ran.err
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two")
    assert weights(tmp_path / "two") is Status.PASS
    plan = api.plan(base.run, merge_lora=step, config=base.config_file(tmp_path))
    plan.save(tmp_path / "plan.json")
    again = api.load_plan(tmp_path / "plan.json")
    assert again == plan
    api.convert(again, tmp_path / "three")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    ran = moeconv("convert", both.run, tmp_path / "x", "--config", both.config_file(tmp_path))
    assert (ran.code, "--merge-lora" in ran.error) == (5, True)


def test_refusals(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    other = synthetic.write(tmp_path / "other", "llama2", sizes={"F": 20})
    step, _ = adapter(tmp_path / "lora", other)
    ran = merge(base, step, tmp_path / "out")
    assert (ran.code, "no low-rank factors" in ran.error) == (TensorError.exit_code, True)
    assert merge(base, base.run, tmp_path / "out").code == 3
    assert merge(base, step, tmp_path / "out", "--base", base.run).code == 2
    assert not (tmp_path / "out").exists()
    ran = merge(other, step, step)
    assert (ran.code, "inside the source" in ran.error) == (7, True)
