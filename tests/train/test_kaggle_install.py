"""How the Kaggle scripts install moeconv, with stand-ins for pip and uv."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

KAGGLE = Path(__file__).parents[2] / "train" / "kaggle"


@pytest.fixture
def install(tmp_path):
    """Runs make_env of a checkout that cannot be written to; pip brings a uv that notes its words.

    `pythons` are those that uv finds (`managed` is the one that it fetches).
    """
    calls, checkout = tmp_path / "calls", tmp_path / "checkout"
    scripts = checkout / "train" / "kaggle"
    scripts.mkdir(parents=True)
    (scripts / "environment.sh").write_bytes((KAGGLE / "environment.sh").read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE", "moeconv", "requirements"):
        (checkout / name).touch()
    for folder in (scripts, scripts.parent, checkout):
        folder.chmod(0o555)

    def run(*extras, pythons=("managed",), pip=0, uv_pip=0, python="3.11.7", **extra):
        calls.unlink(missing_ok=True)
        uv = (
            f'#!/bin/bash\necho "uv $*" >> {calls}\nenv > {tmp_path}/seen\ncase "$*" in\n'
            f'  pip*) copy=${{@: -1}}; touch "${{copy%[*}}/build" || exit 9; exit {uv_pip} ;;\n'
            "  *--managed-python*) asked=managed ;;\n  *--python*) asked=$5 ;;\nesac\n"
            f'case " {" ".join(pythons)} " in *" $asked "*) exit 0 ;; esac\n'
            'echo "no $asked" >&2\nexit 2\n'
        )
        python3 = tmp_path / "bin" / "python3"
        python3.parent.mkdir(exist_ok=True)
        python3.write_text(
            f'#!/bin/bash\n[ "$1" != --version ] || {{ echo "Python {python}"; exit; }}\n'
            f'echo "python3 $*" >> {calls}\n[ {pip} = 0 ] || exit {pip}\n'
            'while [ "$1" != --target ]; do shift; done\nmkdir -p "$2/bin"\n'
            f'echo {shlex.quote(uv)} > "$2/bin/uv"; chmod +x "$2/bin/uv"\n'
        )
        python3.chmod(0o755)
        source = f". {scripts}/environment.sh; make_env {tmp_path}/env {' '.join(extras)}"
        environment = {**os.environ, "PATH": f"{python3.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", source],
            env={**environment, "TMPDIR": str(tmp_path), **extra},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not list(tmp_path.glob("tmp.*"))  # what it made to install from is gone
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_it_installs_with_the_pins_and_leaves_the_image_s_python_alone(install, tmp_path):
    done, calls = install("train", "cuda12")
    assert done.returncode == 0, done.stderr
    pip, venv, packages = calls
    words = pip.split()
    assert words[words.index("--target") + 1].startswith(str(tmp_path))
    assert "--require-hashes" in words and words[-1].endswith("requirements/uv.txt")
    assert venv == f"uv venv --quiet --managed-python --python 3.12 {tmp_path}/env"
    words = packages.split()
    assert words[-1].endswith("[train,cuda12]")
    assert words[words.index("--python") + 1] == f"{tmp_path}/env"
    assert words[words.index("--constraint") + 1].endswith("requirements/kaggle.txt")
    # Without CUDA the other pins: those have torch.
    assert "requirements/dev.txt" in install("train", "verify")[1][-1]


def test_torch_and_jax_for_cuda_do_not_share_an_environment(install):
    done, calls = install("train", "verify", "cuda12")
    assert done.returncode == 2 and "do not go into one environment" in done.stderr
    assert not calls


def test_what_the_image_sets_for_its_own_packages_does_not_reach_ours(install, tmp_path):
    hostile = {
        "UV_CONSTRAINT": "/none",
        "UV_BUILD_CONSTRAINT": "/none",
        "UV_PYTHON_PREFERENCE": "only-system",
        "UV_NO_BUILD_ISOLATION": "1",
        "PIP_CONSTRAINT": "/none",
        "PIP_USER": "1",
        "PYTHONPATH": "/kaggle/lib",
        "PYTHONHOME": "/none",
    }
    reach = {"UV_INDEX_URL": "https://a.example", "PIP_CERT": "/ca", "UV_CACHE_DIR": "/cache"}
    cuda = "/usr/local/cuda/lib64:/usr/local/cuda-12.8/lib64"
    done, _ = install(
        "train", **hostile, **reach, LD_LIBRARY_PATH=f"/usr/local/nvidia/lib64:{cuda}"
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "seen").read_text().splitlines()
    seen = dict(line.split("=", 1) for line in lines if "=" in line)
    assert not hostile.keys() & seen.keys()
    assert seen["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert reach.items() <= seen.items()
    install("train", LD_LIBRARY_PATH=cuda)
    assert "LD_LIBRARY_PATH" not in (tmp_path / "seen").read_text()


@pytest.mark.parametrize(
    "pythons, asked",
    [
        (("managed", "3.12"), ["managed"]),
        (("3.13", "3.12"), ["managed", "3.12"]),
        (("3.13",), ["managed", "3.12", "3.13"]),
    ],
)
def test_the_python_is_uvs_own_where_it_can_be_fetched(install, pythons, asked):
    done, calls = install("train", pythons=pythons, python="3.13.5")
    assert done.returncode == 0, done.stderr
    venvs = [call for call in calls if call.startswith("uv venv")]
    for call, python in zip(venvs, asked, strict=True):
        assert ("--managed-python" if python == "managed" else f"--python {python}") in call
    assert ("taking one of this machine" in done.stderr) is (len(asked) > 1)


def test_without_a_python_it_says_what_to_do(install):
    done, calls = install("train", pythons=(), python="3.14.0")
    assert done.returncode == 1 and "uv pip" not in "".join(calls)
    assert "needs Python 3.12 or 3.13" in done.stderr and "only Python 3.14.0" in done.stderr
    assert "turn the network on" in done.stderr and "no managed" in done.stderr


@pytest.mark.parametrize("fails, code", [({"pip": 3}, 3), ({"uv_pip": 4}, 4)])
def test_half_an_environment_is_none(install, tmp_path, fails, code):
    (tmp_path / "env" / "bin").mkdir(parents=True)
    done, _ = install("train", **fails)
    assert done.returncode == code and not (tmp_path / "env" / "bin" / "moeconv").exists()
    assert f"{tmp_path}/env: moeconv could not be installed" in done.stderr
    assert "Settings -> Internet" in done.stderr


def test_an_environment_that_is_there_is_taken(install, tmp_path):
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "moeconv").touch(mode=0o755)
    done, calls = install("train")
    assert done.returncode == 0 and not calls
