"""train/kaggle/export_to_hub.sh: a finished run to the Hub, in one command."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cli_runner
import outputs
import pytest

from moeconv.artifact.manifest import MANIFEST_NAME

SCRIPT = cli_runner.ROOT / "train" / "kaggle" / "export_to_hub.sh"


def export(*args: object, script: Path = SCRIPT, **env: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in cli_runner.environment().items() if k != "HF_TOKEN"}
    return subprocess.run(
        [script, *map(str, args)],
        env={**clean, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_help_and_what_is_missing(tmp_path):
    helped = export("--help")
    assert helped.returncode == 0 and "export_to_hub.sh RUN_DIR [REPO_ID]" in helped.stdout
    assert export().returncode == 2
    nothing = export(tmp_path / "no-run", HF_TOKEN="x")
    assert nothing.returncode == 2 and "there is no run directory" in nothing.stderr
    wrong = export(tmp_path, HF_TOKEN="x")
    assert wrong.returncode == 2 and "checkpoints/" in wrong.stderr
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    untold = export(tmp_path / "run")
    assert untold.returncode == 2 and "HF_TOKEN is not set" in untold.stderr
    assert os.listdir(tmp_path) == ["run"]


def test_what_cannot_be_converted_is_not_pushed(hub, tmp_path):
    run = outputs.write_run(tmp_path / "run")
    (run / "moeconv_run.json").write_text("{}")
    # An image's own Python settings do not reach ours.
    image = {"PYTHONHOME": "/none", "PYTHONPATH": "/none"}
    ran = export(run, "alice/exported", HF_TOKEN="tok", HF_ENDPOINT=hub.url, **image)
    assert ran.returncode == 4, ran.stderr
    assert "==> verify" not in ran.stdout and hub.seen == []


# In place of moeconv: convert swaps OUT as the real one does; FAIL names the step that fails.
STAND_IN = """#!/bin/bash
echo "$@" >> {calls}
case "$*" in
  -c*) exit "${{LACKS:-0}}" ;;
  *main\\ convert*) rm -rf "$5"; [ "${{FAIL:-}}" = gone ] || mkdir "$5" ;;
esac
case "$*" in
  *main\\ "${{FAIL:-none}}"*) exit 9 ;;
  *main\\ convert*) [ "${{FAIL:-}}" != gone ] || exit 130 ;;
