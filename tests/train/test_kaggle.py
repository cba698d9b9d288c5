"""The Kaggle script with a stand-in for `moeconv`, and the notebook."""

import ast
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

KAGGLE = Path(__file__).parents[2] / "train" / "kaggle"
SCRIPT = KAGGLE / "kaggle_train.sh"


@pytest.fixture
def kaggle(tmp_path):
    """Runs the script; the stand-in notes its arguments and ends with `code`."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    program = tmp_path / "venv" / "bin" / "moeconv"
    (tmp_path / "working").mkdir()

    def run(*args, code=0, recipes="llama3-moe-200m", refuses=0, **extra):
        names = [word.removeprefix("run_name=") for word in args if word.startswith("run_name=")]
        plan = json.dumps({"plan": {"run_dir": f"/somewhere/runs/{[recipes, *names][-1]}"}})
        program.write_text(
            f"#!/bin/bash\n[[ \"$*\" == *--dry-run* ]] && echo '{plan}' && exit {refuses}\n"
            f'echo "$PWD: $*" >> {tmp_path}/calls\n'
            f'[[ "$*" == *--check* ]] || exit {code}\n'
        )
        program.chmod(0o755)
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "WORK": str(tmp_path / "working"),
            "INPUT": str(tmp_path / "input"),
            "VENV": str(tmp_path / "venv"),
            **extra,
        }
        done = subprocess.run(
            ["bash", SCRIPT, *args], env=environment, capture_output=True, text=True, timeout=60
        )
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_it_checks_and_trains_where_kaggle_saves(kaggle, tmp_path):
    done, calls = kaggle("tiny_cpu", "run.epochs=1", SESSION="2h")
    assert done.returncode == 0, done.stderr
    check, train = calls
    # Where the user is, so that files are found that the words name.
    words = f"{Path.cwd()}: train tiny_cpu run.epochs=1"
    words += f" base_output_directory={tmp_path}/working/runs"
    assert check == f"{words} --check"
    begin, limit = train.rsplit(" ", 1)
    assert begin == f"{words} --time-limit"
    assert 7190 <= int(limit.removesuffix("s")) <= 7200
    assert "finished" in done.stdout


@pytest.mark.parametrize("words", [("--help",), ("tiny_cpu", "-h")])
def test_help_is_its_header_and_installs_nothing(kaggle, tmp_path, words):
    done, calls = kaggle(*words, VENV=str(tmp_path / "none"), SESSION="soon")
    assert done.returncode == 0 and calls == [] and not (tmp_path / "none").exists()
    assert done.stdout.startswith("One Kaggle session") and "CHECK     0 leaves out" in done.stdout
    assert "pipefail" not in done.stdout


def test_a_session_that_ends_in_time_is_no_failure(kaggle):
    done, calls = kaggle(code=14, CHECK="0")
    assert done.returncode == 0 and len(calls) == 1
    assert "not finished: attach this notebook's output" in done.stdout


@pytest.mark.parametrize("code", [1, 4, 15, 130])
def test_a_failure_is_one(kaggle, code):
    done, _ = kaggle(code=code)
    assert done.returncode == code and "finished" not in done.stdout


def attach(tmp_path, name, step, mtime, run_name="llama3-moe-200m", below="notebooks"):
    """An earlier notebook's output."""
    run = tmp_path / "input" / below / name / "runs" / run_name
    (run / "checkpoints" / f"{step}").mkdir(parents=True)
    (run / "checkpoints" / f"{step + 200}.orbax-checkpoint-tmp-0").mkdir()
    (run / "moeconv.json").write_text(name)
    os.utime(run / "moeconv.json", (mtime, mtime))
    data = run.parent / "data" / "tinystories-2048"
    data.mkdir(parents=True, exist_ok=True)
    (data / "data.json").write_text("{}")


def test_it_goes_on_from_the_furthest_output_that_is_attached(kaggle, tmp_path):
    attach(tmp_path, "further", 1000, mtime=0)
    attach(tmp_path, "behind", 800, mtime=1)
    done, _ = kaggle()
    assert "going on from" in done.stdout
    runs = tmp_path / "working" / "runs"
    assert (runs / "llama3-moe-200m" / "moeconv.json").read_text() == "further"
    assert (runs / "llama3-moe-200m" / "checkpoints" / "1000").is_dir()
    assert (runs / "data" / "tinystories-2048" / "data.json").is_file()
    # A second call of the same session leaves what is there.
    (runs / "llama3-moe-200m" / "moeconv.json").write_text("this session's")
    done, _ = kaggle()
    assert "going on from" not in done.stdout and "no earlier run" not in done.stdout
    assert (runs / "llama3-moe-200m" / "moeconv.json").read_text() == "this session's"


