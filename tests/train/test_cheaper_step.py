"""Expert tiles and attention in blocks, in every way the step can be built."""

import contextlib

import fp16_lab
import pytest
from moeconv_train import causal_attention, expert_tiles, fp16_head, loss_scaling
from moeconv_train.loss_scaling import LossScaleSettings

pytestmark = [pytest.mark.proof("cheaper step"), pytest.mark.maxtext]

KEYS = fp16_lab.SHARED
# 16 rows a step in each, as in test_loss_scaling_runs.py.
WAYS = {
    "one device": {"remat_policy": "minimal_with_context"},
    "scanned": {"scan_layers": True},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_batch_size": 2},
    "two devices": {"ici_data_parallelism": 2},
    "two devices, weights split": {"ici_data_parallelism": 1, "ici_fsdp_parallelism": 2},
    "all MoE": {"decoder_block": "mixtral", "ici_data_parallelism": 2},
}


@contextlib.contextmanager
def cheaper():
    with expert_tiles.install(), causal_attention.install(block=16):
        yield


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_same(way, tmp_path):
    """In fp32 to its rounding; in fp16 with loss scaling as near to fp32's as MaxText's own."""
    keys = {**KEYS, **WAYS[way]}
    stock = fp16_lab.Stepper.make({**fp16_lab.FP32, **keys}, tmp_path)
    reference, metrics = stock.gradient(), stock.step(seed=1)
    with cheaper():
        ours = fp16_lab.Stepper.make({**fp16_lab.FP32, **keys}, tmp_path)
        gradient, ours_metrics = ours.gradient(), ours.step(seed=1)
    # 2e-6 on one CPU, 5e-6 on another.
    assert fp16_lab.error(gradient, reference) < 1e-5
    for name, value in ours_metrics.items():
        assert value == pytest.approx(metrics[name], rel=2e-5), name

    scaled = [loss_scaling.install(LossScaleSettings()), fp16_head.install()]
    with scaled[0], scaled[1]:
        plain = fp16_lab.Stepper.make({**fp16_lab.FP16, **keys}, tmp_path).gradient()
        with cheaper():
            tiled = fp16_lab.Stepper.make({**fp16_lab.FP16, **keys}, tmp_path).gradient()
    assert fp16_lab.flushed(tiled, reference) < 1e-3
    assert fp16_lab.error(tiled, reference) < 1.25 * fp16_lab.error(plain, reference) < 0.01
