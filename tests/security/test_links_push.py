"""What push sends is what lies in OUT itself: no link is followed, nothing there can block."""

import shutil
from pathlib import Path

import outputs
import planted
import pytest

from moeconv.errors import OutputError
from moeconv.hub.local import newest_output
from moeconv.hub.prepare import PreparedPush, PushOptions, prepare
from moeconv.verification.candidate import Candidate
from moeconv.verification.report.files import write_report
from moeconv.verification.report.report import make_report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    out = outputs.convert_run(outputs.write_run(folder / "run"), folder / "out")
    report = make_report(Candidate.open(out), outputs.parity(1e-6))
    write_report(report, out)  # with plots; what it lacks does not matter here
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def _prepare(out: Path) -> PreparedPush:
    with planted.at_once(20):
        options = PushOptions(repo_id="me/model", unverified=True)
        return prepare(out, options, dry_run=True, note=lambda text: None)


@planted.every()
@pytest.mark.parametrize(
    "name",
    [
        "moeconv_manifest.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "README.md",
        "LICENSE",
        "verify.json",
        "verify_logits.png",
    ],
)
def test_a_link_in_out_is_never_sent(out, outside, name, plant):
    outside.plant(plant, out / name)
    with pytest.raises(OutputError, match=name):
        _prepare(out)
    assert outside.untouched()


@planted.every()
def test_what_nobody_sends_may_be_anything(out, outside, plant):
    """Of it only the name is told."""
    outside.plant(plant, out / "notes.txt")
    prepared = _prepare(out)
    assert any(name.startswith("notes.txt") for name in prepared.left_behind)
    assert "notes.txt" not in {file.name for file in prepared.files}


def test_a_link_within_out_is_refused_too(out):
    """OUT on the Hub would hold a file that OUT does not."""
    (out / "real").write_bytes((out / "config.json").read_bytes())
    (out / "config.json").unlink()
    (out / "config.json").symlink_to("real")
    with pytest.raises(OutputError, match="is a link; put the file itself there"):
        _prepare(out)


def test_what_is_looked_through_is_what_is_sent(out):
    """Text goes from memory: a file that is changed after the look cannot slip in."""
    files = {file.name: file for file in _prepare(out).files}
    assert all((name.endswith(".safetensors")) == (f.content is None) for name, f in files.items())


@planted.every()
def test_looking_for_the_newest_output_opens_no_plant(out, outside, plant):
    (out.parent / "decoy").mkdir()
    outside.plant(plant, out.parent / "decoy" / "moeconv_manifest.json")
    with planted.at_once():
        assert newest_output(out.parent) == out
