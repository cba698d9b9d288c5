"""Runs that end otherwise: no number, hopeless FP16, one step; and other ways to train."""

import functools
import json

import jax
import pytest
import train_lab
from cli_runner import commands_but, moeconv
from jax.experimental.compilation_cache import compilation_cache
from test_train_command import _JAX, STEPS

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
    jax.config.update("jax_disable_most_optimizations", True)  # much is compiled, little computed
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of what is compiled here, some of it for two runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(tmp_path, cache):
    def run(**extra):
        keys = {"ici_data_parallelism": 4, "jax_cache_dir": cache, **extra}
        ran = moeconv("train", *train_lab.words(tmp_path, "run", **keys), "--json")
        return ran, tmp_path / "run"

    return run


@pytest.fixture
def infinite(monkeypatch):
    """A forward pass that overflows on some batches, always the same ones."""
    import jax.numpy as jnp
    from maxtext.trainers.pre_train import train as maxtext

    stock = maxtext.loss_fn

    @functools.wraps(stock)
    def loss_fn(model, config, data, *args, **kwargs):
        loss, aux = stock(model, config, data, *args, **kwargs)
        if not kwargs["is_train"]:
            return loss, aux
        added = jnp.where(data["targets"].sum() % 5 == 1, jnp.inf, 0.0)
        return loss + added, {**aux, "xent_sum": aux["xent_sum"] + added}

    monkeypatch.setattr(maxtext, "loss_fn", loss_fn)


def test_a_loss_that_overflows_ends_the_run_or_is_left_out(train, infinite):
    keys = {**train_lab.FP16, "run.loss_scale.initial": 2**10}
    ran, run = train(**keys, abort_on_nan_loss="true", abort_on_inf_loss="true")
    assert ran.code == TrainingError.exit_code, ran.err
    assert "the loss is no number any more" in ran.error
    assert "nothing was saved" in ran.error or "the last checkpoint is of step" in ran.error
    seen = train_lab.metrics(run)
    assert 0 < len(seen) < STEPS  # every line a number, none after

    # What that sentence advises. The same batches come again.
    assert "with abort_on_nan_loss=false abort_on_inf_loss=false" in ran.error
    ran, run = train(**keys, abort_on_nan_loss="false", abort_on_inf_loss="false")
    assert ran.code == 0 and json.loads(ran.out)["completed"] == STEPS, ran.err
    trained = [line for line in train_lab.metrics(run) if line["kind"] == "train"]
    assert trained[: len(seen)] == seen
    # JSON has no infinite number.
    assert 0 < trained[-1]["skipped_steps"] == trained[-1]["step"] - len(trained)


def test_a_run_that_only_skips_gives_up(train, infinite):
    """The trainer turns MaxText's own rule off while the loss is scaled."""
    keys = {**train_lab.FP16, "run.loss_scale.initial": 2**10}
    ran, _ = train(**keys, **{"run.loss_scale.patience": 1})
    assert ran.code == TrainingError.exit_code, ran.err
    assert "of 1 steps in a row were not finite" in ran.error and "docs/fp16.md" in ran.error
    assert "begin a new run_name with a lower learning_rate or dtype=float32" in ran.error


# Sixteen rows in two parts.
ACCUMULATED = {
    "gradient_accumulation_steps": 2,
    "per_device_batch_size": 2,
    "learning_rate_schedule_steps": 9,
}


def test_a_run_of_one_step_has_a_checkpoint(train):
    """MaxText never saves step 0 when it is done, so nothing could be converted."""
    ran, run = train(**ACCUMULATED, steps=1)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["saved_step"] == 0
    assert (run / "checkpoints" / "0" / "items").is_dir()


def test_accumulated_gradients_are_one_step_also_in_maxtexts_own_metrics_file(train, tmp_path):
    """Stock MaxText truncates it at every evaluation."""
    own = tmp_path / "own.jsonl"
    ran, run = train(**ACCUMULATED, metrics_file=own, eval_interval=4, eval_start_step=3, steps=9)
    assert ran.code == 0, ran.err
    lines = train_lab.metrics(run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 10))
    assert lines[0]["tokens"] > 1000  # targets of 16 rows
    rows = [json.loads(line) for line in own.read_text().splitlines()]
    assert [row["step"] for row in rows if "learning/loss" in row] == list(range(9))
    assert [row["step"] for row in rows if "eval/avg_loss" in row] == [3, 7]
