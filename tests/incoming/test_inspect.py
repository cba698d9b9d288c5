"""What inspect says of a Hugging Face model: what it is, and whether MaxText can hold it."""

import json

import numpy as np
import pytest
from cli_runner import moeconv
from safetensors.numpy import load_file, save_file

import moeconv as api
from moeconv.errors import TensorError, UsageError


def said(model):
    ran = moeconv("inspect", model, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_what_it_is(made):
    report = said(made)
    assert report["model"] == str(made) and report["kind"] == "Hugging Face model"
    assert report["architectures"] == ["Qwen3MoeForCausalLM"]
    assert report["converts"] and report["refusals"] == []
    assert (report["decoder_block"], report["scan_layers"]) == ("qwen3_moe", True)
    assert report["dtypes"] == {"float32": len(report["tensors"])}
    assert report["files"] == {p.name: p.stat().st_size for p in made.iterdir()}
    stored = {n: a for p in made.glob("*.safetensors") for n, a in load_file(p).items()}
    assert {t["name"]: t["shape"] for t in report["tensors"]} == {
        name: list(array.shape) for name, array in stored.items()
    }
    assert report["num_parameters"] == sum(a.size for a in stored.values())
    assert report["bytes"] == sum(a.nbytes for a in stored.values())
    field = report["fields"]["num_experts"]
    assert field["value"] == 4 and field["source"].endswith("config.json")


def test_people_and_python_are_told_the_same(made):
    ran = moeconv("inspect", made)
    assert ran.code == 0
    assert "becomes MaxText's qwen3_moe, layers stacked" in ran.out
    assert "model.layers.{0...3}.mlp.experts.{0...3}.gate_proj.weight" in ran.out
    model = api.open_checkpoint(made)
    assert [line.rstrip() for line in ran.out.splitlines()] == str(model).splitlines()
    assert model.as_dict() == said(made)


def test_nothing_is_written(model):
    before = sorted(model.rglob("*"))
    said(model)
    assert sorted(model.rglob("*")) == before


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM has no page"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"moe_intermediate_size": 32}, "has shape [24, 16]"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
    ],
)
def test_why_it_is_refused(model, edit, keys, words):
    edit(**keys)
    report = said(model)
    assert not report["converts"] and report["decoder_block"] is None
    assert words in report["refusals"][0]
    assert report["quantization"] == keys.get("quantization_config", {}).get("quant_method")
    assert report["num_parameters"] > 0
    ran = moeconv("inspect", model)
    assert "cannot be converted to MaxText: " in ran.out and words in ran.out


def test_what_is_left_out(model, edit):
    name = sorted(model.glob("*.safetensors"))[0]
    extra = "model.layers.4.eh_proj.weight"
    save_file({**load_file(name), extra: np.ones(3, np.float32)}, name)
    index = edit("model.safetensors.index.json")
    index["weight_map"][extra] = name.name
    edit("model.safetensors.index.json", weight_map=index["weight_map"])
    assert extra in said(model)["left_out"]
    ran = moeconv("inspect", model)
    assert f"{extra} is left out: it is of a layer behind the last" in ran.err


def test_what_cannot_be_read_is_an_error(model):
    path = sorted(model.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    ran = moeconv("inspect", model)
    assert ran.code == TensorError.exit_code
    assert f"{path} is not a whole safetensors file" in ran.error


def test_options_of_a_checkpoint_are_refused(made):
    ran = moeconv("inspect", made, "--set", "rope_max_timescale=1")
    assert ran.code == UsageError.exit_code
    assert "has a config.json" in ran.error


def test_a_key_that_nobody_knows(model, edit):
    edit(frobnication=7)
    assert "--accept-key frobnication" in said(model)["refusals"][0]
    ran = moeconv("inspect", model, "--accept-key", "frobnication", "--json")
    assert json.loads(ran.out)["converts"]