@pytest.mark.parametrize("words", [{}, {"recipes": "mine"}], ids=["by the user", "by the recipe"])
def test_it_goes_on_with_the_run_that_is_named(kaggle, tmp_path, words):
    attach(tmp_path, "one", 1000, mtime=0)
    attach(tmp_path, "two", 200, mtime=0, run_name="mine")
    attach(tmp_path, "two", 900, mtime=0)  # beside it, and too large to be taken along
    done, _ = kaggle(*([] if words else ["run_name=mine"]), **words)
    assert done.returncode == 0, done.stderr
    assert "notebooks/two/runs/mine" in done.stdout
    runs = tmp_path / "working" / "runs"
    assert sorted(each.name for each in runs.iterdir()) == ["data", "mine"]


def test_a_run_without_its_data_takes_those_of_another_output(kaggle, tmp_path):
    attach(tmp_path, "one", 1000, mtime=0)
    attach(tmp_path, "two", 200, mtime=0, run_name="mine")
    shutil.rmtree(tmp_path / "input" / "notebooks" / "two" / "runs" / "data")
    done, _ = kaggle("run_name=mine")
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in (tmp_path / "working" / "runs").iterdir()) == [
        "data",
        "mine",
    ]


def test_words_that_are_refused_end_it_before_anything_is_copied(kaggle, tmp_path):
    attach(tmp_path, "one", 1000, mtime=0)
    done, calls = kaggle(refuses=4)
    assert done.returncode == 4 and not calls
    assert not (tmp_path / "working" / "runs").exists()


def test_a_run_is_found_as_deep_as_kaggle_may_mount_it(kaggle, tmp_path):
    attach(tmp_path, "version", 1000, mtime=0, below="notebooks/owner/notebook")
    model = tmp_path / "input/notebooks/owner/notebook/version/runs/llama3-moe-200m-hf"
    model.mkdir()
    for name in ("moeconv.json", "config.json"):
        (model / name).write_text("{}")
    done, _ = kaggle()
    assert "going on from step 1000 of" in done.stdout, done.stderr


def test_an_attached_run_of_another_name_is_not_begun_anew(kaggle, tmp_path):
    attach(tmp_path, "one", 1000, mtime=0)
    done, calls = kaggle("run_name=other")
    assert done.returncode == 2 and not calls
    assert "no run other is attached" in done.stderr and "runs/llama3-moe-200m" in done.stderr
    assert not (tmp_path / "working" / "runs").exists()


def test_a_new_run_takes_the_data_that_another_has_prepared(kaggle, tmp_path):
    attach(tmp_path, "one", 1000, mtime=0)
    done, _ = kaggle("run_name=other", NEW="1")
    assert "a new one, with the data of " in done.stdout
    runs = tmp_path / "working" / "runs"
    assert [each.name for each in runs.iterdir()] == ["data"]
    assert (runs / "data" / "tinystories-2048" / "data.json").is_file()


@pytest.mark.parametrize("least, goes_on", [("1000", True), ("1001", False), ("soon", False)])
def test_an_older_output_than_asked_for_is_refused(kaggle, tmp_path, least, goes_on):
    attach(tmp_path, "one", 1000, mtime=0)
    done, calls = kaggle(AT_LEAST=least)
    assert (done.returncode == 0) is goes_on and bool(calls) is goes_on
    assert goes_on or f"AT_LEAST={least}" in done.stderr


def test_an_output_that_is_asked_for_and_absent_is_refused(kaggle):
    done, calls = kaggle(AT_LEAST="1")
    assert done.returncode == 2 and not calls and "attach the last session's output" in done.stderr


def test_what_the_image_sets_for_its_own_packages_does_not_reach_ours(kaggle, tmp_path):
    hostile = {
        "UV_CONSTRAINT": "/none",
        "UV_BUILD_CONSTRAINT": "/none",
        "PIP_CONSTRAINT": "/none",
        "PYTHONPATH": "/kaggle/lib",
    }
    program = tmp_path / "bin" / "python3"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\nenv > {tmp_path}/seen\nexit 3\n")
    program.chmod(0o755)
    done, _ = kaggle(
        VENV=str(tmp_path / "new"),
        PATH=f"{program.parent}:{os.environ['PATH']}",
        LD_LIBRARY_PATH="/usr/local/nvidia/lib64:/usr/local/cuda/lib64:/usr/local/cuda-12.8/lib64",
        **hostile,
    )
    assert done.returncode == 3
    seen = dict(
        line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines() if "=" in line
    )
    assert not hostile.keys() & seen.keys()
    assert seen["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert seen["NCCL_CUMEM_HOST_ENABLE"] == "0"


@pytest.mark.parametrize("fetches", [True, False])
def test_the_python_is_uvs_own_where_it_can_be_fetched(kaggle, tmp_path, fetches):
    program = tmp_path / "bin" / "python3"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\necho "$*" >> {tmp_path}/installed\n'
        f'[[ "$*" != *--managed-python* ]] || exit {0 if fetches else 2}\n'
    )
    program.chmod(0o755)
    kaggle(VENV=str(tmp_path / "new"), PATH=f"{program.parent}:{os.environ['PATH']}")
    asked = [
        line for line in (tmp_path / "installed").read_text().splitlines() if "uv venv" in line
    ]
    assert ["--managed-python" in line for line in asked] == [True] + [False] * (not fetches)


