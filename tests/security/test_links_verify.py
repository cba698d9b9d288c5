"""What verify reads lies in OUT, and what it writes goes there: no link leads elsewhere."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import outputs
import planted
import pytest

from moeconv.errors import ConfigError, MoeconvError, UsageError
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status
from moeconv.verification.levels.structure import check_structure
from moeconv.verification.measure.tokens import find_sample
from moeconv.verification.models.transformers import check_folder
from moeconv.verification.report import files as written
from moeconv.verification.report.files import earlier_report, write_report
from moeconv.verification.report.plots import PLOTS
from moeconv.verification.report.report import make_report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return outputs.convert_run(outputs.write_run(folder / "run"), folder / "out")


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of it is not of interest here, and importing it takes seconds."""
    find = "importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name, package=None: None)


@planted.every()
@pytest.mark.parametrize(
    "name",
    [
        "moeconv_manifest.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
        "verify_logits.png",
        "chat_template.jinja",
        "additional_chat_templates",
        "additional_chat_templates/x.jinja",
    ],
)
def test_nothing_in_out_leads_out_of_it(out, outside, name, plant):
    (out / name).parent.mkdir(exist_ok=True)
    outside.plant(plant, out / name)
    with planted.at_once(), pytest.raises(ConfigError, match="cannot be read: "):
        Candidate.open(out)
    assert outside.untouched()


@planted.every()
def test_nor_in_the_model_that_the_user_compares_with(out, outside, plant):
    outside.plant(plant, out / "generation_config.json")
    with planted.at_once(), pytest.raises(ConfigError, match=r"generation_config\.json|zz-hop"):
        check_folder(out)


@pytest.mark.parametrize("name", ["../somebody/secret", "/etc/hostname", "sub/../../secret"])
def test_nor_does_the_index(out, outside, name):
    """transformers joins its names to the folder."""
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"it names {name}, which leads out of"):
        Candidate.open(out)
    with pytest.raises(ConfigError, match="leads out of"):
        check_folder(out)


