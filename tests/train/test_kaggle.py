"""The Kaggle script with a stand-in for `moeconv`."""

import json
import os
import pty
import shutil
import subprocess
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

    def run(
        *args,
        code=0,
        recipes="llama3-moe-200m",
        refuses=0,
        trial=0,
        noise="",
        seconds=0,
        stdout=subprocess.PIPE,
        **extra,
    ):
        names = [word.removeprefix("run_name=") for word in args if word.startswith("run_name=")]
        plan = json.dumps({"plan": {"run_dir": f"/somewhere/runs/{[recipes, *names][-1]}"}})
        program.write_text(
            f"#!/bin/bash\necho -n '{noise}'\n[[ \"$*\" != *--dry-run* ]] ||\n"
            f"  {{ sleep {seconds}; echo '{plan}{noise}'; exit {refuses}; }}\n"
            f'echo "$PWD: $*" >> {tmp_path}/calls\n'
            "[ ! -t 1 ] && [ ! -t 2 ] || echo on a terminal\n"
            f'[[ "$*" != *--trial* ]] || exit {trial}\n'
            f'[[ "$*" == *--check* ]] || exit {code}\n'
        )
        program.chmod(0o755)
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {
            **os.environ,
            "WORK": str(tmp_path / "working"),
            "INPUT": str(tmp_path / "input"),
            "VENV": str(tmp_path / "venv"),
            "TRIAL": "0",
            **extra,
        }
        done = subprocess.run(
            ["bash", SCRIPT, *args],
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE if stdout == subprocess.PIPE else stdout,
            text=True,
            timeout=60,
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


@pytest.mark.parametrize("code, ends", [(0, 0), (14, 0), (15, 15)])
def test_a_notebook_s_terminal_does_not_reach_the_training(kaggle, code, ends):
    """There a progress line would be rewritten at every step, for hours."""
    ours, theirs = pty.openpty()
    done, calls = kaggle(code=code, CHECK="0", stdout=theirs)
    os.close(theirs)
    said = os.read(ours, 2**16).decode()
    os.close(ours)
    assert done.returncode == ends and len(calls) == 1
    assert "== training for at most" in said and "on a terminal" not in said


def test_a_session_that_ends_in_time_is_no_failure(kaggle):
    done, calls = kaggle(code=14, CHECK="0")
    assert done.returncode == 0 and len(calls) == 1
    assert "not finished: attach this notebook's output" in done.stdout


def test_it_says_what_to_ask_of_the_next_session(kaggle, tmp_path):
    attach(tmp_path, "one", 1000, mtime=0)
    done, _ = kaggle(code=14)
    assert done.stdout.splitlines()[-1].endswith("run it again with AT_LEAST=1000")


@pytest.mark.parametrize("code", [1, 4, 15, 130])
def test_a_failure_is_one(kaggle, code):
    done, _ = kaggle(code=code)
    assert done.returncode == code and "finished" not in done.stdout


def attach(tmp_path, name, step, mtime, run_name="llama3-moe-200m", below="notebooks",
           sidecar="moeconv_run.json"):  # fmt: skip
    """An earlier notebook's output."""
    run = tmp_path / "input" / below / name / "runs" / run_name
    for saved in (str(step - 200), str(step), f"{step + 200}.orbax-checkpoint-tmp-0"):
        (run / "checkpoints" / saved / "items").mkdir(parents=True)
        (run / "checkpoints" / saved / "items" / "_METADATA").touch()
    (run / "checkpoints" / str(step + 400)).mkdir()  # cut off while it was copied
    (run / "trial.json").touch()
    (run / sidecar).write_text(name)
    os.utime(run / sidecar, (mtime, mtime))
    data = run.parent / "data" / "tinystories-2048"
    data.mkdir(parents=True, exist_ok=True)
    (data / "data.json").write_text("{}")


def test_it_goes_on_from_the_furthest_output_that_is_attached(kaggle, tmp_path):
    attach(tmp_path, "further", 1000, mtime=0)
    attach(tmp_path, "behind", 800, mtime=1)
    done, _ = kaggle()
    assert "going on from" in done.stdout
    runs = tmp_path / "working" / "runs"
    assert (runs / "llama3-moe-200m" / "moeconv_run.json").read_text() == "further"
    # The last checkpoint alone: two would cost 3.65 GB of Kaggle's 20 more, and the time.
    assert [each.name for each in (runs / "llama3-moe-200m" / "checkpoints").iterdir()] == ["1000"]
    assert (runs / "llama3-moe-200m" / "checkpoints" / "1000" / "items" / "_METADATA").is_file()
    assert (runs / "llama3-moe-200m" / "trial.json").is_file()
    assert (runs / "data" / "tinystories-2048" / "data.json").is_file()
    # A second call of the same session leaves what is there.
    (runs / "llama3-moe-200m" / "moeconv_run.json").write_text("this session's")
    done, _ = kaggle()
    assert "going on from" not in done.stdout and "no earlier run" not in done.stdout
    assert (runs / "llama3-moe-200m" / "moeconv_run.json").read_text() == "this session's"


def test_runs_of_moeconv_0_1_0_are_found_and_each_is_named_once(kaggle, tmp_path):
    attach(tmp_path, "old", 1000, mtime=0, sidecar="moeconv.json")
    attach(tmp_path, "new", 800, mtime=0)
    (tmp_path / "input/notebooks/new/runs/llama3-moe-200m/moeconv.json").touch()
    done, _ = kaggle("run_name=other")
    named = [line for line in done.stderr.splitlines() if line.startswith("  ")]
    assert [line.rpartition("input/")[2] for line in named] == [
        "notebooks/new/runs/llama3-moe-200m",
        "notebooks/old/runs/llama3-moe-200m",
    ]
    done, _ = kaggle()
    assert "going on from step 1000 of" in done.stdout and "notebooks/old" in done.stdout


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
    for name in ("moeconv.json", "config.json"):  # as moeconv 0.1.0 names a manifest
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


def test_a_new_run_begins_with_a_trial(kaggle, tmp_path):
    done, calls = kaggle("tiny_cpu", TRIAL="1", CHECK="0")
    assert done.returncode == 0 and "WARNING" not in done.stdout
    assert calls[0].endswith(f"base_output_directory={tmp_path}/working/runs --trial")
    assert len(calls) == 2
    # It was made, or the run has begun: it is not made again.
    run = tmp_path / "working" / "runs" / "llama3-moe-200m"
    run.mkdir(parents=True)
    (run / "trial.json").touch()
    assert len(kaggle(TRIAL="1", CHECK="0")[1]) == 1
    (run / "trial.json").unlink()
    (run / "checkpoints" / "0" / "items").mkdir(parents=True)
    (run / "checkpoints" / "0" / "items" / "_METADATA").touch()
    assert len(kaggle(TRIAL="1", CHECK="0")[1]) == 1


@pytest.mark.parametrize("code, trains", [(4, True), (1, True), (130, False)])
def test_a_trial_that_fails_does_not_end_the_session(kaggle, code, trains):
    done, calls = kaggle(TRIAL="1", trial=code, CHECK="0")
    assert (done.returncode == 0) is trains and len(calls) == 1 + trains
    assert (f"WARNING: the trial failed (exit code {code})" in done.stdout) is trains


def test_noise_of_the_image_does_not_hide_the_run_s_name(kaggle, tmp_path):
    """Of a sitecustomize that prints, in whatever Python it is."""
    attach(tmp_path, "one", 1000, mtime=0)
    real = shutil.which("python3")
    noisy = tmp_path / "bin" / "python3"
    noisy.parent.mkdir()
    noisy.write_text(
        f'#!/bin/bash\n[[ "$*" == *-S* ]] || echo "Error in sitecustomize"\nexec {real} "$@"\n'
    )
    noisy.chmod(0o755)
    done, _ = kaggle(noise="Error in {sitecustomize}", PATH=f"{noisy.parent}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "going on from step 1000" in done.stdout


def test_the_session_begins_with_the_script(kaggle, tmp_path):
    """What comes before the training, an installation above all, is of its time."""
    done, calls = kaggle(SESSION="10s", CHECK="0", seconds=1.01)
    assert done.returncode == 0, done.stderr
    assert int(calls[0].rsplit(" ", 1)[1].removesuffix("s")) <= 9
    done, calls = kaggle(SESSION="1s", CHECK="0", seconds=1.01)
    assert done.returncode == 2 and not calls and "over before training began" in done.stderr


def test_an_output_that_is_asked_for_and_absent_is_refused(kaggle):
    done, calls = kaggle(AT_LEAST="1")
    assert done.returncode == 2 and not calls and "attach the last session's output" in done.stderr


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


def test_a_session_may_begin_with_a_zero(kaggle):
    done, calls = kaggle(SESSION="09h08m", CHECK="0")
    assert done.returncode == 0, done.stderr
    assert 0 <= 9 * 3600 + 8 * 60 - int(calls[0].rsplit(" ", 1)[1].removesuffix("s")) <= 10


def test_a_wrong_session_is_refused(kaggle):
    for wrong in ("soon", "8h30", ""):
        done, calls = kaggle(SESSION=wrong or "h")
        assert done.returncode == 2 and "write it as 11h30m" in done.stderr and not calls
