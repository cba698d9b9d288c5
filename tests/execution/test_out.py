"""OUT: whose it is, what may be replaced, and who else writes there."""

import fcntl
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import cli_runner
import numpy as np
import pytest
import synthetic
from cli_runner import moeconv
from engine_lab import MOMENTS, beside, contents, to

from moeconv.artifact.destination import is_replaceable
from moeconv.errors import OutputError
from moeconv.execution.engine import Engine
from moeconv.execution.lock import Lock
from moeconv.maxtext.sidecar import SIDECAR_NAMES


def test_two_processes_to_one_out(big, expected, tmp_path):
    out = tmp_path / "out"
    config = ("--config", big.run / "config.yml")
    process = cli_runner.spawn("convert", big.run, out, *config, "--jobs", 1, "--quiet")
    while not MOMENTS["begun"](out):
        assert process.poll() is None
        time.sleep(0.0003)
    process.send_signal(signal.SIGSTOP)
    for flags in ((), ("--resume",), ("--overwrite",)):
        ran = moeconv("convert", big.run, out, *config, *flags)
        assert ran.code == OutputError.exit_code
        assert f"another process is converting to {out}" in ran.error
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    process.communicate()
    assert contents(out) == expected
    assert beside(out) == []


def test_many_processes_race_for_one_out(tiny, tmp_path):
    """Whoever comes, OUT is one whole model, and everybody else is told so."""
    out = tmp_path / "out"
    codes = []

    def race():
        for _ in range(8):
            try:
                to(tiny, out, jobs=1)
                codes.append(0)
            except OutputError as error:
                assert "another process" in str(error) or "is not empty" in str(error)
                codes.append(7)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes.count(0) == 1
    assert len(codes) == 32
    to(tiny, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert beside(out) == []


def test_a_lock_that_was_removed_between_two_calls(tmp_path, monkeypatch):
    """The next process does not hold a lock file that is not there any more."""
    path = tmp_path / "lock"
    first, second = Lock(path), Lock(path)
    beside = os.open(tmp_path, os.O_RDONLY)
    first.take(beside)
    flock, calls = fcntl.flock, []

    def late(fd, how):
        calls.append(fd)
        if len(calls) == 1:
            first.release()
        return flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    second.take(beside)
    assert len(calls) == 2
    assert path.exists()
    second.release()
    os.close(beside)
    assert not path.exists()


def test_a_non_empty_out_is_refused(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert f"OUT {out} is not empty and holds no model" in ran.error
    (out / "config.json").write_text('{"model_type": "x"}')
    (out / "model.safetensors").write_text("")
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert f"OUT {out} is not empty; pass --overwrite" in ran.error
    assert contents(out) == {
        "mine.txt": b"mine",
        "config.json": b'{"model_type": "x"}',
        "model.safetensors": b"",
    }
    assert beside(out) == []


def test_a_card_alone_may_be_replaced_and_is_told_of(tiny, tmp_path):
    """Put there before the model, as for train/kaggle/export_to_hub.sh, which brings it back."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    config = ("--config", tiny.run / "config.yml")
    ran = moeconv("convert", tiny.run, out, *config)
    assert ran.code == OutputError.exit_code and "pass --overwrite" in ran.error
    ran = moeconv("convert", tiny.run, out, *config, "--overwrite")
    assert ran.code == 0, ran.err
    assert "removes from OUT what moeconv did not write: README.md" in ran.err
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("sidecar", [None, *SIDECAR_NAMES])
def test_what_is_no_model_is_never_replaced(tiny, tmp_path, sidecar):
    out = tmp_path / "out"
    (out / "src").mkdir(parents=True)
    (out / "src" / "mine.py").write_text("mine")
    if sidecar is not None:  # another training run
        (out / sidecar).write_text('{"format": "moeconv-run", "version": 1, "config": {}}')
    before = contents(out)
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml", "--overwrite")
    assert ran.code == OutputError.exit_code
    assert f"OUT {out} is not empty and holds no model" in ran.error
    assert contents(out) == before
    assert beside(out) == []


_NAMED = '{"architectures": ["X"]}'
_RUN = '{"format": "moeconv-run"}'


@pytest.mark.parametrize(
    ("files", "replaceable"),
    [
        ({"config.json": "{}", "a.safetensors": ""}, False),
        ({"config.json": "[]", "a.safetensors": ""}, False),
        ({"config.json": _NAMED}, False),
        ({"a.safetensors": ""}, False),
        ({"moeconv_manifest.json": "{}"}, False),
        ({"config.json": _NAMED, "a.safetensors": ""}, True),
        ({"moeconv_manifest.json": '{"format": "moeconv"}'}, True),
        ({"moeconv.json": '{"format": "moeconv"}'}, True),
        ({"config.json": _NAMED, "a.safetensors": "", "moeconv.json": _RUN}, False),
        ({"config.json": _NAMED, "a.safetensors": "", "moeconv_run.json": _RUN}, False),
        ({"moeconv_manifest.json": '{"format": "moeconv"}', "moeconv.json": _RUN}, False),
        ({"README.md": "", ".cache/x": ""}, True),
    ],
)
@pytest.mark.parametrize("folder", [None, ".git", "README.md", ".moeconv-verify-x", ".cache"])
def test_what_a_model_is(tmp_path, files, replaceable, folder):
    """A whole project went, for its config.json."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    if folder is not None and not (tmp_path / folder).exists():
        (tmp_path / folder).mkdir()
    theirs = (tmp_path / ".git").exists() or (tmp_path / "README.md").is_dir()
    assert is_replaceable(tmp_path) == (replaceable and not theirs)


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_overwriting_names_what_people_put_there(tiny, tmp_path, quiet):
    out = tmp_path / "out"
    convert_again = ("convert", tiny.run, out, "--config", tiny.run / "config.yml", "--overwrite")
    assert moeconv(*convert_again).code == 0
    (out / "verify.json").write_text("{}")
    assert "warning: --overwrite" not in moeconv(*convert_again).err
    for name in ("README.md", "LICENSE", "a.txt", "b.txt"):
        (out / name).write_text("mine")
    ran = moeconv(*convert_again, *quiet)
    assert ran.code == 0
    assert (
        "warning: --overwrite also removes from OUT what moeconv did not write: "
        "LICENSE, README.md, a.txt and 1 more\n" in ran.err
    )
    assert not (out / "README.md").exists()


@pytest.mark.parametrize("where", [".", "..", "/", "~", "link", "$home/.."])
@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--overwrite", "--dry-run")])
def test_an_out_that_people_live_in(tiny, tmp_path, monkeypatch, where, flags):
    home, here = tmp_path / "people" / "home", tmp_path / "a" / "b"
    for folder in (home, here):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("mine")
    (here / "link").symlink_to(here.parent)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    before = contents(tmp_path)
    out = where.replace("$home", str(home))
    ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml", *flags)
    assert ran.code == OutputError.exit_code
    assert f"OUT {out} " in ran.error
    assert "directory, which is never replaced; name a new directory" in ran.error
    assert contents(tmp_path) == before


def test_an_empty_out_is_used(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    to(tiny, out)
    assert (out / "moeconv_manifest.json").exists()
    assert beside(out) == []


def test_an_out_that_somebody_fills_meanwhile(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run = Engine.run

    def slow(self):
        result = run(self)
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        return result

    monkeypatch.setattr(Engine, "run", slow)
    with pytest.raises(OutputError, match="was filled by another process during the conversion"):
        to(tiny, out)
    monkeypatch.undo()
    assert contents(out) == {"mine.txt": b"mine"}
    with pytest.raises(OutputError, match="holds no model"):
        to(tiny, out, resume=True, overwrite=True)
    (out / "mine.txt").unlink()
    to(tiny, out, resume=True)
    to(tiny, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
    assert beside(out) == []


@pytest.mark.parametrize("where", ["run/checkpoints/0/hf", "run/checkpoints/0/items/a/b",
                                   "run/checkpoints/0", "run/checkpoints/0/items",
                                   "run/checkpoints/1"])  # fmt: skip
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_out_inside_the_checkpoint(tmp_path, where, flags):
    checkpoint = synthetic.write(tmp_path / "run")
    before = contents(tmp_path)
    config = config_beside(tmp_path)
    ran = moeconv("convert", checkpoint.run, tmp_path / where, "--config", config, *flags)
    assert ran.code == OutputError.exit_code
    assert "is inside the source" in ran.error
    config.unlink()
    assert contents(tmp_path) == before


def config_beside(folder: Path) -> Path:
    path = folder / "config.yml"
    path.write_text("decoder_block: mixtral\nnum_experts_per_tok: 2\n")
    return path


@pytest.mark.parametrize("where", [".", "run", "run/checkpoints"])
def test_out_that_contains_the_checkpoint(tmp_path, where):
    checkpoint = synthetic.write(tmp_path / "above" / "run")
    before = contents(tmp_path)
    out = tmp_path / "above" / where
    ran = moeconv(
        "convert", checkpoint.run, out, "--config", config_beside(tmp_path), "--overwrite"
    )
    assert ran.code == OutputError.exit_code
    assert "contains the source" in ran.error
    (tmp_path / "config.yml").unlink()
    assert contents(tmp_path) == before


def test_out_beside_the_steps_of_the_run(tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny.run, run)
    for _ in range(2):  # the second one finds the manifest of the first
        ran = moeconv(
            "convert", run, run / "hf", "--config", tiny.run / "config.yml", "--overwrite"
        )
        assert ran.code == 0, ran.err


def test_out_is_a_file(tiny, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    for flags in ((), ("--overwrite",), ("--resume",)):
        ran = moeconv("convert", tiny.run, out, "--config", tiny.run / "config.yml", *flags)
        assert ran.code == OutputError.exit_code
        assert f"OUT {out} is a file; give a directory" in ran.error
    assert contents(tmp_path) == {"out": b"mine"}


@pytest.mark.parametrize("where", ["file/out", "/proc/moeconv/out", "x" * 250, "a/" + "x" * 300])
def test_out_that_cannot_be_made(tiny, tmp_path, where):
    (tmp_path / "file").write_text("mine")
    ran = moeconv("convert", tiny.run, tmp_path / where, "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "cannot write beside OUT" in ran.error
    assert contents(tmp_path) == {"file": b"mine"}
    assert os.listdir(tmp_path) == ["file"]


def test_a_home_that_nobody_has(tiny, tmp_path):
    ran = moeconv("convert", tiny.run, "~no-such-user/out", "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "~no-such-user" in ran.error


def test_an_out_that_is_a_symbolic_link(tiny, tmp_path):
    """The link stays, what it points to is replaced."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "elsewhere" / "model.safetensors").write_text("old")
    (tmp_path / "out").symlink_to("elsewhere")
    (tmp_path / "nowhere").symlink_to("new")
    to(tiny, tmp_path / "out", overwrite=True)
    to(tiny, tmp_path / "nowhere")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "new")
    assert "moeconv_manifest.json" in contents(tmp_path / "new")


def test_folders_above_out_go_again(tmp_path):
    """Nothing is left of a conversion that fails, not even the way to it."""

    def spoil(arrays):
        arrays["decoder.layers.MoeBlock_0.wo"][1, 2, 3, 4] = np.nan

    checkpoint = synthetic.write(tmp_path / "run", change=spoil)
    config = checkpoint.config_file()
    ran = moeconv("convert", checkpoint.run, tmp_path / "a/b/out", "--config", config)
    assert ran.code == 6
    assert not (tmp_path / "a").exists()
