"""Full disks, limits on a file's size, and mount points: no work is lost."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cli_runner
import pytest
from cli_runner import moeconv
from engine_lab import MIB, beside, contents, interrupted, journaled, to

from moeconv.errors import OutputError


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of some size."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk{size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "moeconv-test", folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def test_no_space_is_seen_before_starting(big, disk):
    folder = disk(50 * MIB)
    ran = moeconv("convert", big.run, folder / "out", "--config", big.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "the conversion needs 162 MB" in ran.error
    assert "52.4 MB are free; free some space" in ran.error
    assert os.listdir(folder) == []


def test_space_that_others_took(big, disk, monkeypatch):
    """The check passes, then the files cannot be reserved."""
    folder = disk(50 * MIB)
    plenty = shutil.disk_usage(folder)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    ran = moeconv("convert", big.run, folder / "out", "--config", big.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "cannot reserve 60.9 MB" in ran.error
    assert "No space left on device" in ran.error
    assert os.listdir(folder) == []


def test_no_space_for_the_last_files(big, expected, disk, monkeypatch, tmp_path):
    """The weights fit, config.json does not: kept, and done once there is room."""
    size = len(expected["model.safetensors"])
    folder = disk((size // 4096 + 5) * 4096)
    out = folder / "out"
    plenty = shutil.disk_usage(folder)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    args = ("convert", big.run, out, "--config", big.run / "config.yml")
    ran = moeconv(*args)
    assert ran.code == OutputError.exit_code
    assert "No space left on device" in ran.error
    assert "go on with --resume" in ran.error
    assert not out.exists()
    done = journaled(out)
    subprocess.run(["mount", "-o", f"remount,size={size + 8 * MIB}", folder], check=True)
    ran = moeconv(*args, "--resume")
    assert ran.code == 0, ran.err
    assert f"resuming: {done} of 82" in ran.err
    assert contents(out) == expected


def test_too_little_space_loses_no_work(big, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(big, out, "middle", signal.SIGKILL)
    done = journaled(out)
    little = shutil.disk_usage(tmp_path)._replace(free=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: little)
        with pytest.raises(OutputError, match="free some space"):
            to(big, out, resume=True)
    assert journaled(out) == done > 0
    to(big, out, resume=True)
    assert contents(out) == expected


def test_a_file_size_limit(big, tmp_path):
    """As `ulimit -f` sets it."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000_000, 30_000_000)); "
        "from moeconv.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "convert", big.run, tmp_path / "out"]
    command += ["--config", big.run / "config.yml"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=cli_runner.environment(), check=False
    )
    assert ran.returncode == OutputError.exit_code
    assert "cannot reserve 60.9 MB" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert os.listdir(tmp_path) == []


def test_out_is_a_mount_point(tiny, disk):
    folder = disk(MIB)
    ran = moeconv("convert", tiny.run, folder, "--config", tiny.run / "config.yml")
    assert ran.code == OutputError.exit_code
    assert "is a mount point" in ran.error
    assert beside(folder) == []