esac
"""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run with an output beside it, in which somebody put files."""
    (tmp_path / "my run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "my run-hf").mkdir()
    for name in KEPT:
        (tmp_path / "my run-hf" / name).write_text(f"{name} of mine\n")
    stand_in(tmp_path / "python", tmp_path / "calls")
    (tmp_path / "tmp").mkdir()
    return tmp_path


KEPT = ("README.md", "LICENSE", "NOTICE")


def stand_in(path: Path, calls: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN.format(calls=shlex.quote(str(calls))))
    path.chmod(0o755)


def export_finished(
    folder: Path, *args: str, script: Path = SCRIPT, **env: str
) -> "subprocess.CompletedProcess[str]":
    told = {"PYTHON": str(folder / "python"), "TMPDIR": str(folder / "tmp"), "HF_TOKEN": "tok"}
    return export(folder / "my run", *args, script=script, **{**told, **env})


@pytest.mark.parametrize(("fail", "code"), [("none", 0), ("convert", 9), ("gone", 130)])
def test_what_people_put_beside_the_model_outlives_convert(finished, fail, code):
    """It is there again, however convert ended: OUT old, swapped, or gone."""
    ran = export_finished(finished, FAIL=fail)
    assert ran.returncode == code, ran.stderr
    for name in KEPT:
        assert (finished / "my run-hf" / name).read_text() == f"{name} of mine\n"
    assert os.listdir(finished / "tmp") == []


def test_a_failed_push_names_the_whole_command(finished):
    """With --private, say: without it the same command would make a public repository."""
    given = ("a/b", "--private", "--create-pr", "--message", "it's new")
    ran = export_finished(finished, *given, FAIL="push")
    assert ran.returncode == 9
    hint = ran.stderr.strip().split("go on with: ")[1]
    assert shlex.split(hint) == [
        *(str(finished / "python"), "-m", "moeconv.cli.main", "push"),
        *(str(finished / "my run-hf"), "--repo-id", *given),
    ]


def test_a_python_without_torch_is_refused_before_the_work(finished):
    ran = export_finished(finished, LACKS="1")
    assert ran.returncode == 2
    assert "MaxText, torch and transformers; make one" in ran.stderr
    assert "pip install '.[train,verify]'" in ran.stderr and "==>" not in ran.stdout


def test_an_environment_to_verify_in_is_made_where_none_is(finished):
    """The trainer's has no torch. What installs is a stand-in; it makes a Python that has it."""
    made = finished / "export"
    # A checkout of its own: this one has gigabytes of environment beside it.
    script = (
        shutil.copytree(SCRIPT.parent, finished / "checkout" / "train" / "kaggle") / SCRIPT.name
    )
    for name in ("pyproject.toml", "README.md", "LICENSE", "moeconv", "requirements"):
        (finished / "checkout" / name).touch()
    for name in ("venv/bin/python", "bin/python"):
        path = finished / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/bash\nexit 1\n")
        path.chmod(0o755)
    # pip brings uv, which installs.
    (finished / "uv").write_text(
        f'#!/bin/bash\necho "$*" >> {finished}/installed\n'
        f'[ "$1" != pip ] || {{ mkdir -p {made}/bin; cp "{finished}/python" {made}/bin/python; }}\n'
    )
    (finished / "bin" / "python3").write_text(
        '#!/bin/bash\nwhile [ "$1" != --target ]; do shift; done\n'
        f'mkdir -p "$2/bin"; cp "{finished}/uv" "$2/bin/uv"\n'
    )
    for name in ("uv", "bin/python3"):
        (finished / name).chmod(0o755)
    env = {
        "PYTHON": "",
        "VENV": str(finished / "venv"),
        "EXPORT_VENV": str(made),
        "PATH": f"{finished / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    ran = export_finished(finished, script=script, **env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    installed = (finished / "installed").read_text()
    assert "[train,verify]" in installed and "cuda12" not in installed
    # Found the next time.
    (finished / "installed").unlink()
    ran = export_finished(finished, script=script, **env)
    assert ran.returncode == 0 and not (finished / "installed").exists()


@pytest.mark.proof(
    "export", inputs=["train/kaggle/export_to_hub.sh", "train/kaggle/environment.sh"]
)
def test_a_run_is_converted_verified_and_pushed(hub, tmp_path):
    """MaxText and transformers run in processes of their own, as on Kaggle."""
    run = outputs.write_run(tmp_path / "run")
    online = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": os.environ["HF_TOKEN"],
        "CUDA_VISIBLE_DEVICES": "",
        # As Kaggle's image has it.
        "PYTHONHOME": "/none",
        "LD_LIBRARY_PATH": "/usr/local/cuda-12.8/lib64",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "FORCE_COLOR": "1",
    }
    ran = export(run, "alice/exported", "--private", **online)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    repo = hub.repo("alice/exported")
    assert repo.private and "model.safetensors" in repo.files()
    assert f"commit: {hub.url}/alice/exported/commit/{repo.branches['main']}" in ran.stdout
    assert "**PASS" in hub.text("README.md", "alice/exported")
    assert os.environ["HF_TOKEN"] not in ran.stdout + ran.stderr

    # Once more, to the repository that the run names, with a README of the user's. What is
    # converted again has the verdict that it had.
    verdict, out = tmp_path / "verdict", tmp_path / "run-hf"
    shutil.copytree(out, verdict, ignore=shutil.ignore_patterns("*.safetensors", MANIFEST_NAME))
    (verdict / "README.md").unlink(missing_ok=True)
    (tmp_path / "python").write_text(
        '#!/bin/bash\ncase "$*" in\n'
        f'  *"main verify"*) cp -r {verdict}/. "$4" ;;\n  *) exec {sys.executable} "$@" ;;\nesac\n'
    )
    (tmp_path / "python").chmod(0o755)
    (out / "README.md").write_text("my own words\n")
    ran = export(run, **{**online, "PYTHON": str(tmp_path / "python")})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert hub.text("README.md").endswith("my own words\n")
    first, second = repo.files(), hub.repo().files()
    assert first["model.safetensors"] == second["model.safetensors"]
    # The content is on the Hub already, by its digest.
    assert len(hub.uploaded()) == 1
