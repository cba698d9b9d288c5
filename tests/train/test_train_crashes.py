"""`moeconv train` killed, signalled and limited, and run again."""

import json
import os
import re
import signal
import time

import pytest
import train_lab
from cli_runner import ROOT, commands_but, moeconv, spawn
from test_train_command import at_step
from test_train_endings import jax_as_it_was

from moeconv.errors import TimeLimitError

__all__ = ["jax_as_it_was"]  # a fixture

pytest.importorskip("maxtext")
pytestmark = [
    pytest.mark.proof("endings of training", without=commands_but("train", "data")),
    pytest.mark.maxtext,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# Two epochs on the four devices that conftest.py makes, evaluated after each.
STEPS = 47
KEYS = {
    **train_lab.FP16,
    "ici_data_parallelism": 4,
    "run.epochs": 2,
    "run.wandb.enabled": "true",
}
# Of the processes: no torch, and compiled as little as here.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "without_torch")]),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


def words(output, run_name, *options):
    """One compilation serves every process."""
    keys = {**KEYS, "jax_cache_dir": output / "cache"}
    return "train", *train_lab.words(output, run_name, **keys), "--json", *options


def killed_when(output, condition):
    """Looks every half millisecond, as a save is soon over."""
    process = spawn(*words(output, "parts"), **ENVIRONMENT)
    end = time.monotonic() + 900
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.0005)
    process.kill()
    process.communicate()


def lines(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saving(run):
    """Saves that have begun and not ended."""
    folder = run / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in names if "orbax-checkpoint-tmp" in name]


def test_whatever_happens_the_run_ends_as_if_nothing_had(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "parts"
    ran = moeconv(*words(tmp_path, "whole"))
    assert ran.code == 0 and json.loads(ran.out)["completed"] == STEPS, ran.err
    scales = {line["loss_scale"] for line in train_lab.metrics(whole) if "loss_scale" in line}
    assert len(scales) > 2

    # Killed between two saves: the metrics are beyond the last checkpoint.
    killed_when(tmp_path, lambda: lines(run) >= 14)
    seen = train_lab.metrics(run)[-1]["step"]
    kept = max(int(step) for step in os.listdir(run / "checkpoints") if step.isdigit())
    assert kept + 1 < seen

    # Killed in the middle of a save, whose half stays behind.
    begun = []

    def halfway():
        if not begun and lines(run) and train_lab.metrics(run)[-1]["step"] < seen:
            begun.append(True)  # it has left out what lies beyond the checkpoint
        return begun and saving(run)

    killed_when(tmp_path, halfway)
    assert saving(run)

    # Asked to leave: it saves first.
    left = train_lab.metrics(run)[-1]["step"] + 4
    with at_step(left, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        ran = moeconv(*words(tmp_path, "parts"))
    assert ran.code == 130, ran.err
    outcome = json.loads(ran.out)
    assert outcome["status"] == "interrupted" and outcome["start_step"] < left
    assert outcome["saved_step"] + 1 == outcome["completed"] > left
    assert not saving(run)

    # Out of time after one step.
    left = outcome["completed"]
    ran = moeconv(*words(tmp_path, "parts", "--time-limit", "1s"))
    assert ran.code == TimeLimitError.exit_code, ran.err
    assert f"going on after step {left} of {STEPS}" in ran.err
    assert f"{left + 1} of {STEPS} steps before the time limit, checkpoint {left} saved" in ran.err

    ran = moeconv(*words(tmp_path, "parts"))
    assert ran.code == 0 and json.loads(ran.out)["start_step"] == left + 1, ran.err
    train_lab.assert_same(whole, run, STEPS - 1)
    evaluated = [line["step"] for line in train_lab.metrics(run) if line["kind"] == "eval"]
    assert len(evaluated) == 2 and evaluated[-1] == STEPS

    # W&B, offline without a key, knows all of these as one run; nothing of it is outside.
    made = [path.name for path in (run / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(made) >= 4
    identity = (run / "wandb-run-id.txt").read_text().strip()
    assert {re.split(r"-", name)[-1] for name in made} == {identity}
