"""`moeconv train` as a process that is killed, signalled and limited, and run again."""

import json
import os
import re
import signal
import time

import pytest
import train_lab
from cli_runner import ROOT, commands_but, spawn

from moeconv.errors import TimeLimitError

pytest.importorskip("maxtext")
pytestmark = [
    pytest.mark.proof("crashes of training", without=commands_but("train", "data")),
    pytest.mark.timeout(1800),
]

# Two epochs of 47 steps on the recipe's own two devices, evaluated after each.
STEPS = 94
FP16 = {**train_lab.FP16, "run.epochs": 2, "run.wandb.enabled": "true"}
# As from a user's shell: conftest.py asks for other devices. W&B has no key; there is no torch.
ENVIRONMENT = {
    "XLA_FLAGS": "",
    "WANDB_API_KEY": "",
    "NETRC": os.devnull,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "without_torch")]),
}


def start(output, run_name, *options):
    """One compilation serves every process."""
    words = train_lab.words(output, run_name, **FP16, jax_cache_dir=output / "cache")
    return spawn("train", *words, "--json", *options, **ENVIRONMENT)


def finish(process):
    out, err = process.communicate(timeout=900)
    return process.returncode, json.loads(out) if out else None, err


def wait(process, condition):
    """Looks every half millisecond, as a save is soon over."""
    end = time.monotonic() + 900
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.0005)


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
    code, outcome, err = finish(start(tmp_path, "whole"))
    assert code == 0 and outcome["completed"] == STEPS, err
    scales = {line["loss_scale"] for line in train_lab.metrics(whole) if "loss_scale" in line}
    assert len(scales) > 2

    # Killed between two saves: the metrics are beyond the last checkpoint.
    process = start(tmp_path, "parts")
    wait(process, lambda: lines(run) >= 14)
    process.kill()
    process.communicate()
    seen = train_lab.metrics(run)[-1]["step"]
    kept = max(int(step) for step in os.listdir(run / "checkpoints") if step.isdigit())
    assert kept + 1 < seen

    # Killed in the middle of a save, whose half stays behind.
    process = start(tmp_path, "parts")
    wait(process, lambda: lines(run) and train_lab.metrics(run)[-1]["step"] < seen)
    wait(process, lambda: saving(run))
    process.kill()
    process.communicate()
    assert saving(run)

    # Asked to leave: it saves first.
    process = start(tmp_path, "parts")
    before = lines(run)
    wait(process, lambda: lines(run) > before + 2)
    process.send_signal(signal.SIGTERM)
    code, outcome, err = finish(process)
    assert code == 130 and outcome["status"] == "interrupted", err
    assert outcome["saved_step"] + 1 == outcome["completed"] > outcome["start_step"]
    assert not saving(run)

    # Out of time after one step.
    left = outcome["completed"]
    code, outcome, err = finish(start(tmp_path, "parts", "--time-limit", "1s"))
    assert code == TimeLimitError.exit_code, err
    assert f"going on after step {left} of {STEPS}" in err
    assert f"{left + 1} of {STEPS} steps before the time limit, checkpoint {left} saved" in err

    code, outcome, err = finish(start(tmp_path, "parts"))
    assert code == 0 and outcome["start_step"] == left + 1, err
    train_lab.assert_same(whole, run, STEPS - 1)
    evaluated = [line["step"] for line in train_lab.metrics(run) if line["kind"] == "eval"]
    assert evaluated == [STEPS // 2, STEPS]

    # W&B, offline without a key, knows all of these as one run; nothing of it is outside.
    made = [path.name for path in (run / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(made) >= 4
    identity = (run / "wandb-run-id.txt").read_text().strip()
    assert {re.split(r"-", name)[-1] for name in made} == {identity}
