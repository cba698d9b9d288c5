"""Outputs whose files are damaged: what failed stays failed, in a sentence."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from denied import unreadable
from outputs_lab import config

from moeconv.artifact.manifest import MANIFEST_NAME
from moeconv.cli.verify import command
from moeconv.verification.checks import Status
from moeconv.verification.run import verify
from moeconv.verification.settings import VerifyOptions


def cut(out: Path) -> None:
    file = out / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


# What is damaged, so that level weights cannot run; the check that fails at both levels.
CUT = {
    "weights cut": (cut, "tensors"),
    "tokenizer no JSON": (lambda o: (o / "tokenizer.json").write_text("{"), "tokenizer"),
    "tokenizer no object": (lambda o: (o / "tokenizer.json").write_text("[]"), "tokenizer"),
    "tokenizer of nothing": (lambda o: (o / "tokenizer.json").write_text("{}"), "tokenizer"),
}


@pytest.mark.parametrize("name", CUT)
def test_damage_that_a_level_cannot_work_with_fails_it(told, tmp_path, name):
    damage, check = CUT[name]
    out = tmp_path / "out"
    shutil.copytree(told, out)
    damage(out)
    options = VerifyOptions(levels=("structure", "weights"))
    report = verify(out, source=None, options=options)
    assert report.verdict is Status.FAIL
    assert report.levels["structure"] is Status.FAIL
    found = {(c.level, c.name): c for c in report.checks}
    assert found["structure", check].status is Status.FAIL
    assert found["weights", check].status is Status.FAIL
    assert str(out) in found["weights", check].summary
    alone = verify(out, source=None, options=VerifyOptions(levels=("weights",)))
    assert alone.verdict is Status.FAIL, "what is wrong with OUT is no trouble of the machine"


def damage_manifest(out: Path) -> None:
    content = json.loads((out / MANIFEST_NAME).read_text())
    (out / MANIFEST_NAME).write_text(json.dumps(content | {"model": {}}))


def field(name: str, value):
    """The manifest tells another value of the model."""

    def change(out: Path) -> None:
        content = json.loads((out / MANIFEST_NAME).read_text())
        content["model"][name]["value"] = value
        (out / MANIFEST_NAME).write_text(json.dumps(content))

    return change


def header(text: str):
    """The safetensors file begins with another header."""

    def change(out: Path) -> None:
        raw = text.encode()
        (out / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)

    return change


DEEP = "[" * 100_000

SPARSE = '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}'

# What is damaged; the exit code; words of the answer.
DAMAGED = {
    "scaling a text": (config("rope_scaling", "linear"), 1, "rope_scaling of config.json is"),
    "scaling a number": (config("rope_scaling", -1), 1, "rope_scaling of config.json is -1"),
    "parameters a text": (config("rope_parameters", "x"), 1, "rope_parameters of config.json is"),
    "header a list": (header("[]"), 1, "is not a whole safetensors file: its header is no JSON"),
    "header null": (header("null"), 1, "is not a whole safetensors file: its header is no JSON"),
    "header deep": (header(DEEP), 1, "is not a whole safetensors file"),
    "header of fractions": (header(SPARSE), 1, "sizes that are no whole numbers"),
    "no vocabulary": (field("vocab_size", None), 2, "is not a manifest"),
    "vocabulary a text": (field("vocab_size", "x"), 2, "is not a manifest"),
    "vocabulary empty": (field("vocab_size", 0), 2, "is not a manifest"),
    "width a text": (field("intermediate_size", "x"), 2, "is not a manifest"),
    "no experts": (field("num_experts", None), 2, "is not a manifest"),
    "no layers": (field("layer_kinds", []), 2, "is not a manifest"),
    "foreign block": (field("decoder_block", "simple"), 2, "is not a manifest"),
    "manifest deep": (lambda o: (o / MANIFEST_NAME).write_text(DEEP), 2, "is not a manifest"),
    "config no object": (lambda o: (o / "config.json").write_text("[]"), 1, "is no JSON object"),
    "config no UTF-8": (lambda o: (o / "config.json").write_bytes(b"\xff{}"), 1, "cannot be read"),
    "config gone": (lambda o: (o / "config.json").unlink(), 1, "cannot be read"),
    "manifest of no model": (damage_manifest, 2, "is not a manifest"),
    "nothing there": (shutil.rmtree, 2, "does not exist"),
    "index of no names": (
        lambda o: (o / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        1,
        "has no weight_map",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_said_in_a_sentence(right, tmp_path, name):
    damage, code, words = DAMAGED[name]
    out = tmp_path / "out"
    shutil.copytree(right, out)
    damage(out)
    result = CliRunner().invoke(command, [str(out), "--level", "structure"])
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert isinstance(result.exception, SystemExit)


def test_a_file_that_cannot_be_read_leaves_no_verdict(right, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(right, out)
    unreadable(monkeypatch, out / "generation_config.json")
    result = CliRunner().invoke(command, [str(out), "--level", "structure", "--quiet"])
    assert result.exit_code == 2
    assert result.output.startswith("error: no verdict: ")
    assert "generation_config.json cannot be read: Permission denied" in result.output
    assert result.output.count("\n") == 1
