"""What is wrong with a Hugging Face model is one sentence, and leaves nothing behind."""

import numpy as np
import pytest
from cli_runner import moeconv
from safetensors.numpy import load_file, save_file

from moeconv.errors import (
    ConfigError,
    NotACheckpointError,
    OutputError,
    TensorError,
    UnsupportedError,
)
from moeconv.untrusted import strict_json

INDEX = "model.safetensors.index.json"
FIRST = "model.layers.0.mlp.experts.0.gate_proj.weight"


def shards(model):
    return sorted(model.glob("*.safetensors"))


def change_tensors(model, change):
    """Rewrites the shard that holds `FIRST`, and the index with it."""
    index = strict_json.loads((model / INDEX).read_bytes())
    name = index["weight_map"][FIRST]
    tensors = load_file(model / name)
    change(tensors)
    save_file(tensors, model / name)
    kept = {t: file for t, file in index["weight_map"].items() if file != name}
    index["weight_map"] = {**kept, **dict.fromkeys(tensors, name)}
    (model / INDEX).write_bytes(strict_json.dumps(index))


def test_the_model_itself_converts(model, tmp_path):
    assert moeconv("convert", model, tmp_path / "out").code == 0


@pytest.mark.parametrize("content", [b'{"a', b"", b"\xff\xfe", b"[1]"])
def test_a_config_that_is_no_object(model, refused, content):
    (model / "config.json").write_bytes(content)
    assert f"{model}/config.json" in refused(ConfigError.exit_code)


def test_no_config(model, refused):
    (model / "config.json").unlink()
    assert "has no config.json" in refused(NotACheckpointError.exit_code)


def test_no_index(model, refused):
    (model / INDEX).unlink()
    said = refused(NotACheckpointError.exit_code)
    assert f"nor {INDEX}" in said and "download the index" in said


@pytest.mark.parametrize("content", [{}, {"weight_map": [1]}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map(model, refused, content):
    (model / INDEX).write_bytes(strict_json.dumps(content))
    assert "has no weight_map" in refused(ConfigError.exit_code)


def test_a_file_of_the_index_is_not_there(model, refused):
    shards(model)[1].unlink()
    assert f"{shards(model)[0].parent}/model-00002" in refused(NotACheckpointError.exit_code)


def test_an_index_that_leads_out(model, refused, tmp_path):
    (tmp_path / "other.safetensors").write_bytes(shards(model)[0].read_bytes())
    index = strict_json.loads((model / INDEX).read_bytes())
    name = index["weight_map"][FIRST]
    index["weight_map"] = {
        t: "../other.safetensors" if file == name else file
        for t, file in index["weight_map"].items()
    }
    (model / INDEX).write_bytes(strict_json.dumps(index))
    assert "leads out of" in refused(TensorError.exit_code)


def test_an_index_of_another_model(model, refused):
    index = strict_json.loads((model / INDEX).read_bytes())
    del index["weight_map"][FIRST]
    (model / INDEX).write_bytes(strict_json.dumps(index))
    assert "do not agree" in refused(TensorError.exit_code)


def test_a_tensor_is_missing(model, refused):
    change_tensors(model, lambda tensors: tensors.pop(FIRST))
    said = refused(TensorError.exit_code)
    assert "lacks these tensors of a Qwen3MoeForCausalLM" in said and FIRST in said


def test_a_tensor_too_many(model, refused):
    change_tensors(model, lambda tensors: tensors.update(extra=np.ones(3, np.float32)))
    said = refused(TensorError.exit_code)
    assert "has tensors that a Qwen3MoeForCausalLM does not have" in said and "extra" in said


def test_a_shape_that_config_denies(model, refused, edit):
    edit(moe_intermediate_size=32)
    said = refused(TensorError.exit_code)
    assert "has shape [24, 16], but config.json makes it [32, 16]" in said


def test_an_architecture_without_a_page(model, refused, edit):
    edit(architectures=["OPTForCausalLM"])
    said = refused(UnsupportedError.exit_code)
    assert "OPTForCausalLM has no page; moeconv reads" in said and "Qwen3MoeForCausalLM" in said


@pytest.mark.parametrize("named", [None, [], ["A", "B"], [1], "Qwen3MoeForCausalLM"])
def test_architectures_that_are_not_one(model, refused, edit, named):
    edit(architectures=named)
    assert "should name one class" in refused(ConfigError.exit_code)


@pytest.mark.parametrize("where", ["end", "middle of the header", "length"])
def test_a_cut_file(model, refused, where):
    path = shards(model)[0]
    raw = path.read_bytes()
    path.write_bytes({"end": raw[:-4], "middle of the header": raw[:100], "length": raw[:5]}[where])
    assert f"{path} is not a whole safetensors file" in refused(TensorError.exit_code)


def test_a_header_longer_than_its_file(model, refused):
    path = shards(model)[0]
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "the header is longer than the file" in refused(TensorError.exit_code)


@pytest.mark.parametrize("name", ["weights", "config.json", INDEX])
def test_a_link_out_of_the_folder(model, refused, tmp_path, name):
    path = shards(model)[0] if name == "weights" else model / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    code = TensorError.exit_code if name == "weights" else ConfigError.exit_code
    said = refused(code)
    assert f"{path} cannot be read: is a link that leads out of {model}" in said


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize(
    "name", ["model-Q4_K_M.gguf", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]
)
def test_weights_of_another_format(model, refused, name, config):
    for path in shards(model):
        path.unlink()
    (model / INDEX).unlink()
    if not config:
        (model / "config.json").unlink()
    (model / name).write_bytes(b"GGUF")
    said = refused(NotACheckpointError.exit_code)
    assert f"{model / name} is " in said
    assert ("llama.cpp" if name.endswith("gguf") else "save_pretrained") in said


@pytest.mark.parametrize("out", ["out", "a/b", "."])
def test_out_inside_of_the_model(model, out):
    before = sorted(model.rglob("*"))
    ran = moeconv("convert", model, model / out, "--quiet", "--overwrite")
    assert ran.code == OutputError.exit_code
    assert f"is inside the source {model}" in ran.error
    assert sorted(model.rglob("*")) == before


def test_code_is_never_run(model, edit, tmp_path):
    """DeepSeek and Kimi publish theirs; where a page knows the architecture it is not needed."""
    trap = f"open({str(tmp_path / 'run')!r}, 'w')\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (model / name).write_text(trap)
    auto = {"AutoTokenizer": ["tokenization_x.X", None]}
    (model / "tokenizer_config.json").write_bytes(strict_json.dumps({"auto_map": auto}))
    edit(auto_map={"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"})
    ran = moeconv("convert", model, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out" / "tokenizer").exists()
    assert "no tokenizer is written" in ran.err and "as code (tokenization_x.py)" in ran.err
    assert "--tokenizer" in ran.err
