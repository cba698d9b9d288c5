"""The engine on the way to MaxText: any jobs, any interruption, and OUT whole or absent."""

import signal
import subprocess
import time

import pytest
import synthetic
from cli_runner import command, environment, moeconv
from incoming_lab import arrays, converted, same

SIZES = {"D": 256, "F": 512, "M": 512, "V": 4096, "L": 8, "E": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Mixtral of some 60 MB."""
    folder = tmp_path_factory.mktemp("model")
    ckpt = synthetic.write(folder / "run", sizes=SIZES, dtype="bfloat16", tied=False)
    return converted(ckpt.run, folder / "model", "--config", ckpt.config_file())


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    run = converted(model, tmp_path_factory.mktemp("run") / "run", "--jobs", "1")
    return arrays(run)


def test_the_number_of_jobs_changes_nothing(model, expected, tmp_path):
    assert same(arrays(converted(model, tmp_path / "run", "--jobs", "7")), expected)


def test_files_are_the_same_bytes_without_ocdbt(model, tmp_path):
    """OCDBT names its files at random; a folder for each array has nothing of that."""
    found = []
    for jobs in (1, 3):
        run = converted(model, tmp_path / str(jobs), "--no-ocdbt", "--jobs", jobs)
        found.append({str(path.relative_to(run)): path.read_bytes()
                      for path in run.rglob("*") if path.is_file()})  # fmt: skip
    one, other = found
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.parametrize("flag", ["--ocdbt", "--no-ocdbt"])
def test_killed_and_resumed(model, expected, tmp_path, flag):
    """At three moments, found by what is in the staging folder."""
    out = tmp_path / "out"
    staging = out.parent / f".{out.name}.moeconv-partial"
    for lines in (3, 12, 30):
        flags = ["--resume"] if lines > 3 else []
        process = subprocess.Popen(
            command("convert", model, out, flag, *flags, "--jobs", 1), env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        journal = staging / "journal.jsonl"
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > lines:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.001)
        process.wait()
        assert not out.exists() or process.returncode == 0
    if not out.exists():
        ran = moeconv("convert", model, out, flag, "--resume")
        assert ran.code == 0, ran.err
        assert "resuming" in ran.err
    assert same(arrays(out), expected)
    assert not staging.exists()


def test_a_damaged_staging_folder_is_written_again(model, expected, tmp_path):
    out = tmp_path / "out"
    staging = out.parent / f".{out.name}.moeconv-partial"
    process = subprocess.Popen(
        command("convert", model, out, "--no-ocdbt", "--jobs", 1), env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    journal = staging / "journal.jsonl"
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > 20:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    process.wait()
    if out.exists():
        pytest.skip("the machine was faster than the signal")
    chunks = [path for path in (staging / "checkpoints").rglob("c/*/*") if path.is_file()]
    chunks[0].write_bytes(b"\0" * 40)
    ran = moeconv("convert", model, out, "--no-ocdbt", "--resume")
    assert ran.code == 0, ran.err
    assert same(arrays(out), expected)


def test_a_run_is_never_replaced(model, tmp_path):
    """Someone may have trained in it."""
    run = converted(model, tmp_path / "run")
    ran = moeconv("convert", model, run, "--overwrite")
    assert ran.code == 7
    assert "not even --overwrite" in ran.error
