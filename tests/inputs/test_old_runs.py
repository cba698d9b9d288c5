"""Runs and outputs that moeconv 0.1.0 left, both with a moeconv.json, convert and are replaced."""

import json

import outputs
import pytest
from cli_runner import moeconv
from old_names import age_output, age_run

from moeconv.artifact.manifest import Manifest
from moeconv.maxtext.checkpoint import open_checkpoint
from moeconv.orbax.locate import locate
from moeconv.verification.checks import Status
from moeconv.verification.levels import Level
from moeconv.verification.measure.tokens import find_sample


@pytest.fixture
def run(tmp_path):
    return outputs.write_run(tmp_path / "run")


def manifest(out) -> Manifest:
    return Manifest.model_validate_json((out / "moeconv_manifest.json").read_bytes())


def test_an_old_run_converts_as_it_did(run, tmp_path):
    new = manifest(outputs.convert_run(run, tmp_path / "new"))
    age_run(run)
    old = manifest(outputs.convert_run(run, tmp_path / "old"))
    assert old.model["rope_theta"].source == f"sidecar: {run / 'moeconv.json'}"
    assert (old.files, old.run, old.tokenizer) == (new.files, new.run, new.tokenizer)
    assert "tokenizer.json" in old.files and old.run is not None
    ran = moeconv("inspect", run, "--json")
    assert json.loads(ran.out)["sidecar"] == str(run / "moeconv.json")


def test_what_is_wrong_with_it_is_said_of_its_own_name(run):
    age_run(run)
    (run / "tokenizer" / "tokenizer.json").unlink()
    (run / "tokenizer" / "tokenizer_config.json").unlink()
    ran = moeconv("convert", run, run.parent / "out")
    assert ran.code != 0 and f"{run / 'moeconv.json'} names it" in ran.error
    (run / "moeconv.json").write_text("[]")
    ran = moeconv("convert", run, run.parent / "out")
    assert ran.code != 0 and f"{run / 'moeconv.json'} is not the sidecar" in ran.error


def test_of_two_sidecars_the_new_one_counts(run):
    (run / "moeconv.json").write_text("{}")
    assert open_checkpoint(str(run)).sidecar.name == "moeconv_run.json"


def test_a_manifest_is_a_sidecar_under_neither_name(run, tmp_path):
    """Under the old name it is of a model that lies there; under the new one it is a mistake."""
    out = outputs.convert_run(run, tmp_path / "out")
    content = (out / "moeconv_manifest.json").read_bytes()
    sidecar = run / "moeconv_run.json"
    config = run.parent / "config.yml"
    config.write_text(json.dumps(json.loads(sidecar.read_text())["config"]))
    sidecar.unlink()
    (run / "moeconv.json").write_bytes(content)
    found = open_checkpoint(str(run), config=config)
    assert found.sidecar is None and found.resolution.warnings == ()
    (run / "moeconv.json").rename(sidecar)
    ran = moeconv("convert", run, tmp_path / "other")
    assert ran.code != 0 and f"{sidecar} is not the sidecar" in ran.error


def test_the_text_that_an_old_run_names_is_verify_s(run):
    sidecar = run / "moeconv_run.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "text_sample": "sample.txt"}))
    (run / "sample.txt").write_text("its own\n")
    age_run(run)
    assert find_sample(None, locate(str(run))).documents == ("its own",)


def test_an_old_output_is_verified_and_replaced(run, tmp_path):
    out = outputs.convert_run(run, tmp_path / "out", max_shard_bytes=60_000)
    age_output(out)
    report = outputs.attest(out)
    assert report.verdict is Status.PASS and "moeconv.json" in report.files
    assert report.levels.keys() == {Level.STRUCTURE, Level.WEIGHTS}
    assert moeconv("convert", run, out).code != 0
    ran = moeconv("convert", run, out, "--overwrite")
    assert ran.code == 0, ran.err
    assert "did not write" not in ran.err
    assert {path.name for path in out.iterdir()} == {*manifest(out).files, "moeconv_manifest.json"}
