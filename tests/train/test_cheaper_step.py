"""Expert tiles and attention in blocks, in every way the step can be built."""

import contextlib

import fp16_lab
import pytest
from moeconv_train import causal_attention, expert_tiles, fp16_head, loss_scaling
from moeconv_train.loss_scaling import LossScaleSettings

pytestmark = [pytest.mark.proof("cheaper step"), pytest.mark.maxtext]

WAYS = {
    "one device": {"remat_policy": "minimal_with_context"},
    "two devices, scanned, accumulated": {
        "ici_data_parallelism": 2,
        "scan_layers": True,
        "gradient_accumulation_steps": 2,
        "per_device_batch_size": 2,
    },
    "two devices, weights split": {"ici_data_parallelism": 1, "ici_fsdp_parallelism": 2},
    "two devices, all MoE": {"decoder_block": "mixtral", "ici_data_parallelism": 2},
}


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly():
    with fp16_lab.little_optimisation():
        yield


@contextlib.contextmanager
def cheaper():
    with expert_tiles.install(), causal_attention.install(block=16):
        yield


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_same(way, tmp_path):
    """In fp32, to its rounding."""
    keys = {**fp16_lab.FP32, **fp16_lab.SHARED, "vocab_size": 512, **WAYS[way]}
    stock = fp16_lab.Stepper.make(keys, tmp_path)
    reference, metrics = stock.gradient(), stock.step(seed=1)
    with cheaper():
        ours = fp16_lab.Stepper.make(keys, tmp_path)
        gradient, ours_metrics = ours.gradient(), ours.step(seed=1)
    # 2e-6 on one CPU, 5e-6 on another.
    assert fp16_lab.error(gradient, reference) < 1e-5
    for name, value in ours_metrics.items():
        assert value == pytest.approx(metrics[name], rel=2e-5), name


def test_in_fp16_the_gradient_is_as_near_to_fp32s(tmp_path):
    """With loss scaling, on two devices, where it crosses in fp16."""
    keys = {**fp16_lab.SHARED, "ici_data_parallelism": 2}
    reference = fp16_lab.Stepper.make({**fp16_lab.FP32, **keys}, tmp_path).gradient()
    scaled = loss_scaling.install(LossScaleSettings())
    with scaled:
        # MaxText's head, whose table's gradient is rounded to bfloat16.
        stock = fp16_lab.Stepper.make({**fp16_lab.FP16, **keys}, tmp_path).gradient()
        with cheaper(), fp16_head.install():
            stepper = fp16_lab.Stepper.make({**fp16_lab.FP16, **keys}, tmp_path)
            ours = stepper.gradient()
    assert fp16_lab.flushed(ours, reference) < 1e-3
    assert fp16_lab.error(ours, reference) < 1.25 * fp16_lab.error(stock, reference)
    assert fp16_lab.error(ours, reference) < 0.005
    table = "token_embedder.embedding"
    one = {table: reference[table]}
    assert fp16_lab.error(ours, one) < 1.25 * fp16_lab.error(stock, one)
    # A sum beyond fp16 is infinite, and its step is left out.
    stepper.reset(loss_scale=2.0**40)
    before = stepper.leaves()
    stepper.step()
    after = stepper.leaves()
    assert stepper.scaling() == (2.0**39, 0, 1)
    assert before["model." + table].tobytes() == after["model." + table].tobytes()
