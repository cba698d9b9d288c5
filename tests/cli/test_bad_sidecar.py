"""Tokenizers and sidecars of a run: what is taken, what is damaged."""

import json
from pathlib import Path

import pytest
from cli_runner import moeconv
from denied import unreadable
from refusals import convert, out_of, refused, tokenizer

from moeconv.errors import ConfigError, TokenizerError, UnsupportedError


def test_a_tokenizer_that_is_too_large(checkpoint, tmp_path):
    path = tokenizer(tmp_path / "tokenizer", 66, bos_token="t65")
    ran = convert(checkpoint, "--tokenizer", path)
    words = (str(path), "no row in the model for ids 64 to 65", "BOS 65", "vocab_size is 64")
    refused(ran, TokenizerError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize("spec", ["no-such-directory", "no/such.json", "~no-such-user/tokenizer"])
def test_a_tokenizer_that_is_not_there(checkpoint, spec):
    ran = convert(checkpoint, "--tokenizer", spec)
    refused(ran, TokenizerError, spec, "no such" if spec[0] == "n" else "", out=out_of(checkpoint))


def test_a_tokenizer_that_is_damaged(checkpoint, tmp_path):
    path = tokenizer(tmp_path / "tokenizer", 60)
    (path / "tokenizer.json").write_text("{")
    ran = convert(checkpoint, "--tokenizer", path)
    refused(ran, TokenizerError, "tokenizer.json is not JSON", out=out_of(checkpoint))


def test_token_ids_come_from_the_tokenizer(checkpoint, tmp_path):
    path = tokenizer(tmp_path / "tokenizer", 60, bos_token="t0")
    assert convert(checkpoint, "--tokenizer", path).code == 0
    config = json.loads((out_of(checkpoint) / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


def sidecar(checkpoint, where: Path | None = None, **more: object) -> Path:
    config = {**checkpoint.config, "num_experts_per_tok": 1, "rope_max_timescale": 123.0}
    content = {"format": "moeconv-run", "version": 1, "config": config, **more}
    path = (where or checkpoint.run) / "moeconv_run.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/0"])
def test_a_sidecar_is_enough(checkpoint, tmp_path, where):
    path = sidecar(checkpoint, checkpoint.run / where, tokenizer="tokenizer")
    tokenizer(path.parent / "tokenizer", 60)
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    assert ran.code == 0, ran.err
    config = json.loads((out_of(checkpoint) / "config.json").read_text())
    assert config["num_experts_per_tok"] == 1
    assert config["rope_theta"] == 123.0
    assert (out_of(checkpoint) / "tokenizer.json").exists()
    manifest = json.loads((out_of(checkpoint) / "moeconv_manifest.json").read_text())
    assert manifest["model"]["rope_theta"]["source"] == f"sidecar: {path}"


def test_the_nearest_sidecar_is_taken(checkpoint):
    sidecar(checkpoint)
    path = sidecar(checkpoint, checkpoint.step_dir)
    path.write_text(path.read_text().replace("123.0", "456.0"))
    assert moeconv("convert", checkpoint.run, out_of(checkpoint)).code == 0
    config = json.loads((out_of(checkpoint) / "config.json").read_text())
    assert config["rope_theta"] == 456.0


def test_config_beats_the_sidecar_and_set_beats_both(checkpoint):
    sidecar(checkpoint)
    for n, (flags, theta, k) in enumerate((
        ([], 123.0, 1),
        (["--config"], 500_000.0, 2),
        (["--set", "rope_max_timescale=789"], 789.0, 1),
        (["--config", "--set", "rope_max_timescale=789"], 789.0, 2),
    )):  # fmt: skip
        config = checkpoint.config_file(checkpoint.run.parent)
        args = [a for f in flags for a in ([f, config] if f == "--config" else [f])]
        out = checkpoint.run.parent / f"out{n}"
        assert moeconv("convert", checkpoint.run, out, *args).code == 0
        written = json.loads((out / "config.json").read_text())
        assert (written["rope_theta"], written["num_experts_per_tok"]) == (theta, k), flags


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", '{"format": "moeconv-run"}', "[" * 100_000,
     '{"format": "moeconv-run", "version": 2, "config": {}}',
     '{"format": "moeconv-run", "version": 1, "config": []}',
     '{"format": "moeconv-run", "version": 1, "config": {}, "tokenizer": 3}', b"\xff\x00"],
)  # fmt: skip
def test_a_damaged_sidecar(checkpoint, content):
    path = checkpoint.run / "moeconv_run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    words = (str(path), "not the sidecar", "--config")
    refused(ran, ConfigError, *words, out=out_of(checkpoint))
    ran = convert(checkpoint)
    assert ran.code == 0, "--config gets around it"
    assert f"warning: {path} is not the sidecar" in ran.err


@pytest.mark.parametrize("how", ["no permission", "directory"])
def test_a_sidecar_that_cannot_be_read(checkpoint, monkeypatch, how):
    path = checkpoint.run / "moeconv_run.json"
    if how == "directory":
        path.mkdir()
    else:
        sidecar(checkpoint)
        unreadable(monkeypatch, path)
    reason = "it is a directory" if how == "directory" else "Permission denied"
    words = (f"cannot read {path}: {reason}", "--config")
    for command in (["convert", checkpoint.run, out_of(checkpoint)], ["inspect", checkpoint.run]):
        refused(moeconv(*command), ConfigError, *words, out=out_of(checkpoint))
    ran = convert(checkpoint)
    assert ran.code == 0
    assert f"warning: cannot read {path}: {reason}; --config replaces it" in ran.err


def test_metrics_that_cannot_be_read(checkpoint, monkeypatch):
    path = checkpoint.run / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    unreadable(monkeypatch, path)
    ran = convert(checkpoint)
    assert ran.code == 0
    assert f"warning: cannot read {path}: Permission denied; the manifest has no losses" in (
        ran.err
    )


@pytest.mark.parametrize(
    ("config", "error"),
    [({}, 0), ({"decoder_block": "simple"}, UnsupportedError), ({"num_experts": 8}, ConfigError),
     ({"rope_max_timescale": "x"}, ConfigError), ({"model_name": 5}, ConfigError),
     ({"use_post_ffw_norm": True, "decoder_block": "envy"}, UnsupportedError)],
)  # fmt: skip
def test_a_sidecar_with_a_bad_config(checkpoint, config, error):
    path = sidecar(checkpoint, config={**checkpoint.config, **config})
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    if error == 0:
        assert ran.code == 0
    else:
        sentence = refused(ran, error, out=out_of(checkpoint))
        assert str(path) in sentence or "cannot be converted exactly" in sentence


def test_a_sidecar_whose_tokenizer_is_gone(checkpoint):
    sidecar(checkpoint, tokenizer="tokenizer")
    ran = moeconv("convert", checkpoint.run, out_of(checkpoint))
    words = (str(checkpoint.run / "tokenizer"), "no such file or directory", "--tokenizer")
    refused(ran, TokenizerError, *words, out=out_of(checkpoint))