def test_a_snapshot_of_the_hub_s_cache_is_verified(out, tmp_path, without_transformers):
    repo = tmp_path / "hub" / "models--me--model"
    snapshot = shutil.copytree(out, repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for path in sorted(snapshot.iterdir()):
        shutil.move(path, repo / "blobs" / path.name)
        path.symlink_to(os.path.relpath(repo / "blobs" / path.name, snapshot))
    checks = check_structure(Candidate.open(snapshot))
    assert {check.status for check in checks} <= {Status.PASS, Status.SKIP}


@planted.every()
def test_a_report_is_written_over_a_plant_not_through_it(out, outside, monkeypatch, plant):
    def draw(report, folder):
        (folder / PLOTS[0]).write_bytes(b"drawn")
        return [folder / PLOTS[0]]

    monkeypatch.setattr(written, "draw_plots", draw)
    report = make_report(Candidate.open(out), [])
    for name in ("verify.json", "verify.md", *PLOTS):
        outside.plant(plant, out / name)
        (out / "zz-hop").unlink(missing_ok=True)
    with planted.at_once():
        assert earlier_report(out) is None
        write_report(report, out)
    assert outside.untouched()
    assert planted.holds_secret(out) == []
    found = earlier_report(out)
    assert found is not None and list(found.beside) == [PLOTS[0]]
    assert found.model_copy(update={"beside": report.beside}) == report
    assert (out / PLOTS[0]).read_bytes() == b"drawn"
    assert not any(os.path.lexists(out / name) for name in PLOTS[1:])  # stale ones go


def test_a_plot_that_is_not_drawn_any_more_is_removed_itself(out, outside):
    report = make_report(Candidate.open(out), [])
    (out / PLOTS[0]).symlink_to(outside.folder / "secret")
    write_report(report, out)
    assert not (out / PLOTS[0]).is_symlink()
    assert outside.untouched()


@planted.every("plant", planted.SPECIAL)
def test_prompts_are_a_regular_file(tmp_path, outside, plant):
    outside.plant(plant, tmp_path / "prompts.txt")
    with planted.at_once(), pytest.raises(UsageError, match="cannot be read"):
        find_sample(tmp_path / "prompts.txt", None)


def _files(out: Path) -> Status:
    return next(c.status for c in check_structure(Candidate.open(out)) if c.name == "files")


def _leftover(out: Path, name: str = ".moeconv-verify-abc") -> Path:
    """As a verify that was killed leaves it."""
    (out / name).mkdir()
    (out / name / "verify.md").write_text("half")
    os.utime(out / name, (time.time() - 60,) * 2)
    return out / name


def test_what_a_killed_verify_left_is_no_stranger_and_goes(out, without_transformers):
    """Every later verdict was WARN."""
    left = _leftover(out)
    assert _files(out) is Status.PASS
    write_report(make_report(Candidate.open(out), []), out)
    assert not left.exists()
    assert not any(path.name.startswith(".moeconv") for path in out.iterdir())


def test_the_folder_of_a_verify_at_work_stays(out):
    held, fresh = _leftover(out), out / ".moeconv-verify-new"
    fresh.mkdir()
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    write_report(make_report(Candidate.open(out), []), out)
    assert held.is_dir()
    assert fresh.is_dir()  # it may not be held yet
    os.close(descriptor)
    write_report(make_report(Candidate.open(out), []), out)
    assert not held.exists()


def _while_written(monkeypatch, act):
    """Calls `act` once the folder of a report is made, before the first file."""
    write = written._write

    def acting(name, content, folder):
        with contextlib.suppress(StopIteration):
            next(once)()
        write(name, content, folder)

    once = iter([act])
    monkeypatch.setattr(written, "_write", acting)


def test_a_verify_holds_its_folder_while_it_writes(out, monkeypatch):
    seen = []

    def look():
        (folder,) = out.glob(".moeconv-verify-*")
        os.utime(folder, (time.time() - 60,) * 2)
        into = os.open(out, os.O_RDONLY)
        written._clear(into)
        os.close(into)
        seen.append(folder.is_dir())

    _while_written(monkeypatch, look)
    write_report(make_report(Candidate.open(out), []), out)
    assert seen == [True]
    assert not any(path.name.startswith(".moeconv") for path in out.iterdir())


@pytest.mark.parametrize("which", ["its own folder", "the shared one"])
def test_a_folder_that_becomes_a_link_while_a_report_is_written(tmp_path, out, monkeypatch, which):
    """Whoever may write there could have files of the user's overwritten, and moved away."""
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    victim.mkdir()
    for name in ("verify.json", "verify.md"):
        (victim / name).write_text("precious")

    def swap():
        (fresh,) = shared.glob(".moeconv-verify-*")
        target = fresh if which == "its own folder" else shared
        target.rename(tmp_path / "moved")
        target.symlink_to(victim)

    _while_written(monkeypatch, swap)
    write_report(make_report(Candidate.open(out), []), shared)
    assert {path.name: path.read_text() for path in victim.iterdir()} == {
        "verify.json": "precious",
        "verify.md": "precious",
    }
    into = shared if which == "its own folder" else tmp_path / "moved"
    assert (into / "verify.json").is_file()


def test_a_folder_with_a_leftover_s_name_and_other_files_stays(out):
    left = _leftover(out)
    (left / "photos").mkdir()
    os.utime(left, (time.time() - 60,) * 2)
    write_report(make_report(Candidate.open(out), []), out)
    assert (left / "photos").is_dir()
    assert (left / "verify.md").read_text() == "half"


@pytest.mark.parametrize("plant", [planted.folder, planted.fifo, planted.absolute])
def test_what_only_has_a_leftover_s_name_is_a_stranger(out, outside, plant, without_transformers):
    """It is neither emptied nor passed over."""
    at = out / ".moeconv-verify-abc"
    outside.plant(plant, at)
    write_report(_report(out, at), out)
    assert os.path.lexists(at)
    assert outside.untouched()
    with pytest.raises(MoeconvError):
        _files(out)


def _report(out: Path, at: Path):
    aside = out.parent / "aside"
    shutil.copytree(out, aside, ignore=lambda *_: [at.name])
    return make_report(Candidate.open(aside), [])


def test_a_file_with_a_leftover_s_name_is_a_stranger(out, without_transformers):
    (out / ".moeconv-verify-abc").write_text("mine")
    assert _files(out) is Status.WARN
    write_report(make_report(Candidate.open(out), []), out)
    assert (out / ".moeconv-verify-abc").read_text() == "mine"
