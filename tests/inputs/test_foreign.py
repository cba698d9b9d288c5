"""What is no Orbax checkpoint, or is not where one is looked for: said truly, with what to do."""

import json
import os
import shutil

import pytest
import synthetic
from cli_runner import moeconv
from inputs_lab import as_leaf, converted

from moeconv.errors import NotACheckpointError
from moeconv.maxtext.checkpoint import open_checkpoint
from moeconv.orbax.locate import locate
from moeconv.orbax.store import Folder


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"checkpoint_1000": b"\x81"}, "checkpoint_1000: a checkpoint of Flax"),
        (
            {"10/items/checkpoint": b"\x81"},
            "items/ has no _METADATA, and holds checkpoint: a check",
        ),
        ({"params.pkl": b"x"}, "params.pkl: pickled objects, which are never opened"),
        ({"params.npz": b"PK"}, "params.npz: arrays in one file"),
        ({"pytorch_model-00001-of-00002.bin": b"x"}, "is pickled by torch"),
        (
            {"config.json": b"{}", "model.safetensors": b"x"},
            "model.safetensors: weights of Hugging Face",
        ),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"},
            "a LoRA adapter for PEFT",
        ),
        ({"moeconv_manifest.json": b"{}", "model.safetensors": b"x"}, "has no config.json"),
        ({"model.ckpt-10.index": b"x", "checkpoint": b"x"}, "a checkpoint of TensorFlow"),
        ({"run.tar.gz": b"x"}, "run.tar.gz: an archive; unpack it"),
        ({"manifest.ocdbt": b"x"}, "_METADATA is not there; copy the item whole"),
        ({"params.params.decoder.decoder_norm.scale/.zarray": b"x"}, "whose _METADATA is not the"),
        ({"model-\x1b[31m.gguf": b"x"}, r"model-\x1b[31m.gguf is GGUF"),
    ],
)
def test_something_else(tmp_path, files, said):
    for name, content in files.items():
        path = tmp_path / "it" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for command in (("inspect",), ("convert", tmp_path / "out")):
        ran = moeconv(command[0], tmp_path / "it", *command[1:])
        assert (ran.code, said in ran.error) == (3, True), ran.err
    if len(files) == 1 and (only := tmp_path / "it" / next(iter(files))).suffix in (".pkl", ".gz"):
        assert said in moeconv("inspect", only).error


def test_a_folder_around_what_is_meant(tmp_path):
    made = synthetic.write(tmp_path / "around" / "run")
    with pytest.raises(NotACheckpointError, match=r"around/run may be what is meant"):
        locate(str(tmp_path / "around"))
    (made.run / "checkpoints").rename(made.run / "ckpts")
    with pytest.raises(NotACheckpointError, match=r"run/ckpts may be what is meant"):
        locate(str(made.run))
    shutil.copytree(made.run / "ckpts" / "0", tmp_path / "two" / "step_one")
    shutil.copytree(made.run / "ckpts" / "0" / "items", tmp_path / "two" / "step_two")
    with pytest.raises(NotACheckpointError, match=r"two/step_one or .*two/step_two may be"):
        locate(str(tmp_path / "two"))


def test_the_policy_of_rl(tmp_path):
    """Tunix puts its steps in `actor`, beside those of a critic; the run's config is above."""
    made = synthetic.write(
        tmp_path / "run", step=7, item="model_params", rename=as_leaf("base", value=True)
    )
    usual, _ = converted(made, tmp_path / "usual")
    for name in ("critic", "actor"):
        shutil.copytree(made.step_dir, made.run / "checkpoints" / name / "7")
    shutil.rmtree(made.step_dir)
    sidecar = {"format": "moeconv-run", "version": 1, "config": dict(made.config)}
    (made.run / "moeconv_run.json").write_text(json.dumps(sidecar))
    places = [made.run, made.run / "checkpoints", made.run / "checkpoints" / "actor"]
    for number, spec in enumerate([*places, places[-1] / "7", places[-1] / "7" / "model_params"]):
        opened = open_checkpoint(str(spec))
        assert opened.step.number == 7
        assert opened.sidecar.folder.local == made.run
        assert converted(made, tmp_path / f"out{number}", spec)[0] == usual
    shutil.copytree(places[-1] / "7", made.run / "checkpoints" / "9")
    with pytest.raises(NotACheckpointError, match=r"both .*checkpoints/9 and .*actor/7 may be"):
        locate(str(made.run))


@pytest.mark.parametrize(
    "root", [("params", "params", "params"), ("base", "base"), ("state", "params"), ("ema",)]
)
def test_a_model_elsewhere_in_the_tree(tmp_path, root):
    made = synthetic.write(tmp_path / "run", rename=as_leaf(*root))
    with pytest.raises(NotACheckpointError, match=rf"a model below {'.'.join(root)}, where no Ma"):
        open_checkpoint(str(made.run))


def test_ways_to_write_an_address(tmp_path, monkeypatch):
    place = tmp_path / "a b%20c"
    made = synthetic.write(place / "run")
    quoted = f"{tmp_path}/a%20b%2520c/run"
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(made.run)
    for spec in (
        made.run, f"{made.run}//", f"file://{quoted}", f"file://{quoted}/", f"file:{quoted}",
        f"FILE://localhost{quoted}", "~/run", ".", "checkpoints/../checkpoints/0/items/",
    ):  # fmt: skip
        assert locate(str(spec)).items.local == made.items
    assert Folder.open("GS://bucket/Path").url == "gs://bucket/Path"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gs://", "gs:// names no bucket"),
        ("s3:///x", "s3:///x names no bucket"),
        ("https:///x", "names no server"),
        ("file://~/run", "names no file of this machine; give file:///PATH"),
        ("gs:/bucket/x", "is an address that moeconv cannot read"),
    ],
)
def test_half_an_address(spec, said):
    ran = moeconv("inspect", spec)
    assert (ran.code, said in ran.err) == (3, True), ran.err


def test_links_on_the_way(tmp_path):
    made = synthetic.write(tmp_path / "run", step=12)
    os.symlink("12", made.run / "checkpoints" / "latest")
    os.symlink(made.run, tmp_path / "link")
    for spec in (made.run, made.run / "checkpoints" / "latest", tmp_path / "link"):
        assert locate(str(spec)).number == 12
