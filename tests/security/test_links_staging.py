"""What convert makes beside OUT: no folder and no file of somebody else's is written or emptied."""

import os
import shutil
from pathlib import Path

import planted
import pytest
import synthetic
from cli_runner import Ran, moeconv

from moeconv.artifact import destination as places
from moeconv.errors import OutputError
from moeconv.execution import staging
from moeconv.execution.staging import Staging


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Synthetic:
    made = synthetic.write(tmp_path_factory.mktemp("tiny") / "run", "mixtral")
    made.config_file()
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared" / "out"


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.moeconv-{what}"


def _convert(tiny: synthetic.Synthetic, out: Path, *flags: str) -> Ran:
    with planted.at_once():
        return moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml", *flags)


def _model(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "x"}')
    (out / "model.safetensors").write_text("old")


@planted.every()
@pytest.mark.parametrize("what", ["partial", "old", "lock"])
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_what_has_our_names_and_is_not_ours_is_refused(tiny, out, outside, what, flag, plant):
    """A group's folder: anybody may put a link there, and it was emptied and replaced."""
    outside.plant(plant, _beside(out, what))
    if flag == "--overwrite":
        _model(out)
    ran = _convert(tiny, out, flag)
    assert ran.code == OutputError.exit_code
    assert f"{_beside(out, what)} is in the way" in ran.error
    assert outside.untouched()
    model = ["config.json", "model.safetensors"]
    assert sorted(p.name for p in out.glob("*")) == (model if flag == "--overwrite" else [])
    left = {path.name for path in out.parent.iterdir()} - {"zz-hop", out.name}
    assert left == {_beside(out, what).name}


@planted.every()
def test_what_lies_in_our_folder_is_removed_itself(tiny, out, outside, plant):
    """A process of ours may have been killed there; of links only the links go."""
    _beside(out, "partial").mkdir()
    (_beside(out, "partial") / "journal.jsonl").write_text("")
    for name in ("model.safetensors", "config.json", "moeconv_manifest.json", "sub"):
        outside.plant(plant, _beside(out, "partial") / name)
        (_beside(out, "partial") / "zz-hop").unlink(missing_ok=True)
    (_beside(out, "partial") / "folder" / "deep").mkdir(parents=True)
    (_beside(out, "partial") / "folder" / "link").symlink_to(outside.folder)
    assert _convert(tiny, out).code == 0
    assert outside.untouched()
    assert planted.holds_secret(out) == []


@planted.every("plant", (*planted.ALL, os.link))
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "moeconv_manifest.json"])
def test_a_small_file_is_always_a_new_one(out, outside, name, plant):
    """Also on --resume, where the folder is not emptied first."""
    made = Staging(out, overwrite=False, resume=False)
    at = _beside(out, "partial") / name
    if plant is os.link:
        os.link(outside.folder / "secret", at)
    else:
        outside.plant(plant, at)
    made.write({name: b"new"})
    made.publish([name])
    assert outside.untouched()
    assert not (out / name).is_symlink()
    assert (out / name).read_bytes() == b"new"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@planted.every()
def test_an_old_model_that_is_replaced_takes_nothing_with_it(tiny, out, outside, plant):
    _model(out)
    outside.plant(plant, out / "extra")
    assert _convert(tiny, out, "--overwrite").code == 0
    assert outside.untouched()
    assert planted.holds_secret(out) == []


@planted.every()
@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_out_that_becomes_something_else_meanwhile(out, outside, monkeypatch, swaps, plant):
    if not swaps:
        monkeypatch.setattr(staging, "_exchange", lambda *names: False)
    made = Staging(out, overwrite=True, resume=False)
    made.write({"config.json": b"new"})
    outside.plant(plant, out)
    before = os.lstat(out)
    with planted.at_once(), pytest.raises((OutputError, OSError)):
        made.publish(["config.json"])
    made.keep()
    assert os.lstat(out).st_ino == before.st_ino
    assert outside.untouched()
    assert (_beside(out, "partial") / "config.json").read_bytes() == b"new"


