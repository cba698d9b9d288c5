"""kaggle_train.sh with the real trainer, on the CPU: three sessions that hand over.

tests/hub/test_export_script.py has the push.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time

import pytest
import train_lab
from cli_runner import ROOT, commands_but

pytest.importorskip("maxtext")
pytestmark = [
    pytest.mark.proof(
        "kaggle sessions",
        inputs=["train/kaggle/*.sh"],
        without=commands_but("train", "data"),
    ),
    pytest.mark.timeout(1200),
]

# As an image does: it prints in whatever Python it is, and fails.
NOISE = """
import sys
print("sitecustomize: {}")
print("{}", file=sys.stderr)
import a_package_of_the_image
"""
STEPS = 47


@pytest.fixture
def kaggle(tmp_path):
    """A Kaggle of folders, with an image's hostile settings."""
    return Kaggle(tmp_path)


class Kaggle:
    """Sessions of a notebook, and where they find things."""

    def __init__(self, folder):
        self.folder, self.venv = folder, folder / "home" / "venv"
        self.working, self.input = folder / "working", folder / "input"
        self.checkout = self.input / "datasets" / "me" / "moeconv" / "moeconv-main"
        shutil.copytree(
            ROOT / "train", self.checkout / "train", ignore=shutil.ignore_patterns("__pycache__")
        )
        self._install()
        site = folder / "image"
        site.mkdir()
        (site / "sitecustomize.py").write_text(NOISE)
        none = str(folder / "none")
        self.image = {
            "PYTHONPATH": str(site),
            "PYTHONHOME": none,
            "UV_CONSTRAINT": none,
            "PIP_CONSTRAINT": none,
            "UV_SYSTEM_PYTHON": "true",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "FORCE_COLOR": "1",
            "LD_LIBRARY_PATH": f"{folder}/cuda-12.8/lib64",
        }

    def _install(self):
        """In place of the installation: this environment, without torch, in a Python with noise."""
        python = [sys.executable, "-m", "venv", "--without-pip", self.venv]
        subprocess.run(python, check=True)
        site = next(self.venv.glob("lib/python*/site-packages"))
        packages = sysconfig.get_path("purelib")
        (site / "tests.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
        without_torch = (ROOT / "tests" / "without_torch" / "sitecustomize.py").read_text()
        (site / "sitecustomize.py").write_text(f"{without_torch}\n{NOISE}")
        program = self.venv / "bin" / "moeconv"
        program.write_text(
            f"#!{self.venv}/bin/python\nfrom moeconv.cli.start import main\n\nmain()\n"
        )
        program.chmod(0o755)

    def session(self, **extra):
        """What Kaggle saved before is gone from WORK."""
        shutil.rmtree(self.working, ignore_errors=True)
        self.working.mkdir()
        before = self._inputs()
        words = train_lab.words("", "handed", **train_lab.FP16)
        words = [word for word in words if not word.startswith("base_output_directory=")]
        done = subprocess.run(
            ["bash", self.checkout / "train" / "kaggle" / "kaggle_train.sh", *words],
            env={
                **os.environ,
                "WORK": str(self.working),
                "INPUT": str(self.input),
                "VENV": str(self.venv),
                **{"CHECK": "0", "TRIAL": "0", "XLA_FLAGS": "", "OMP_NUM_THREADS": "1"},
                **self.image,
                **extra,
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert self._inputs() == before
        return done

    def attach(self):
        """This session's output becomes an input: files without times, that nobody may write."""
        notebook = self.input / "notebooks" / "me" / "train-on-kaggle"
        if notebook.exists():
            subprocess.run(["chmod", "-R", "u+w", notebook], check=True)
            shutil.rmtree(notebook)
        shutil.move(self.working, notebook)
        for path in sorted(notebook.rglob("*"), reverse=True):
            os.utime(path, (0, 0))
            path.chmod(0o555 if path.is_dir() else 0o444)

    def _inputs(self):
        """What is attached; no session may change it."""
        return {
            path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in self.input.rglob("*")
        }

    @property
    def folder_of_run(self):
        return self.working / "runs" / "handed"

    def checkpoints(self):
        return sorted(int(name) for name in os.listdir(self.folder_of_run / "checkpoints"))


def short(kaggle):
    """A session that is over while MaxText is imported, so that it ends after its first step."""
    begin = time.monotonic()
    subprocess.run([kaggle.venv / "bin" / "moeconv", "train", "tiny_cpu", "--dry-run"], check=True)
    return f"{4 * int(time.monotonic() - begin + 1) + 3}s"


def test_three_sessions_hand_over(kaggle, tmp_path):
    length = short(kaggle)
    first = kaggle.session(SESSION=length)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "no earlier run handed" in first.stdout
    one = int(re.search(r"run it again with AT_LEAST=(\d+)\n\Z", first.stdout)[1])
    assert kaggle.checkpoints()[-1] == one < STEPS - 1
    kaggle.attach()

    second = kaggle.session(SESSION=length, AT_LEAST=str(one))
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"going on from step {one} of {kaggle.input}/notebooks/me/" in second.stdout
    two = int(re.search(r"AT_LEAST=(\d+)\n\Z", second.stdout)[1])
    assert one < two == kaggle.checkpoints()[-1] < STEPS - 1
    kept = tmp_path / "second"
    shutil.move(kaggle.working, kept)

    # The notebook is still attached as it was after the first.
    stale = kaggle.session(AT_LEAST=str(two))
    assert stale.returncode == 2 and os.listdir(kaggle.working) == []
    assert f"has reached step {one}, and AT_LEAST={two}" in stale.stderr
    kaggle.working.rmdir()
    shutil.move(kept, kaggle.working)
    kaggle.attach()

    third = kaggle.session(AT_LEAST=str(two))
    assert third.returncode == 0, third.stdout + third.stderr
    assert "finished: train/kaggle/export_to_hub.sh" in third.stdout
    assert kaggle.checkpoints()[-1] == STEPS - 1
    assert (kaggle.folder_of_run / "loss.png").is_file() and "\x1b" not in third.stderr
    lines = [line for line in train_lab.metrics(kaggle.folder_of_run) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
