"""`moeconv verify` of a MaxText run made of a Hugging Face model: each mistake is found."""

import json
import shutil

import numpy as np
import pytest
import synthetic
import tensorstore as ts
import yaml
from cli_runner import moeconv
from incoming_lab import BLOCKS, converted
from outputs_lab import admit, write_tokenizer

from moeconv.artifact.manifest import MANIFEST_NAME
from moeconv.errors import NotACheckpointError, UsageError
from moeconv.hub.local import Output
from moeconv.maxtext.sidecar import SIDECAR_NAME
from moeconv.verification.checks import Status, worst
from moeconv.verification.run import verify
from moeconv.verification.settings import ParityOptions, VerifyOptions

ITEMS = "checkpoints/0/items"
VOCABULARY = synthetic.SIZES["V"] - 2


@pytest.fixture(autouse=True)
def without_maxtext(request, monkeypatch):
    """As where neither MaxText nor transformers is: only the last test has the minute for them."""
    if "logits" in request.node.name:
        return
    module = "moeconv.verification.incoming.structure"
    monkeypatch.setattr(f"{module}.importlib.util.find_spec", lambda name: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A 16-bit model, and the run of it whose every array is a folder: not to be changed."""
    root = tmp_path_factory.mktemp("mixtral")
    ckpt = synthetic.write(root / "trained", "mixtral", dtype="bfloat16", tied=False)
    flags = ("--config", ckpt.config_file(), "--dtype", "bfloat16")
    model = converted(ckpt.run, root / "model", *flags)
    write_tokenizer(model, [f"w{n}" for n in range(VOCABULARY)])
    return model, converted(model, root / "run", "--no-ocdbt", "--zarr2")


@pytest.fixture
def run(made, tmp_path):
    """A run of one's own."""
    return shutil.copytree(made[1], tmp_path / "run")


def checks(out, *levels, source=None, **parity):
    options = VerifyOptions(levels=levels, parity=ParityOptions(**parity))
    report = verify(out, source=source, options=options)
    return {check.name: check for check in report.checks}


def failed(found):
    return {name for name, check in found.items() if check.status is Status.FAIL}


def said(found):
    return [(c.name, c.summary) for c in found.values() if c.status is Status.FAIL]


def readmit(out):
    """The manifest agrees with whatever the files are now."""
    path = out / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    there = [p for p in out.rglob("*") if p.is_file() and p != path]
    manifest["files"] = {}
    path.write_text(json.dumps(manifest))
    admit(out, *(str(p.relative_to(out)) for p in there))


def change(out, name, by):
    """Writes an array anew."""
    kvstore = {"driver": "file", "path": f"{out / ITEMS / name}/"}
    store = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    values = np.asarray(store.read().result())
    store.write(by(values.copy())).result()
    readmit(out)


def settings(out, **keys):
    path = out / "config.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))


def array(run, end):
    (found,) = (p.name for p in (run / ITEMS).iterdir() if p.name.endswith(end))
    return found


def low_bit(values):
    values.reshape(-1).view(f"u{values.itemsize}")[7] ^= 1
    return values


@pytest.mark.parametrize("block", BLOCKS)
def test_what_convert_made_passes(tmp_path, block):
    """Of every family, with all that folds, pads and joins."""
    ckpt = synthetic.write(tmp_path / "trained", block, dtype="bfloat16", tied=False)
    flags = ("--config", ckpt.config_file(), "--dtype", "bfloat16")
    model = converted(ckpt.run, tmp_path / "model", *flags)
    found = checks(converted(model, tmp_path / "run"), "structure", "weights")
    assert worst(found.values()) is Status.PASS, said(found)
    made = {"files", "tensors", "dtypes", "finite", "config", "description", "source", "values"}
    assert {name for name in made if found[name].status is Status.PASS} == made
    assert "not installed" in found["maxtext"].summary


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_array_may_round_once(tmp_path, made, dtype):
    """A wider source in bfloat16 is rounded, a narrower one in float32 is not."""
    ckpt = synthetic.write(tmp_path / "trained", "llama2", tied=False)
    flags = ("--config", ckpt.config_file(), "--dtype", "float32")
    model = converted(ckpt.run, tmp_path / "model", *flags)
    out = converted(model, tmp_path / "run", "--no-ocdbt", "--zarr2", "--dtype", dtype)
    found = checks(out, "structure", "weights")
    assert worst(found.values()) is Status.PASS, said(found)
    change(out, array(out, "wo.kernel"), low_bit)
    assert failed(checks(out, "structure", "weights")) == {"values"}


def test_a_low_bit_that_the_way_back_rounds_off_is_found(run):
    """The query kernel is wider than its tensor: as a bfloat16 the two would be the same."""
    name = array(run, "query.kernel")
    change(run, name, low_bit)
    found = checks(run, "structure", "weights")
    assert failed(found) == {"values"}
    assert [t.endswith("q_proj.weight") for t in found["values"].tensors] == [True]
    assert "differ from the Hugging Face model" in found["values"].summary


def test_swapped_experts_are_found(run):
    name = array(run, "MoeBlock_0.wi_0")
    change(run, name, lambda values: values[::-1])
    found = checks(run, "weights")
    assert failed(found) == {"values"}
    assert all(t.endswith("w1.weight") for t in found["values"].tensors)
    assert found["source"].status is Status.PASS  # so the run is at fault


def test_another_source_is_found(made, run, tmp_path):
    """The values of OUT and of the model differ, and the model is not the one that was read."""
    model = shutil.copytree(made[0], tmp_path / "model")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    found = checks(run, "weights", source=str(model))
    assert failed(found) == {"source", "values"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "description" in failed(checks(run, "weights", source=str(model)))


def tamper(out):
    path = next((out / ITEMS / array(out, "wi_0")).glob("0.*"))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def lose_an_array(out):
    name = array(out, "wi_1")
    shutil.rmtree(out / ITEMS / name)
    path = out / ITEMS / "_METADATA"
    content = json.loads(path.read_text())
    tree = content["tree_metadata"]
    lost = next(k for k in tree if k.endswith("'wi_1')"))
    del tree[lost]
    path.write_text(json.dumps(content))
    readmit(out)


def wrong_theta(out):
    settings(out, rope_max_timescale=1234.0)
    readmit(out)


def one_setting_more(out):
    settings(out, logits_dot_in_fp32=True)
    readmit(out)


def stale_sidecar(out):
    path = out / SIDECAR_NAME
    content = json.loads(path.read_text())
    content["config"]["rope_max_timescale"] = 1234.0
    path.write_text(json.dumps(content))
    readmit(out)


def settings_beside(out):
    (out / "base.yml").write_text("rope_max_timescale: 1234.0\n")


def infinite(out):
    def by(values):
        values.reshape(-1)[3] = np.inf
        return values

    change(out, array(out, "wo"), by)


def other_scan_layers(out):
    path = out / "checkpoints/0/_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["scan_layers"] = False
    path.write_text(json.dumps(content))
    readmit(out)


@pytest.mark.parametrize(
    ("mistake", "check"),
    [
        (tamper, "files"),
        (lose_an_array, "tensors"),
        (other_scan_layers, "tensors"),
        (infinite, "finite"),
        (wrong_theta, "config"),
        (one_setting_more, "config"),
        (stale_sidecar, "config"),
        (settings_beside, "config"),
    ],
)
def test_level_structure_finds(run, mistake, check):
    mistake(run)
    assert check in failed(checks(run, "structure"))


def test_a_wrong_value_that_all_of_out_agrees_on_is_found_by_the_source(run):
    """Manifest, config.yml and sidecar all have it: structure cannot know."""
    wrong_everywhere(run)
    assert worst(checks(run, "structure").values()) is Status.PASS
    found = checks(run, "weights")
    assert failed(found) == {"description"}
    assert "rope_theta is 1234.0, not" in found["description"].summary


def wrong_everywhere(out):
    stale_sidecar(out)
    wrong_theta(out)
    path = out / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["model"]["rope_theta"]["value"] = 1234.0
    path.write_text(json.dumps(manifest))


def test_another_tokenizer_is_found(run):
    write_tokenizer(run / "tokenizer", [f"w{n}" for n in reversed(range(VOCABULARY))])
    readmit(run)
    assert failed(checks(run, "structure", "weights")) == {"tokenizer"}


def test_the_command_gives_a_verdict_and_push_refuses_the_run(run, tmp_path):
    ran = moeconv("verify", run, "--level", "weights")
    assert ran.code == 0, ran.err
    assert json.loads((run / "verify.json").read_text())["verdict"] == "pass"
    with pytest.raises(NotACheckpointError, match="is a training run; give the output"):
        Output.open(run)


def test_what_cannot_be_is_a_sentence(made, run):
    with pytest.raises(UsageError, match="--against is for converted Hugging Face models"):
        checks(run, "weights", against=made[0])
    path = run / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["source"]["path"] = "/nonexistent/model"
    path.write_text(json.dumps(manifest))
    ran = moeconv("verify", run, "--level", "weights")
    assert ran.code == 2
    assert "--source gives another" in ran.err
    (run / "checkpoints" / "link").symlink_to("/etc")
    ran = moeconv("verify", run, "--level", "structure")
    assert ran.code == 2
    assert "outside" in ran.err or "leads out" in ran.err


@pytest.mark.slow
@pytest.mark.maxtext
def test_logits_and_layers_are_those_of_transformers(made, run):
    """MaxText's own tree, its own reading of config.yml, and what both models compute."""
    shutil.rmtree(run / "tokenizer")  # it is a toy, which gives no text back
    readmit(run)
    found = verify(run, source=None, options=VerifyOptions(parity=ParityOptions(tokens=64)))
    assert found.verdict is Status.PASS, said({c.name: c for c in found.checks})
    names = {(c.level, c.name) for c in found.checks if c.status is Status.PASS}
    running = {"reference", "parity", "router"}
    assert {("logits", name) for name in (*running, "greedy")} <= names
    assert {("layers", name) for name in (*running, "hidden")} <= names
    assert ("structure", "maxtext") in names
    wrong_everywhere(run)
    for level in ("logits", "layers"):
        assert "parity" in failed(checks(run, level, tokens=64))