@pytest.mark.parametrize("overwrite", [True, False])
def test_our_folder_that_becomes_a_link_meanwhile(out, outside, overwrite):
    if overwrite:
        _model(out)
    made = Staging(out, overwrite=overwrite, resume=False)
    made.write({"config.json": b"new"})
    shutil.move(_beside(out, "partial"), out.parent / "moved")
    _beside(out, "partial").symlink_to(outside.folder)
    made.write({"more": b"new"})
    with pytest.raises(OutputError):
        made.publish(["config.json", "more"])
    made.keep()
    assert outside.untouched()
    assert not out.is_symlink()


def test_a_file_of_ours_that_becomes_a_link_is_not_published(out, outside):
    made = Staging(out, overwrite=False, resume=False)
    made.write({"config.json": b"new"})
    outside.plant(planted.absolute, _beside(out, "partial") / "config.json")
    with pytest.raises(OutputError, match="replaced by another process"):
        made.publish(["config.json"])
    made.discard()
    assert not out.exists()
    assert outside.untouched()


def test_a_parent_that_becomes_a_link_meanwhile(out, outside):
    """Everything goes on in the folder that was opened; the other one is never touched."""
    made = Staging(out, overwrite=True, resume=False)
    shutil.move(out.parent, out.parent.parent / "moved")
    victim = outside.folder / out.name
    _model(victim)
    (outside.folder / ".out.moeconv-partial").mkdir()
    (outside.folder / ".out.moeconv-old").mkdir()
    outside.remember()
    out.parent.symlink_to(outside.folder)
    made.write({"config.json": b"new"})
    with pytest.raises((OutputError, OSError)):
        made.publish(["config.json"])
    made.discard()
    assert outside.untouched()
    assert (outside.folder / ".out.moeconv-old").is_dir()


@planted.every()
def test_whether_a_folder_is_a_model_is_found_out_without_waiting(out, outside, plant):
    _model(out)
    outside.plant(plant, out / "moeconv_manifest.json")
    with planted.at_once():
        assert not places.is_replaceable(out)
        assert "moeconv_manifest.json" not in places.foreign_entries(out)
    assert outside.untouched()


def _photos(at: Path) -> Path:
    (at / "photos").mkdir(parents=True)
    (at / "photos" / "a.jpg").write_text("mine")
    return at


def _empty(at: Path) -> Path:
    at.mkdir()
    return at


def _journal(at: Path) -> Path:
    _photos(at)
    (at / "journal.jsonl").write_text("")
    return at


def _owned(at: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives a folder away")
    os.chown(at, 12345, -1)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("what", "make", "change"),
    [
        ("partial", _photos, lambda at: None),
        ("partial", _empty, _owned),
        ("partial", _empty, lambda at: at.chmod(0o777)),
        ("partial", _journal, _owned),
        ("partial", _journal, lambda at: at.chmod(0o775)),
        ("old", _photos, lambda at: None),
    ],
)
def test_a_real_folder_that_is_not_ours(out, what, make, change, resume):
    """It was emptied without a word, and OUT then belonged to whoever had made it."""
    at = make(_beside(out, what))
    out.mkdir()
    change(at)
    before, held = os.stat(at), sorted(path.name for path in at.rglob("*"))
    with pytest.raises(OutputError, match=f"{at.name} is in the way"):
        Staging(out, overwrite=True, resume=resume)
    assert sorted(path.name for path in at.rglob("*")) == held
    assert (os.stat(at).st_mode, os.stat(at).st_uid) == (before.st_mode, before.st_uid)
    assert not _beside(out, "lock").exists()


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
@pytest.mark.parametrize("swaps", [None, True, False], ids=["new", "swap", "two renames"])
def test_out_has_the_mode_of_a_new_folder(out, monkeypatch, umask, swaps):
    if swaps is not None:
        _model(out)
        out.chmod(0o775)
    if swaps is False:
        monkeypatch.setattr(staging, "_exchange", lambda *names: False)
    before = os.umask(umask)
    try:
        made = Staging(out, overwrite=True, resume=False)
        made.write({"config.json": b"new"})
        assert _beside(out, "partial").stat().st_mode & 0o777 == 0o700
        made.publish(["config.json"])
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert [path.name for path in out.parent.iterdir()] == [out.name]
