"""A LoRA adapter becomes one of PEFT: names, values and files, without MaxText, torch or peft.

The arrays have the names and shapes that MaxText writes (`tests/lora/test_peft.py` has it write
them): qwix keeps contracted axes and others each as one axis, MaxText's decode server each apart.
"""

import json

import numpy as np
import pytest
import synthetic
from cli_runner import moeconv
from engine_lab import contents, tensors
from inputs_lab import as_leaf
from lora_model import ALPHA, RANK, adapter, merged_tensors, values

import moeconv as api
from moeconv.errors import ConfigError, NotACheckpointError, TensorError, UnsupportedError

TARGETS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def convert(base, step, out, *options):
    config = base.config_file(out.parent)
    return moeconv("convert", step, out, "--base", base.run, "--config", config, *options)


def deltas(out):
    """What PEFT adds to each weight, in float64."""
    config = json.loads((out / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    found = {n: np.asarray(v, np.float64) for n, v in values(out).items()}
    start, end = "base_model.model.", ".lora_A.weight"
    modules = [name[len(start) : -len(end)] for name in found if name.endswith(end)]
    assert 2 * len(modules) == len(found)
    return {
        f"{name}.weight": scale
        * (found[f"{start}{name}.lora_B.weight"] @ found[f"{start}{name}.lora_A.weight"])
        for name in modules
    }


@pytest.mark.parametrize(
    ("block", "scanned", "form"),
    [("llama2", True, "fused"), ("qwen3", False, "fused"), ("olmo3", True, "apart"),
     ("llama2", True, "server"), ("deepseek", True, "fused"), ("gemma3", True, "fused"),
     ("gemma3", False, "fused"), ("qwen3_next", False, "fused")],
)  # fmt: skip
def test_what_peft_adds_is_what_was_trained(tmp_path, block, scanned, form):
    base = synthetic.write(tmp_path / "base", block, scanned=scanned)
    step, factors = adapter(tmp_path / "lora", base, form=form)
    out = tmp_path / "out"
    assert (ran := convert(base, step, out, "--base-model", "me/base")).code == 0, ran.err
    wanted = merged_tensors(tmp_path, base, factors, block, scanned=scanned)
    found = deltas(out)
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        np.testing.assert_allclose(delta, wanted[name], rtol=0, atol=2e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    if block not in ("deepseek", "qwen3_next"):
        assert config["target_modules"] == TARGETS
        return
    # For such a name alone PEFT takes the experts.
    assert not {"gate_proj", "up_proj", "down_proj"} & set(config["target_modules"])
    shared = "shared_expert" if block == "qwen3_next" else "shared_experts"
    assert f"model.layers.1.mlp.{shared}.up_proj.weight" in config["target_parameters"]
    if block == "deepseek":
        assert "model.layers.0.mlp.down_proj.weight" in config["target_parameters"]


def test_the_folder(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, _ = adapter(tmp_path / "lora", base)
    out = tmp_path / "out"
    ran = convert(base, step, out)
    assert "adapter_config.json names no base model" in ran.err
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "moeconv_manifest.json",
    ]  # fmt: skip
    manifest = json.loads((out / "moeconv_manifest.json").read_text())
    assert manifest["kind"] == "peft"
    assert manifest["adapter"]["scale"] == ALPHA / RANK
    assert manifest["adapter"]["checkpoint"] == str(base.items)
    assert {f["target"] for f in manifest["folds"]} == {"model.layers.{L}.self_attn.q_proj.weight"}
    assert f"alpha / rank = {ALPHA / RANK:g}" in (out / "README.md").read_text()
    assert convert(base, step, out).code == 7  # OUT is not empty
    assert convert(base, step, out, "--overwrite", "--dtype", "bfloat16").code == 0
    assert json.loads((out / "moeconv_manifest.json").read_text())["dtype"] == "bfloat16"


def test_only_some_layers(tmp_path):
    """`target_modules` names whole modules where the last name would mean others too."""
    base = synthetic.write(tmp_path / "base", "llama2", scanned=False)
    step, _ = adapter(tmp_path / "lora", base, only=("layers_2", "query"))
    out = tmp_path / "out"
    assert convert(base, step, out).code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.2.self_attn.q_proj"]


def test_a_plan_of_an_adapter(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, _ = adapter(tmp_path / "lora", base)
    config = base.config_file(tmp_path)
    plan = api.plan(step, base=base.run, base_model="me/base", config=config)
    plan.save(tmp_path / "plan.json")
    again = api.load_plan(tmp_path / "plan.json")
    assert again == plan
    api.convert(again, tmp_path / "one")
    assert convert(base, step, tmp_path / "two", "--base-model", "me/base").code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_one_checkpoint_with_both(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, factors = adapter(tmp_path / "lora", base)
    beside = {("params", "params", *path): value for path, value in factors.items()}
    both = synthetic.write(tmp_path / "both", "llama2", beside=beside)
    assert convert(base, step, tmp_path / "one").code == 0
    ran = convert(both, both.run, tmp_path / "two")
    assert (ran.code, "alpha" in ran.error) == (ConfigError.exit_code, True)
    ran = convert(both, both.run, tmp_path / "two", "--set", f"lora_alpha={ALPHA}")
    assert ran.code == 0, ran.err
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two")


@pytest.mark.parametrize("root", [(), ("base",)], ids=["top", "base"])
def test_an_nnx_state(tmp_path, root):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, _ = adapter(tmp_path / "lora", base)
    rename = as_leaf(*root, value=True)
    state, _ = adapter(tmp_path / "state", base, item="model_params", rename=rename)
    assert convert(base, step, tmp_path / "one").code == 0
    assert convert(base, state, tmp_path / "two").code == 0
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two")


def test_the_decode_server_s_config(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, _ = adapter(tmp_path / "lora", base, form="server", custom={})
    assert convert(base, step, tmp_path / "out").code == ConfigError.exit_code
    said = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
    (step.parent / "adapter_config.json").write_text(json.dumps(said))
    assert convert(base, step, tmp_path / "out").code == 0
    (step.parent / "adapter_config.json").write_text(json.dumps({**said, "r": RANK + 1}))
    ran = convert(base, step, tmp_path / "other")
    assert f"rank {RANK + 1}, but the factors have rank {RANK}" in ran.error


def test_what_peft_cannot_hold_is_named(tmp_path):
    base = synthetic.write(tmp_path / "base", "mixtral")
    step, _ = adapter(tmp_path / "lora", base, everything=True)
    ran = convert(base, step, tmp_path / "out")
    assert ran.code == UnsupportedError.exit_code
    for reason in (
        "decoder.layers.MoeBlock_0.wi_0: experts",
        "decoder.layers.MoeBlock_0.gate.kernel: a router",
        "decoder.layers.pre_self_attention_layer_norm.scale: model.layers.",
        "--merge-lora",
    ):
        assert reason in ran.error
    assert "self_attention" not in ran.error.replace("pre_self_attention_layer_norm", "").replace(
        "post_self_attention_layer_norm", ""
    )
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, _ = adapter(tmp_path / "lora", base)

    def refused(error, said, *args):
        ran = convert(*args)
        assert (ran.code, said in ran.error) == (error.exit_code, True), ran.err
        assert not args[2].exists()

    out = tmp_path / "out"
    refused(NotACheckpointError, "holds no LoRA adapter", base, base.run, out)
    other = synthetic.write(tmp_path / "other", "llama2", sizes={"F": 20})
    refused(TensorError, "are no low-rank factors of", other, step, out)
    moe = synthetic.write(tmp_path / "moe", "mixtral")
    refused(TensorError, "that the base model has not", moe, step, out)
    refused(ConfigError, "rank 2, but the factors", base, step, out, "--set", "lora_rank=2")
    half, _ = adapter(tmp_path / "half", base, without="lora_b")
    refused(TensorError, "the other is not there", base, half, out)
    ran = convert(base, step, out, "--untie")
    assert ran.code == 2
    ran = moeconv("convert", base.run, out, "--base-model", "x", "--config", base.config_file())
    assert ran.code == 2


def test_inspect(tmp_path):
    base = synthetic.write(tmp_path / "base", "llama2")
    step, factors = adapter(tmp_path / "lora", base)
    ran = moeconv("inspect", step)
    assert ran.code == 0, ran.err
    assert "a LoRA adapter and no model" in ran.out
    assert f"lora_rank {RANK}, lora_alpha {ALPHA}" in ran.out
    assert "--base BASE" in ran.out
    data = json.loads(moeconv("inspect", step, "--json").out)
    assert len(data["adapter"]["changes"]) == 7
    beside = {("params", "params", *path): value for path, value in factors.items()}
    both = synthetic.write(tmp_path / "both", "llama2", beside=beside)
    ran = moeconv("inspect", both.run, "--config", both.config_file())
    assert ran.code == 0, ran.err
    assert f"holds a LoRA adapter as well ({len(factors)} matrices)" in ran.out
