"""`moeconv train` with real MaxText, in this process: what a run leaves, and going on with it."""

import contextlib
import json
import os
import signal
import sys

import jax
import pytest
import train_lab
from cli_runner import moeconv
from jax.experimental.compilation_cache import compilation_cache

from moeconv.errors import ConfigError, OutputError
from moeconv.maxtext.sidecar import MetricsLine, RunSidecar

pytest.importorskip("maxtext")

# The four devices that conftest.py makes; 16 rows a step, so 24 steps of one epoch.
HERE = {"ici_data_parallelism": 4, **train_lab.FP16}
STEPS = 24
_JAX = (
    "jax_compilation_cache_dir",
    "jax_default_prng_impl",
    "jax_use_shardy_partitioner",
    "jax_remove_size_one_mesh_axis_from_type",
)
pytestmark = [
    pytest.mark.maxtext,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def jax_as_it_was():
    """MaxText's `initialize` sets some of jax's flags for good."""
    before = {name: getattr(jax.config, name) for name in _JAX}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def at_step(step, action):
    """Calls `action` while that step's metrics are written."""
    from moeconv_train.logs.metrics import Metrics

    stock = Metrics.train

    def train(self, scalars, number, paused, late=False):
        stock(self, scalars, number, paused, late)
        if number == step:
            action()

    Metrics.train = train
    try:
        yield
    finally:
        Metrics.train = stock


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def words(output, run_name, **extra):
    """One compilation serves every run here."""
    keys = {**HERE, "jax_cache_dir": output / "cache", **extra}
    return train_lab.words(output, run_name, **keys)


@pytest.fixture(scope="module")
def wandb():
    return train_lab.Wandb()


@pytest.fixture(scope="module")
def whole(output, wandb):
    """A run from its first to its last step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        patch.delenv("WANDB_MODE", raising=False)
        logged = {"run.wandb.enabled": "true", "run.wandb.project": "p"}
        return moeconv("train", *words(output, "whole", **logged), "--json")


def test_a_run_leaves_what_is_promised(whole, output):
    assert whole.code == 0, whole.err
    outcome, run = json.loads(whole.out), output / "whole"
    assert (outcome["status"], outcome["completed"], outcome["steps"]) == ("finished", STEPS, STEPS)
    assert outcome["saved_step"] == STEPS - 1
    kept = sorted(int(step.name) for step in (run / "checkpoints").iterdir())
    assert kept == [20, STEPS - 1]  # the last two

    lines = [MetricsLine.model_validate(line) for line in train_lab.metrics(run)]
    trained = [line for line in lines if line.kind == "train"]
    assert [line.step for line in trained] == list(range(1, STEPS + 1))
    assert [line.step for line in lines if line.kind == "eval"] == [STEPS]
    assert trained[-1].loss < trained[0].loss
    # Too large a scale at first: steps are left out, and it halves.
    assert trained[0].loss_scale == 2**24 and trained[-1].skipped_steps > 0
    assert min(line.loss_scale for line in trained) < 2**24
    assert lines[-1].loss == pytest.approx(outcome["eval_loss"])

    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = (run / "training.log").read_text()
    assert "completed step: 23" in log and "Completed eval after" in log
    assert "Completed eval step:" not in log  # hundreds of lines for each evaluation
    assert f"step {STEPS} of {STEPS} (100.0%)" in whole.err
    assert "completed step" not in whole.err  # MaxText's own words are in the log


def test_weights_and_biases_sees_every_step_once_and_the_evaluation_in_its_place(
    whole, output, wandb
):
    ours, maxtexts = wandb.calls
    assert (ours["project"], ours["name"]) == ("p", "whole")
    assert ours["id"] == (output / "whole" / "wandb-run-id.txt").read_text().strip()
    assert ours["config"]["decoder_block"] == "envy" and str(output) not in str(ours["config"])
    assert maxtexts == {"project": "p", "name": "whole", "resume": "allow"}
    steps = [step for step, content in wandb.logged if "learning/loss" in content]
    assert steps == list(range(STEPS))
    evaluated = [step for step, content in wandb.logged if "eval/avg_loss" in content]
    assert evaluated == [STEPS - 1]
    # W&B drops what comes for an earlier step.
    assert [step for step, _ in wandb.logged] == sorted(step for step, _ in wandb.logged)
    assert wandb.finished == 1


def test_every_target_of_the_data_is_trained_once(whole, output):
    manifest = json.loads((output / "data" / "embedded-128" / "data.json").read_text())
    trained = [line for line in train_lab.metrics(output / "whole") if line["kind"] == "train"]
    assert trained[-1]["tokens"] == manifest["splits"]["train"]["targets"]


def test_the_sidecar_says_what_the_checkpoints_do_not(whole, output):
    text = (output / "whole" / "moeconv_run.json").read_text()
    sidecar = RunSidecar.model_validate_json(text)
    assert sidecar.config["decoder_block"] == "envy" and sidecar.config["steps"] == STEPS
    run = sidecar.run
    # Only a dataset on the Hub is named, never a path of this machine.
    assert (run.dataset, run.language, run.epochs, run.steps) == (None, "en", 1, STEPS)
    assert run.tokens_per_step == 16 * 128
    data = sidecar.model_extra["data"]
    assert data["digest"] == run.dataset_digest and data["splits"]["train"]["rows"] == 375
    assert sidecar.model_extra["versions"]["maxtext"] == "0.2.5"
    assert (output / "whole" / sidecar.tokenizer / "tokenizer.json").is_file()
    assert len((output / "whole" / sidecar.text_sample).read_text().split("\n\n")) == 25
    assert str(output) not in text


def test_the_run_is_what_moeconv_converts_without_a_flag(whole, output):
    seen = moeconv("inspect", output / "whole", "--json")
    assert seen.code == 0, seen.err
    converted = moeconv("convert", output / "whole", output / "model")
    assert converted.code == 0, converted.err
    assert (output / "model" / "tokenizer.json").is_file()


def test_a_signal_saves_and_the_same_command_goes_on_to_the_bit(whole, output):
    command = words(output, "parts")
    with at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        first = moeconv("train", *command, "--json")
    assert first.code == 130, first.err
    assert "SIGTERM: saving a checkpoint" in first.err
    stopped = json.loads(first.out)
    assert stopped["status"] == "interrupted"
    # A step's metrics come while the next one runs. No step is lost, and none is there twice.
    assert stopped["completed"] == stopped["saved_step"] + 1 == 7

    last = moeconv("train", *command, "--json")
    assert last.code == 0, last.err
    assert "going on after step 7 of 24" in last.err
    outcome = json.loads(last.out)
    assert (outcome["start_step"], outcome["completed"]) == (7, STEPS)
    train_lab.assert_same(output / "whole", output / "parts", STEPS - 1)


def test_a_finished_run_is_left_alone(whole, output):
    before = (output / "whole" / "metrics.jsonl").read_bytes()
    again = moeconv("train", *words(output, "whole"), "--json")
    assert again.code == 0 and "all 24 steps are trained already" in again.err
    assert json.loads(again.out)["start_step"] == STEPS
    assert (output / "whole" / "metrics.jsonl").read_bytes() == before


def test_resume_never_refuses_what_is_there(whole, output):
    again = moeconv("train", *words(output, "whole"), "--resume", "never")
    assert again.code == OutputError.exit_code
    assert "holds a run with 24 steps, and --resume never begins a new one" in again.error


def test_another_model_data_or_schedule_is_another_run(whole, output):
    other = {"learning_rate": 1e-4, "head_dim": 32, "run.epochs": 2}
    ran = moeconv("train", *words(output, "whole", **other))
    assert ran.code == ConfigError.exit_code
    assert "head_dim was 16 and is 32" in ran.error
    assert "learning_rate was 0.003 and is 0.0001" in ran.error
    assert "learning_rate_schedule_steps was 24 and is 47" in ran.error


def test_what_maxtext_refuses_is_one_sentence(output):
    ran = moeconv("train", *words(output, "wrong", sharding_tolerance=2.0))
    assert ran.code == ConfigError.exit_code
    assert "MaxText refuses this config: " in ran.error and "sharding_tolerance" in ran.error
    assert not (output / "wrong").exists()