@pytest.mark.parametrize("there", [True, False])
def test_it_says_that_it_begins_a_new_run(kaggle, tmp_path, there):
    if there:
        (tmp_path / "input" / "moeconv").mkdir(parents=True)
    done, calls = kaggle()
    assert done.returncode == 0, done.stderr
    says = f"no earlier run llama3-moe-200m below {tmp_path}/input: a new one"
    assert says in done.stdout and len(calls) == 2


def test_the_run_stays_where_kaggle_saves(kaggle):
    done, calls = kaggle("tiny_cpu", "base_output_directory=/tmp/elsewhere")
    assert done.returncode == 2 and "set WORK instead" in done.stderr and not calls


def test_it_installs_for_training_only(kaggle, tmp_path):
    """A stand-in for pip and uv notes what they are asked for."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python3"
    fake.write_text(
        f'#!/bin/bash\necho "$*" >> {tmp_path}/installed\n[[ "$*" != *"uv pip"* ]] || exit 3\n'
    )
    fake.chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done, calls = kaggle(VENV=str(tmp_path / "new"), PATH=path)
    assert done.returncode == 3 and not calls
    assert f"{tmp_path}/new: moeconv could not be installed" in done.stderr
    words = (tmp_path / "installed").read_text().splitlines()[-1].split()
    assert words[-1].endswith("[train,cuda12]")
    assert words[words.index("--constraint") + 1].endswith("requirements/kaggle.txt")


def test_torch_and_jax_for_cuda_do_not_share_an_environment(tmp_path):
    source = f". {KAGGLE}/environment.sh; make_env {tmp_path}/v train verify cuda12"
    done = subprocess.run(["bash", "-c", source], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "do not go into one environment" in done.stderr
    assert not (tmp_path / "v").exists()


def test_a_session_may_begin_with_a_zero(kaggle):
    done, calls = kaggle(SESSION="09h08m", CHECK="0")
    assert done.returncode == 0, done.stderr
    assert 0 <= 9 * 3600 + 8 * 60 - int(calls[0].rsplit(" ", 1)[1].removesuffix("s")) <= 10


def test_a_wrong_session_is_refused(kaggle):
    for wrong in ("soon", "8h30", ""):
        done, calls = kaggle(SESSION=wrong or "h")
        assert done.returncode == 2 and "write it as 11h30m" in done.stderr and not calls


def test_the_notebook_shows_what_there_is(tmp_path, monkeypatch, capsys):
    """A cell that raises would end the notebook as failed, and a run may have no plot yet."""
    notebook = json.loads((KAGGLE / "train_on_kaggle.ipynb").read_text())
    cell = next(
        "".join(c["source"]) for c in notebook["cells"] if "loss.png" in "".join(c["source"])
    )
    shown = []
    display = types.SimpleNamespace(Image=lambda path: path, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    cell = cell.replace("/kaggle/working", str(tmp_path))
    exec(cell, {})
    assert shown == []
    for name in ("early", "late"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "moeconv.json").touch()
    (tmp_path / "runs" / "late" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "runs" / "late" / "loss.png").touch()
    exec(cell, {})
    assert shown == [str(tmp_path / "runs" / "late" / "loss.png")]
    assert capsys.readouterr().out.splitlines() == ["early no step yet", 'late {"step": 2}']


@pytest.mark.parametrize(
    "below", ["input/moeconv", "input/datasets/me/moeconv/moeconv-main", "working/moeconv"]
)
def test_the_notebook_finds_its_checkout(tmp_path, monkeypatch, below):
    cell = training_cell().replace('"/kaggle', f'"{tmp_path}')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit, match="no checkout of moeconv"):
        exec(cell, {})
    script = tmp_path / below / "train" / "kaggle" / "kaggle_train.sh"
    script.parent.mkdir(parents=True)
    script.touch()
    names = {}
    exec(cell, names)
    assert names["MOECONV"] == str(tmp_path / below)


def training_cell():
    """The notebook's cell that trains, without the line for the shell."""
    notebook = json.loads((KAGGLE / "train_on_kaggle.ipynb").read_text())
    cell = next(c["source"] for c in notebook["cells"] if '!bash "{' in "".join(c["source"]))
    return "".join(line for line in cell if not line.startswith("!"))


def test_the_notebook_is_clean_and_runs_the_script():
    notebook = json.loads((KAGGLE / "train_on_kaggle.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    text = "".join(line for cell in cells for line in cell["source"])
    assert "train/kaggle/kaggle_train.sh" in text and "export_to_hub.sh" in text
    for cell in cells:
        python = [line for line in cell["source"] if not line.startswith("!")]
        ast.parse("".join(python))
    assert "hf_" not in text  # no token of anybody
