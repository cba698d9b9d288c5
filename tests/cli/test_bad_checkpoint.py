"""What is no checkpoint, not whole, or not for us ends in one sentence, and nothing on the disk."""

import json
import os
import shutil

import pytest
from cli_runner import moeconv
from refusals import CLICK_USAGE, convert, out_of, refused

from moeconv.errors import NotACheckpointError, TensorError, UsageError


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("empty", ["is no MaxText checkpoint", "_METADATA"]),
        ("file", ["is a file", "give a MaxText run"]),
        ("missing", ["does not exist"]),
        ("random", ["is no MaxText checkpoint"]),
        ("empty-checkpoints", ["is no MaxText checkpoint"]),
        ("empty-step", ["holds no step that can be read (7: no _METADATA"]),
        ("converted", ["is no MaxText checkpoint"]),
    ],
)
def test_not_a_checkpoint(tmp_path, what, words, command):
    source = tmp_path / what
    if what == "file":
        source.write_text("a file")
    elif what != "missing":
        source.mkdir()
    if what == "random":
        (source / "README.md").write_text("# hello")
        (source / "src").mkdir()
    if what == "empty-checkpoints":
        (source / "checkpoints").mkdir()
    if what == "empty-step":
        (source / "checkpoints" / "7").mkdir(parents=True)
    if what == "converted":
        (source / "config.json").write_text("{}")
        (source / "moeconv_manifest.json").write_text('{"format": "moeconv"}')
    out = tmp_path / "out"
    args = [out] if command == "convert" else []
    refused(moeconv(command, source, *args), NotACheckpointError, str(source), *words, out=out)


def test_a_home_that_nobody_has():
    refused(moeconv("inspect", "~no-such-user/run"), NotACheckpointError, "~no-such-user")


@pytest.mark.parametrize(
    ("args", "what"),
    [(["convert", "CKPT", "", "--overwrite"], "the argument after CKPT"),
     (["convert", "", "out"], "the argument after convert"),
     (["convert", "CKPT", "out", "--config", ""], "the argument after --config"),
     (["convert", "CKPT", "out", "--config="], "the value of --config="),
     (["verify", "out", "--source="], "the value of --source="),
     (["data", "prepare", "", "--out", "x"], "the argument after prepare"),
     (["push", ""], "the argument after push"), ([""], "the argument after moeconv")],
)  # fmt: skip
def test_an_empty_argument(tmp_path, monkeypatch, args, what):
    monkeypatch.chdir(tmp_path)
    sentence = refused(moeconv(*args), UsageError, what)
    assert sentence == f"{what} is empty; is a shell variable not set?"
    assert os.listdir(tmp_path) == []


def test_no_arguments():
    for args in (["convert"], ["convert", "run"], ["inspect"], ["frobnicate"], ["convert", "--x"]):
        ran = moeconv(*args)
        assert ran.code == CLICK_USAGE
        assert "Usage: " in ran.err
        assert "Traceback" not in ran.err


def leave_unfinished(step):
    """As Orbax leaves a save that was killed: the time of the commit comes before the marker."""
    (step / "commit_success.txt").unlink()
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit_timestamp_nsecs": None}))


def test_an_unfinished_save(checkpoint):
    leave_unfinished(checkpoint.step_dir)
    for spec in (checkpoint.step_dir, checkpoint.items):
        ran = moeconv("convert", spec, out_of(checkpoint))
        refused(ran, NotACheckpointError, "has no commit time", out=out_of(checkpoint))
    ran = convert(checkpoint)
    refused(ran, NotACheckpointError, "only unfinished saves (0", out=out_of(checkpoint))


def test_a_save_in_progress(checkpoint):
    """What Orbax calls a step while it is being written."""
    tmp = checkpoint.step_dir.with_name("5.orbax-checkpoint-tmp")
    checkpoint.step_dir.rename(tmp)
    ran = convert(checkpoint)
    refused(ran, NotACheckpointError, "only unfinished saves (5.orbax-checkpoint-tmp)",
            out=out_of(checkpoint))  # fmt: skip
    ran = moeconv("convert", tmp, out_of(checkpoint))
    refused(ran, NotACheckpointError, "is a save in progress", out=out_of(checkpoint))


def test_newer_unfinished_steps_are_passed_over(checkpoint):
    steps = checkpoint.step_dir.parent
    for name in ("3", "12"):
        shutil.copytree(checkpoint.step_dir, steps / name)
    leave_unfinished(steps / "12")
    (steps / "20").mkdir()
    (steps / "30.orbax-checkpoint-tmp-1").mkdir()
    ran = convert(checkpoint)
    assert ran.code == 0
    assert (
        "warning: newer steps were passed over: 20: no _METADATA; 12: no commit marker" in ran.err
    )
    manifest = json.loads((out_of(checkpoint) / "moeconv_manifest.json").read_text())
    assert manifest["source"]["step"] == 3


@pytest.mark.parametrize(
    "content",
    ["", "{", "not json", "[1, 2]", "null", '"text"', "{}", '{"tree_metadata": null}',
     '{"tree_metadata": {"a": {}}}', '{"tree_metadata": {"a": {"key_metadata": 3}}}',
     '{"tree_metadata": {}}', '{"tree_metadata": {"a": null}}', "[" * 100_000,
     '{"tree_metadata": {"()": {"key_metadata": [], "value_metadata": {"value_type": "x"}}}}',
     '{"tree_metadata": {"a": {"key_metadata": [{"key": "params"}, {"key": "params"}],'
     ' "value_metadata": {"value_type": "x"}}}}', b"\xff\xfe\x00"],
)  # fmt: skip
def test_metadata_of_something_else(checkpoint, content):
    path = checkpoint.items / "_METADATA"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(convert(checkpoint), NotACheckpointError, str(checkpoint.items),
            out=out_of(checkpoint))  # fmt: skip


def test_metadata_that_is_cut(checkpoint):
    path = checkpoint.items / "_METADATA"
    os.truncate(path, path.stat().st_size // 2)
    refused(convert(checkpoint), NotACheckpointError, "_METADATA is not the tree metadata",
            out=out_of(checkpoint))  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, b"\xff"])
def test_step_metadata_that_is_damaged(checkpoint, content):
    path = checkpoint.step_dir / "_CHECKPOINT_METADATA"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(convert(checkpoint), NotACheckpointError, "_CHECKPOINT_METADATA is not JSON",
            out=out_of(checkpoint))  # fmt: skip


@pytest.mark.parametrize("custom", [[1], "text", 3, None, {"scan_layers": "yes"}, {}])
def test_custom_metadata_of_another_kind(checkpoint, custom):
    path = checkpoint.step_dir / "_CHECKPOINT_METADATA"
    content = {**json.loads(path.read_text()), "custom_metadata": custom}
    path.write_text(json.dumps(content))
    assert convert(checkpoint).code == 0


def test_scan_layers_that_contradicts_the_parameters(checkpoint):
    path = checkpoint.step_dir / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"scan_layers": true', '"scan_layers": false'))
    refused(convert(checkpoint), TensorError, "scan_layers=false", out=out_of(checkpoint))
