"""Runs that end otherwise: no number, hopeless FP16, data that end; and other ways to train."""

import json

import jax
import pytest
import train_lab
from cli_runner import commands_but, moeconv
from jax.experimental.compilation_cache import compilation_cache
from test_train_command import _JAX

from moeconv.errors import TrainingError

pytest.importorskip("maxtext")
pytestmark = [
    pytest.mark.proof("endings of training", without=commands_but("train", "data")),
    pytest.mark.maxtext,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def jax_as_it_was():
    before = {name: getattr(jax.config, name) for name in _JAX}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def train(tmp_path):
    def run(**extra):
        keys = {"ici_data_parallelism": 4, **extra}
        ran = moeconv("train", *train_lab.words(tmp_path, "run", **keys), "--json")
        return ran, tmp_path / "run"

    return run


def test_a_loss_that_is_no_number_names_the_last_checkpoint(train):
    ran, run = train(learning_rate=1e38, gradient_clipping_threshold=0.0, warmup_steps_fraction=0)
    assert ran.code == TrainingError.exit_code, ran.err
    assert "the loss is no number any more" in ran.error
    lines = train_lab.metrics(run)
    assert 0 < len(lines) < 24  # every line a number, none after


def test_a_run_of_one_step_has_a_checkpoint(train):
    """MaxText never saves step 0 when it is done, so nothing could be converted."""
    ran, run = train(steps=1)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["saved_step"] == 0
    assert (run / "checkpoints" / "0" / "items").is_dir()


def test_hopeless_fp16_gives_up(train):
    scale = {"mode": "static", "initial": 2**24, "patience": 3}
    scaled = {f"run.loss_scale.{key}": value for key, value in scale.items()}
    ran, run = train(**train_lab.FP16 | scaled)
    assert ran.code == TrainingError.exit_code, ran.err
    assert "3 steps in a row were not finite" in ran.error and "docs/fp16.md" in ran.error
    assert train_lab.metrics(run)[-1]["skipped_steps"] == 3


def test_accumulated_gradients_are_counted_as_one_step(train):
    ran, run = train(gradient_accumulation_steps=2, per_device_batch_size=2, steps=3)
    assert ran.code == 0, ran.err
    lines = train_lab.metrics(run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert lines[0]["tokens"] > 1000  # targets of 16 rows


def test_maxtexts_own_metrics_file_is_whole(train, tmp_path):
    """Stock MaxText truncates it at every evaluation."""
    own = tmp_path / "own.jsonl"
    ran, _ = train(metrics_file=own, eval_interval=4, eval_start_step=3, steps=9)
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in own.read_text().splitlines()]
    assert [row["step"] for row in rows if "learning/loss" in row] == list(range(9))
    assert [row["step"] for row in rows if "eval/avg_loss" in row] == [3, 7]
