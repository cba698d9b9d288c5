"""Models that transformers wrote, loaded and trained by unmodified MaxText.

The first test is of every architecture: MaxText's own loader takes the run, and computes the logits
that transformers computes.
"""

import contextlib
import io
import json
import logging

import cli_runner
import hf_models
import numpy as np
import pytest
from cli_runner import moeconv
from incoming_lab import converted, same, tensors

PROOF = pytest.mark.proof("from Hugging Face", without=cli_runner.commands_but("convert", "verify"))

_MACHINE = {
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "run_name": "x",
    "dataset_type": "synthetic",
    "jax_cache_dir": "",
    "log_config": False,
    "per_device_batch_size": 2,
    "attention": "dot_product",
    "megablox": False,
    "sparse_matmul": False,
    "matmul_precision": "highest",
    "dtype": "float32",
    "cast_logits_to_fp32": True,
    "async_checkpointing": False,
    "max_target_length": 24,
}
_TOKENS = np.random.default_rng(0).integers(3, 64, (2, 24))


def _maxtext_logits(run, tmp_path):
    """By MaxText's config, loader and forward pass; the head as transformers computes it."""
    from maxtext.configs import pyconfig

    from moeconv.verification.models.maxtext import MaxTextModel

    with contextlib.redirect_stdout(io.StringIO()):
        built = pyconfig.initialize(
            ["", str(run / "config.yml")], base_output_directory=str(tmp_path), **_MACHINE
        )
    model = MaxTextModel.load(run / "checkpoints" / "0" / "items", built.get_keys())
    return np.asarray(model.logits(_TOKENS, head="unrounded"))


def _transformers_logits(folder, tokens=_TOKENS):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@PROOF
@pytest.mark.maxtext
@pytest.mark.slow
@pytest.mark.parametrize("name", hf_models.CONFIGS)
def test_maxtext_computes_what_transformers_does(tmp_path, name):
    logging.disable(logging.ERROR)
    model = hf_models.write(tmp_path / "model", name)
    run = converted(model, tmp_path / "run")
    theirs, ours = _transformers_logits(model), _maxtext_logits(run, tmp_path)
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()
    back = converted(run, tmp_path / "back")
    assert same(tensors(model), tensors(back))


@PROOF
@pytest.mark.maxtext
@pytest.mark.slow
def test_maxtext_trains_from_it(tmp_path):
    """20 steps of a Qwen3-MoE; the first loss is transformers' on the same batch, and back."""
    import jax
    import torch
    from maxtext.trainers.pre_train import train

    logging.disable(logging.ERROR)
    model = hf_models.write(tmp_path / "model", "qwen3_moe")
    run = converted(model, tmp_path / "run")
    flags = {
        **_MACHINE,
        "base_output_directory": str(tmp_path / "trained"),
        "load_parameters_path": str(run / "checkpoints" / "0" / "items"),
        "metrics_file": str(tmp_path / "metrics.jsonl"),
        "steps": 20,
        "checkpoint_period": 20,
        "enable_checkpointing": True,
        "learning_rate": 1e-3,
        "load_balance_loss_weight": 0.0,
        "enable_goodput_recording": False,
    }
    argv = [f"{key}={str(value).lower() if isinstance(value, bool) else value}"
            for key, value in flags.items()]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(["train", str(run / "config.yml"), *argv])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["learning/loss"] for line in lines]
    assert len(losses) == 20

    # input_pipeline/synthetic_data_processing.py `SyntheticDataIterator`
    rows = 2 * jax.device_count()
    tokens = np.asarray(jax.random.randint(jax.random.PRNGKey(0), (rows, 25), 0, 64))
    logits = torch.tensor(_transformers_logits(model, tokens[:, :-1]))
    first = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 64), torch.tensor(tokens[:, 1:]).reshape(-1).long()
    )
    assert losses[0] == pytest.approx(float(first), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]

    out = converted(tmp_path / "trained" / "x", tmp_path / "out", "--config", run / "config.yml")
    ran = moeconv("verify", out, "--level", "logits", "--config",
                  run / "config.yml")  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
